"""Adapters' updates put together parameter by parameter: factors by a method, whole tensors where it is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loramgr.adapter import Adapter, LowRank, Opaque, Replacement, Rows, Shift, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.peft_writer import WrittenFactors, WrittenTensor
from loramgr.records import ModuleError
from loramgr.tensorfile import Data, TensorSpec, TensorView
from loramgr.workspace.deltas import aligned, product_of

if TYPE_CHECKING:
    import torch

    from loramgr.algebra.composing.composed import Parameters, Stored
    from loramgr.algebra.lowrank import Product

__all__ = ["Account", "Combination", "Part", "combine"]

_NOTHING = 1e-13  # of what the factors could have made: a smaller sum is what rounding leaves of deltas that cancel


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter of a combination: what messages call it, the adapter itself, and its weight."""

    ref: str
    adapter: Adapter
    weight: float


@dataclass(slots=True)
class Account:
    """How good the factors are that were made so far: the modules' errors, and the squares of all norms added up."""

    modules: list[ModuleError] = field(default_factory=list)
    norm2: float = 0.0
    error2: float = 0.0
    bound2: float = 0.0

    def take(self, name: str, stored: Stored) -> None:
        """Count one module's factors; IncompatibleError, naming it, where they do not fit the dtype."""
        if not all(map(math.isfinite, (stored.norm2, stored.error2, stored.bound2))):
            raise IncompatibleError(f"{name}: the result is too large for the dtype it is stored in", "smaller weights")
        norm = math.sqrt(stored.norm2)
        relative = math.sqrt(stored.error2) / norm if norm else 0.0
        self.modules.append(ModuleError(name, stored.lora_A.shape[0], norm, relative))
        self.norm2 += stored.norm2
        self.error2 += stored.error2
        self.bound2 += stored.bound2

    def check(self, dtype: str) -> None:
        """Raise IncompatibleError where nothing is left: the deltas cancel, or all of it rounds to zero."""
        if not self.modules:
            return
        if self.norm2 <= _NOTHING**2 * self.bound2:
            raise IncompatibleError(
                "the deltas are zero, or cancel each other: nothing is left", "other weights, or another method"
            )
        if self.error2 >= self.norm2 * (1 - _NOTHING):
            raise IncompatibleError(
                f"all of the result rounds to zero in {dtype}", "larger weights, or another --dtype"
            )


@dataclass(frozen=True, slots=True)
class Combination:
    """What is to be written: modules' factors by their names, and whole tensors; nothing of it is made yet.

    Making factors counts them in `account`.
    """

    factors: dict[str, WrittenFactors]
    tensors: list[WrittenTensor]
    account: Account


@dataclass(frozen=True, slots=True)
class _Combiner:
    parts: Sequence[Part]
    parameters: Parameters
    dtype: str
    device: str
    account: Account

    @property
    def weights(self) -> list[float]:
        return [part.weight for part in self.parts]

    def factors(self, name: str, updates: Sequence[LowRank | None]) -> WrittenFactors:
        """Return one module's combined factors, to be made when their turn comes."""
        from loramgr.algebra.composing.composed import rank_of

        present = [update for update in updates if update is not None]
        first = present[0]
        a, b = first.lora_A.spec.shape, first.lora_B.spec.shape
        for update in present[1:]:
            if (update.kind, update.lora_A.spec.shape[1:], update.lora_B.spec.shape[0]) != (first.kind, a[1:], b[0]):
                raise IncompatibleError(f"{name}: the adapters' deltas are of different shapes or kinds of layers")
        ranks = [0 if update is None else update.rank for update in updates]
        rank = rank_of(ranks, (b[0], math.prod(a[1:])), self.parameters)
        shape_A, shape_B = (rank, *a[1:]), (b[0], rank, *b[2:])

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            stored = self._stored(name, updates)
            return stored.lora_A.reshape(shape_A).contiguous(), stored.lora_B.reshape(shape_B).contiguous()

        flag = any(update.fan_in_fan_out for update in present)
        return WrittenFactors(first.kind, shape_A, shape_B, self.dtype, make, fan_in_fan_out=flag)

    def _stored(self, name: str, updates: Sequence[LowRank | None]) -> Stored:
        from loramgr.algebra.composing.composed import compose_deltas
        from loramgr.tensors import torch_dtype

        found = [None if update is None else product_of(update, self.device) for update in updates]
        products = [_zero_like(found) if product is None else product for product in found]
        stored = compose_deltas(products, self.weights, self.parameters, name, torch_dtype(self.dtype))
        self.account.take(name, stored)
        return stored

    def whole(self, name: str, updates: Sequence[Replacement | None]) -> WrittenTensor:
        """Return the tensor that takes a parameter's place, where that follows from those of the adapters.

        It does where all adapters bring the same bytes, or where the method is a sum and the weights of those that
        bring one sum to 1, so that the base's own counts for nothing; else IncompatibleError.
        """
        from loramgr.algebra.composing.composed import method_named

        found = [(part, update.tensor) for part, update in zip(self.parts, updates, strict=True) if update is not None]
        refs = " and ".join(part.ref for part, _ in found)
        if len({view.spec.shape for _, view in found}) > 1:
            raise IncompatibleError(f"{name} is replaced by {refs} with tensors of different shapes")
        if len(found) == len(self.parts) > 1 and len({bytes(view.read_bytes()) for _, view in found}) == 1:
            view = found[0][1]
            return WrittenTensor(TensorSpec(name, view.spec.dtype, view.spec.shape), view.read_bytes)
        if not method_named(self.parameters.method).sums:
            raise IncompatibleError(
                f"{name} is replaced as a whole by {refs}, and {self.parameters.method} combines deltas only",
                "--method linear, with weights that sum to 1",
            )
        total = math.fsum(part.weight for part, _ in found)
        if total != 1:
            raise IncompatibleError(
                f"{name} is replaced as a whole by {refs}, whose weights sum to {total:g} and leave some of the base",
                "weights that sum to 1, or loramgr merge, which has the base at hand",
            )
        spec = TensorSpec(name, self.dtype, found[0][1].spec.shape)
        return WrittenTensor(spec, lambda: _weighted(spec, [(part.weight, view) for part, view in found]))


