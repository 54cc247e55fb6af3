"""Updates of modules that a base has in another cut: one of several beside each other, or a part of a larger one.

What an update does to some outputs of a layer is an update of as many rows; those of several modules that the base has
as one are put together with zeros where none of them reaches. Nothing is rounded, but where scalings differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loramgr.adapter import Delta, Hadamard, LowRank, Replacement, Shift, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.other_layouts import Place
from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.views import ComputedTensor

if TYPE_CHECKING:
    import torch

__all__ = ["Cut", "joined", "placed"]


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of a module's update and the rows of the base's tensor that it is for; `stop` None for the whole."""

    name: str
    update: Update
    start: int = 0
    stop: int | None = None


def placed(name: str, update: Update, places: Sequence[Place]) -> dict[str, list[Cut]]:
    """Return the parts of a parameter's update by the base's parameters that they are for.

    Raises IncompatibleError, naming the parameter, for an update that has no rows to be cut, and for wrong sizes.
    """
    module, _, parameter = name.rpartition(".")
    found: dict[str, list[Cut]] = {}
    _check_rows(name, update, places)
    for place in places:
        if parameter not in ("weight", "bias"):
            raise IncompatibleError(f"{name}: the base has {module} in another layout, which has no such parameter")
        target = place.bias if parameter == "bias" else place.weight
        if place.stop is None:
            cut = Cut(name, update)
        else:
            size = place.stop - place.start
            cut = Cut(name, _rows_of(name, update, place.first, place.first + size), place.start, place.stop)
        found.setdefault(target, []).append(cut)
    return found


