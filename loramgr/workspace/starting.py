"""What an initialisation of PEFT took out of a base before the training, computed again of the base alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loramgr.adapter import Adapter, LowRank
from loramgr.checkpoints.binding import BoundUpdate
from loramgr.errors import IncompatibleError
from loramgr.workspace.differing import read_checked
from loramgr.workspace.matching import bind_to
from loramgr.workspace.sources import OpenBase

if TYPE_CHECKING:
    import torch

    from loramgr.algebra.initial import Started

__all__ = ["Start", "started_by", "started_from"]

_UNKNOWN = {
    "pissa_niter": "it begins with random vectors that no file has",
    "corda": "it depends on the data that its covariances were taken from",
    "lora_ga": "it depends on the data that its gradients were taken from",
}
_INITIAL = "loramgr add PATH --initial INITIAL, the adapter as PEFT saved it before the training"


@dataclass(frozen=True, slots=True)
class Start:
    """An initialisation that the base determines.

    `compute` gives s · B₀A₀, or with `times_scaling` B₀A₀. `as_stored` says that a weight which is stored as (in, out)
    is decomposed as it is, and not its transpose.
    """

    name: str
    compute: Callable[[torch.Tensor, int], Started]
    times_scaling: bool = False
    as_stored: bool = False


def started_by(init: str, path: Path) -> Start:
    """Return what `init_lora_weights` means; IncompatibleError, with the reason, where no base determines it."""
    from loramgr.algebra.initial import principal, projected

    if init == "pissa":
        return Start("PiSSA", principal)
    if init.lower() == "olora":
        return Start("OLoRA", projected, times_scaling=True, as_stored=True)
    why = next((why for start, why in _UNKNOWN.items() if init.lower().startswith(start)), "no formula of it is known")
    raise IncompatibleError(f"{path}: the base alone does not say what {init!r} began with: {why}", _INITIAL)


def started_from(
    trained: Adapter, base: OpenBase, start: Start
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float]]:
    """Return lora_A and lora_B as they began, by parameter, and the relative error of each as in `Started`.

    An embedding begins with a product of zero in PEFT and is in neither. Raises IncompatibleError, naming the
    parameter, for layers that the initialisation is not for, and where float32 does not determine the product.
    """
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    errors: dict[str, float] = {}
    for bound in bind_to(trained, base).updates:
        if isinstance(bound.update, LowRank) and bound.update.kind != "embedding":
            factors[bound.name], errors[bound.name] = _started(bound, bound.update, base, start)
    return factors, errors


def _started(
    bound: BoundUpdate, update: LowRank, base: OpenBase, start: Start
) -> tuple[tuple[torch.Tensor, torch.Tensor], float]:
    from loramgr.algebra.initial import LARGEST_ERROR

    weight = _weight(bound, base)
    if update.kind != "linear" or weight.dim() != 2 or not update.scaling > 0:
        raise IncompatibleError(f"{bound.name}: {start.name} is for linear layers with a scaling above 0")
    if update.rank > min(weight.shape):
        raise IncompatibleError(f"{bound.name}: the rank {update.rank} is above a dimension of {tuple(weight.shape)}")
    turned = bound.transposed and not start.as_stored
    made = start.compute(weight.T if turned else weight, update.rank)
    error = made.error * update.scaling if start.times_scaling else made.error
    if error > LARGEST_ERROR:
        raise IncompatibleError(
            f"{bound.name}: float32, in which PEFT computed what {start.name} began with, does not determine it at "
            f"the rank {update.rank}: its singular values there are too near each other or 0 (error {error:.1e})",
            _INITIAL,
        )
    left, right = (made.right.T, made.left.T) if bound.transposed and start.as_stored else (made.left, made.right)
    balance = 1.0 if start.times_scaling else update.scaling**0.5
    return (right / balance, left / balance), error


def _weight(bound: BoundUpdate, base: OpenBase) -> torch.Tensor:
    """Return the base's tensor in float64, its bytes checked."""
    from loramgr.tensors import from_bytes

    source = bound.tied_source or bound.target
    if bound.new:
        raise IncompatibleError(f"{bound.name}: the base has no such tensor, and what it began with nobody knows")
    return from_bytes(read_checked(base, source), base.checkpoint.tensors[source].spec).double()