def combine(
    parts: Sequence[Part],
    parameters: Parameters,
    dtype: str,
    device: str,
    own_tables: Callable[[TensorView], bool],
) -> Combination:
    """Put the adapters' updates together; reads headers, and whole tensors where they have to be compared.

    `own_tables` says of a table whether it is the base's own tensor, which then changes nothing. Raises
    IncompatibleError, naming it, for a parameter whose updates have no sum without the base, and for an adapter whose
    names mean nothing without it.
    """
    for part in parts:
        if part.adapter.obstacle is not None:
            raise IncompatibleError(f"{part.ref} cannot be combined: {part.adapter.obstacle}")
        naming = part.adapter.naming
        if naming is not None and naming.is_needed:  # the result would have names that no tool knows
            raise IncompatibleError(
                f"{part.ref} cannot be combined: its modules have {naming.described}, which only its base turns into "
                "those of a model",
                f"loramgr bind {part.ref} BASE",
            )
    account = Account()
    combiner = _Combiner(parts, parameters, dtype, device, account)
    factors: dict[str, WrittenFactors] = {}
    tensors: list[WrittenTensor] = []
    for name, updates in aligned([part.adapter for part in parts]).items():
        kept = [_plain(part.ref, name, update, own_tables) for part, update in zip(parts, updates, strict=True)]
        low_rank = [update for update in kept if not isinstance(update, Replacement)]
        whole = [update for update in kept if not isinstance(update, LowRank)]
        if len(low_rank) == len(kept):
            factors[name.removesuffix(".weight")] = combiner.factors(name.removesuffix(".weight"), low_rank)
        elif len(whole) == len(kept):
            tensors.append(combiner.whole(name, whole))
        else:
            refs = [part.ref for part, update in zip(parts, kept, strict=True) if isinstance(update, Replacement)]
            raise IncompatibleError(f"{name}: {refs[0]} replaces it as a whole, and another adapter has a delta of it")
    return Combination(factors, tensors, account)


def _plain(
    ref: str, name: str, update: Update | None, own_tables: Callable[[TensorView], bool]
) -> LowRank | Replacement | None:
    """Return the update where it can be combined with others."""
    hint = "loramgr merge, which has the base at hand"
    match update:
        case Shift():
            raise IncompatibleError(f"{ref} moves the bias {name} (lora_bias), which cannot be combined", hint)
        case Rows():
            raise IncompatibleError(f"{ref} trains rows of {name}, which cannot be combined", hint)
        case LowRank() if update.magnitude is not None:
            raise IncompatibleError(
                f"{ref} is a DoRA adapter: what it does to {name} depends on the base's weights, so that it has no "
                "delta to combine",
                hint,
            )
        case LowRank() if update.table is not None:
            if own_tables(update.table):
                return replace(update, table=None)
            raise IncompatibleError(
                f"{ref} replaces the whole of {name} before its delta, and nobody knows it for the base's own",
                "loramgr base add PATH, where it is the base's own; else loramgr merge",
            )
        case LowRank() | Replacement() | None:
            return update
        case Opaque():
            raise IncompatibleError(f"{ref} is {update.method}, which is not combined: {update.reason}", hint)
    raise IncompatibleError(
        f"{ref} changes {name} by a {type(update).__name__.lower()} update, which has no two factors to combine", hint
    )


def _zero_like(products: Sequence[Product | None]) -> Product:
    """Return the zero delta of the others' shape, as two factors without a column."""
    from loramgr.algebra.lowrank import Product

    known = next(product for product in products if product is not None)
    return Product(known.left[:, :0], known.right[:0])


def _weighted(spec: TensorSpec, found: Sequence[tuple[float, TensorView]]) -> Data:
    """Return the bytes of Σ wᵢ·tᵢ, computed in float64 and rounded once; IncompatibleError where it is not finite."""
    import torch

    from loramgr.algebra.casting import rounded
    from loramgr.algebra.finite import all_finite
    from loramgr.tensors import as_bytes, torch_dtype

    total = torch.zeros(spec.shape, dtype=torch.float64)
    for weight, view in found:
        total.add_(view.load().double(), alpha=weight)
    result = rounded(total, torch_dtype(spec.dtype))
    if not all_finite(result):
        raise IncompatibleError(f"{spec.name}: NaN or infinite values, or too large for {spec.dtype}")
    return as_bytes(result.contiguous())
