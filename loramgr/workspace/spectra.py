"""What the singular values of an adapter's deltas say: ranks really used, shares of the weights, and outliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from loramgr.adapter import Adapter, LowRank, Update
from loramgr.errors import IntegrityError, LoramgrError
from loramgr.records import ModuleRecord, VersionRecord
from loramgr.workspace.home import Home
from loramgr.workspace.pairs import module_name
from loramgr.workspace.sources import base_of_digest
from loramgr.workspace.weights import Weights

if TYPE_CHECKING:
    import torch

__all__ = ["Delta", "measured"]

_FAR = 3.0  # a norm of so many times the median, or so small a part of it, is an outlier
_FEWEST = 3  # modules that have a median worth the name


@dataclass(frozen=True, slots=True)
class Delta:
    """What the factors of one module say: singular values of scaling · lora_B lora_A, how many of them count.

    `dead_ranks` are the directions of which one factor is zero throughout: they take memory and change nothing.
    """

    values: torch.Tensor
    rank_used: int
    dead_ranks: list[int]

    @classmethod
    def of(cls, update: LowRank) -> Delta | None:
        """Read the factors, once; None where they hold NaN or infinite values."""
        import torch

        from loramgr.algebra.comparison import numerical_rank
        from loramgr.algebra.finite import all_finite
        from loramgr.algebra.spectrum import singular_values

        lora_A, lora_B = update.lora_A.load().flatten(1), update.lora_B.load().flatten(1)
        if not (all_finite(lora_A) and all_finite(lora_B)):
            return None
        slices = lora_A.shape[0] // lora_B.shape[1]
        if slices > 1:  # of a fused weight (loralib's MergedLinear): each of its own rows of lora_A, wherever it lies
            lora_B = torch.block_diag(*lora_B.chunk(slices))  # type: ignore[no-untyped-call]  # torch has no type of it
        values = singular_values(lora_A, lora_B, update.scaling)
        if not bool(values.isfinite().all()):
            return None
        alive = (lora_A != 0).any(1) & (lora_B != 0).any(0)
        dead = [position for position, used in enumerate(alive.tolist()) if not used]
        return cls(values, numerical_rank(values, (lora_B.shape[0], lora_A.shape[1])), dead)


def measured(
    home: Home, version: VersionRecord, adapter: Adapter, modules: Sequence[ModuleRecord]
) -> tuple[list[ModuleRecord], list[str]]:
    """Return the modules with their shares of the weights and of the median, and sentences for the person.

    Raises IntegrityError when the base's weights are not those that its digest names.
    """
    weights, notes = _weights(home, version, adapter)
    medians = _medians(modules)
    updates = {module_name(name): update for name, update in adapter.updates.items()}
    found = []
    for module in modules:
        share = None if weights is None else _share(module, updates[module.name], weights)
        found.append(_placed(replace(module, share_of_weight=share), medians.get(_kind(module.name))))
    return found, notes


def _weights(home: Home, version: VersionRecord, adapter: Adapter) -> tuple[Weights | None, list[str]]:
    if version.base is None:
        return None, []
    try:
        return Weights(base_of_digest(home, version.base.digest), [adapter]), []
    except IntegrityError:
        raise
    except LoramgrError as error:
        return None, [f"no shares of the weights: {error.message}"]


def _share(module: ModuleRecord, update: Update, weights: Weights) -> float | None:
    """Return the delta's norm over the weight's; None without either, and where the weight is zero."""
    from loramgr.algebra.effects import matrix_norm

    if module.delta_norm is None:
        return None
    weight = weights.weight([update]).tensor
    norm = 0.0 if weight is None else matrix_norm(weight)
    return module.delta_norm / norm if norm else None


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _medians(modules: Sequence[ModuleRecord]) -> Mapping[str, float]:
    """Return the median norm of the modules of each last name, of those that have enough and are not all zero."""
    norms: dict[str, list[float]] = {}
    for module in modules:
        if module.delta_norm is not None:
            norms.setdefault(_kind(module.name), []).append(module.delta_norm)
    return {kind: middle for kind, each in norms.items() if len(each) >= _FEWEST and (middle := median(each))}


def _placed(module: ModuleRecord, middle: float | None) -> ModuleRecord:
    if middle is None or module.delta_norm is None:
        return module
    ratio = module.delta_norm / middle
    return replace(module, norm_to_median=ratio, outlier=not 1 / _FAR <= ratio <= _FAR)