def joined(target: str, cuts: Sequence[Cut], specs: Mapping[str, TensorSpec]) -> Update:
    """Return the one update of a base's tensor that its parts make.

    Raises IncompatibleError, naming the parts, where two of them are for the same rows, where they have no common
    form, and where DoRA leaves rows out, whose norms only the base has.
    """
    if len(cuts) == 1 and cuts[0].stop is None:
        return cuts[0].update
    spec = specs.get(target)
    if spec is None or not spec.shape:
        raise IncompatibleError(f"{cuts[0].name}: the base has no {target}")
    rows = spec.shape[0]
    ordered = sorted(cuts, key=lambda cut: cut.start)
    ends = [rows if cut.stop is None else cut.stop for cut in ordered]
    if any(cut.start < end for cut, end in zip(ordered[1:], ends, strict=False)):
        raise IncompatibleError(f"two modules of the adapter are {target.rpartition('.')[0]} of the base")
    covered = sum(end - cut.start for cut, end in zip(ordered, ends, strict=True))
    if len(ordered) == 1 and covered == rows:
        return ordered[0].update
    parts = [cut.update for cut in ordered]
    low_rank = [part for part in parts if isinstance(part, LowRank)]
    shifts = [part for part in parts if isinstance(part, Shift)]
    starts = [cut.start for cut in ordered]
    if len(low_rank) == len(parts):
        return _joined_low_rank(target, low_rank, _Rows(rows, tuple(starts), covered == rows))
    if len(shifts) == len(parts) and len({shift.scaling for shift in shifts}) == 1:
        vectors = [shift.vector for shift in shifts]
        return Shift(_assembled(vectors, starts, [0] * len(vectors), (rows,)), shifts[0].scaling)
    names = ", ".join(cut.name for cut in ordered)
    raise IncompatibleError(f"{names}: the base has them as parts of {target}, and only low-rank updates are joined")


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a tensor of the base, and where in it each part begins; `full` says that none is left out."""

    count: int
    starts: tuple[int, ...]
    full: bool


def _joined_low_rank(target: str, parts: Sequence[LowRank], rows: _Rows) -> LowRank:
    magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
    if magnitudes and (len(magnitudes) < len(parts) or not rows.full):
        raise IncompatibleError(f"{target}: DoRA on some of its rows only, and the norms of the others are the base's")
    factors = list({id(part.lora_A): part.lora_A for part in parts}.values())
    ranks = [view.spec.shape[0] for view in factors]
    offsets = {id(view): sum(ranks[:index]) for index, view in enumerate(factors)}
    scalings = {part.scaling for part in parts}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    up = [part.lora_B if part.scaling == scaling else _times(part.lora_B, part.scaling) for part in parts]
    columns = [offsets[id(part.lora_A)] for part in parts]
    rank, first = sum(ranks), parts[0].lora_B.spec.shape
    made = replace(
        parts[0],
        lora_A=factors[0] if len(factors) == 1 else _stacked(factors),
        lora_B=_assembled(up, rows.starts, columns, (rows.count, rank, *first[2:])),
        rank=rank,
        alpha=scaling * rank,
        scaling=scaling,
    )
    if not magnitudes:
        return made
    return replace(made, magnitude=_assembled(magnitudes, rows.starts, [0] * len(magnitudes), (rows.count,)))


def _check_rows(name: str, update: Update, places: Sequence[Place]) -> None:
    """Refuse an update of another number of outputs than the places have."""
    sized = [place for place in places if place.stop is not None]
    expected = sum((place.stop or 0) - place.start for place in sized)
    if sized and _outputs(update) not in (None, expected):  # without outputs it is refused where it is cut
        there = " and ".join(place.weight for place in sized)
        raise IncompatibleError(
            f"{name}: the base has it as {there}, {expected} rows, and the adapter's has another size"
        )


def _outputs(update: Update) -> int | None:
    match update:
        case LowRank():
            return update.lora_B.spec.shape[0]
        case Shift():
            return update.vector.spec.shape[0]
        case Delta() | Replacement():
            return update.tensor.spec.shape[0] if update.tensor.spec.shape else None
        case Hadamard():
            return update.w1_a.spec.shape[0] if update.t1 is None else None
    return None


def _rows_of(name: str, update: Update, start: int, stop: int) -> Update:
    match update:
        case LowRank():
            magnitude = None if update.magnitude is None else _sliced(update.magnitude, start, stop)
            return replace(update, lora_B=_sliced(update.lora_B, start, stop), magnitude=magnitude)
        case Shift():
            return replace(update, vector=_sliced(update.vector, start, stop))
        case Delta() if update.indices is None:
            return replace(update, tensor=_sliced(update.tensor, start, stop))
        case Hadamard() if update.t1 is None:
            w1_a, w2_a = (_sliced(view, start, stop) for view in (update.w1_a, update.w2_a))
            return replace(update, w1_a=w1_a, w2_a=w2_a)
    raise IncompatibleError(
        f"{name}: the base has this module in other parts, and what the adapter does to it cannot be cut into rows",
        "take a base in the layout that it was trained on",
    )


def _sliced(view: TensorView, start: int, stop: int) -> TensorView:
    if (start, stop) == (0, view.spec.shape[0]):
        return view
    spec = TensorSpec(view.spec.name, view.spec.dtype, (stop - start, *view.spec.shape[1:]))
    return ComputedTensor(spec, lambda: view.load()[start:stop])


def _times(view: TensorView, factor: float) -> ComputedTensor:
    return ComputedTensor(TensorSpec(view.spec.name, "F64", view.spec.shape), lambda: view.load().double() * factor)


def _stacked(views: Sequence[TensorView]) -> ComputedTensor:
    dtype = _dtype(views)
    shape = (sum(view.spec.shape[0] for view in views), *views[0].spec.shape[1:])

    def make() -> torch.Tensor:
        import torch

        from loramgr.tensors import torch_dtype

        return torch.cat([view.load().to(torch_dtype(dtype)) for view in views])

    return ComputedTensor(TensorSpec(views[0].spec.name, dtype, shape), make)


def _assembled(
    views: Sequence[TensorView], starts: Sequence[int], columns: Sequence[int], shape: tuple[int, ...]
) -> ComputedTensor:
    """Return zeros with every view in its rows, and from its column on."""
    dtype = _dtype(views)

    def make() -> torch.Tensor:
        import torch

        from loramgr.tensors import torch_dtype

        whole = torch.zeros(shape, dtype=torch_dtype(dtype))
        for view, start, column in zip(views, starts, columns, strict=True):
            part = view.load().to(whole.dtype)
            rows = whole[start : start + part.shape[0]]
            target = rows if part.dim() == 1 else rows[:, column : column + part.shape[1]]
            target.copy_(part)
        return whole

    return ComputedTensor(TensorSpec(views[0].spec.name, dtype, shape), make)


def _dtype(views: Sequence[TensorView]) -> str:
    dtypes = {view.spec.dtype for view in views}
    return dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
