"""Mixtures of experts whose model has one tensor for all experts, and whose file has one for each.

transformers 5 keeps a mixture as `experts.gate_up_proj` (experts, 2·between, in) and `experts.down_proj` (experts, in,
between), and loads and saves it as matrices of every expert: gate above up, as its conversion_mapping.py says of
Mixtral, Qwen2-MoE and those named with them. Its `mlp` of a mixture may be `block_sparse_moe` in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from loramgr.errors import IncompatibleError
from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.updates import Experts, LowRank, Replacement, Update
from loramgr.views import ComputedTensor, transposed

__all__ = ["Mixture", "mixtures", "parted"]

_EXPERT = re.compile(r"(?P<block>.+\.experts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)\.weight")
_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("fc1", "fc3", "fc2"))
_IN_FILE, _IN_MODEL = ".block_sparse_moe.", ".mlp."


@dataclass(frozen=True, slots=True)
class Mixture:
    """A tensor of the model that the file has in pieces; `pieces` are those of every expert, from above."""

    spec: TensorSpec
    pieces: tuple[tuple[TensorSpec, ...], ...]


def mixtures(specs: Mapping[str, TensorSpec]) -> tuple[dict[str, Mixture], dict[str, str]]:
    """Return the tensors that only the model has, by their names there, and its names of others of the file."""
    blocks: dict[str, dict[str, dict[int, TensorSpec]]] = {}
    for name, spec in specs.items():
        if match := _EXPERT.fullmatch(name):
            leaves = blocks.setdefault(match["block"], {})
            leaves.setdefault(match["leaf"], {})[int(match["index"])] = spec
    found = {
        whole.spec.name: whole
        for block, leaves in blocks.items()
        for whole in _wholes(block, leaves)
        if whole.spec.name not in specs
    }
    names = {name.replace(_IN_FILE, _IN_MODEL): name for name in specs if _IN_FILE in name}
    others = {live: name for live, name in names.items() if live not in specs}
    turned = {name.replace(_IN_FILE, _IN_MODEL): whole for name, whole in found.items()}
    return {**found, **turned}, others


def _wholes(block: str, leaves: Mapping[str, Mapping[int, TensorSpec]]) -> Iterator[Mixture]:
    for gate, up, down in _LEAVES:
        pairs = {"gate_up_proj": (gate, up), "down_proj": (down,)} if gate in leaves else {}
        for name, parts in (pairs or {"up_proj": (up,), "down_proj": (down,)}).items():
            matrices = [leaves.get(leaf, {}) for leaf in parts]
            if (whole := _whole(f"{block}.{name}", matrices)) is not None:
                yield whole


def _whole(name: str, matrices: list[Mapping[int, TensorSpec]]) -> Mixture | None:
    """Put the matrices of all experts together, None where one lacks or has another shape or dtype."""
    count = len(matrices[0])
    if not count or any(set(each) != set(range(count)) for each in matrices):
        return None
    pieces = [tuple(each[index] for each in matrices) for index in range(count)]
    kinds = {tuple((spec.dtype, spec.shape) for spec in each) for each in pieces}
    inputs = {spec.shape[1:] for spec in pieces[0]}
    if len(kinds) != 1 or len(inputs) != 1 or len(pieces[0][0].shape) != 2:
        return None
    rows = sum(spec.shape[0] for spec in pieces[0])
    return Mixture(TensorSpec(name, pieces[0][0].dtype, (count, rows, *inputs.pop())), tuple(pieces))


def parted(update: Update, mixture: Mixture) -> Iterator[tuple[TensorSpec, Update]]:
    """Yield every piece of the mixture with its part of an update that fits the whole; IncompatibleError for others."""
    for index, pieces in enumerate(mixture.pieces):
        start = 0
        for spec in pieces:
            rows = slice(start, start + spec.shape[0])
            yield spec, _part(update, index, rows, spec)
            start = rows.stop


def _part(update: Update, index: int, rows: slice, spec: TensorSpec) -> Update:
    match update:
        case Experts():
            a, b = update.lora_A, update.lora_B
            turned = update.transposed is True or (update.transposed is None and b.spec.shape[1:2] == spec.shape[1:])
            a, b = (transposed(b), transposed(a)) if turned else (a, b)
            pair = _cut(a, index, slice(0, a.spec.shape[1])), _cut(b, index, rows)
            return LowRank("linear", *pair, update.rank, update.alpha, update.scaling)
        case Replacement():
            return replace(update, tensor=_cut(update.tensor, index, rows))
    raise IncompatibleError(f"{spec.name}: the base has the experts one by one, and the adapter changes all as one")


def _cut(view: TensorView, index: int, rows: slice) -> TensorView:
    """Return rows of one expert's matrix."""
    load = view.make if isinstance(view, ComputedTensor) else view.load  # the whole need not become contiguous
    shape = (rows.stop - rows.start, view.spec.shape[2])
    return ComputedTensor(TensorSpec(view.spec.name, view.spec.dtype, shape), lambda: load()[index, rows])
