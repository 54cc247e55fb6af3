"""What merging adapters into a model in memory does to each of its tensors, planned as a merge on disk is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramgr.adapter import LowRank, Replacement, Update
from loramgr.algebra import fast
from loramgr.algebra.engine import Change, ExactTerms
from loramgr.algebra.factors import stacked
from loramgr.algebra.terms import LowRankTerm
from loramgr.checkpoints.binding import bind
from loramgr.checkpoints.families import TieGroup
from loramgr.checkpoints.source import Checkpoint
from loramgr.digests import TensorDigest
from loramgr.errors import IncompatibleError, UsageError
from loramgr.pickles import MemoryTensor
from loramgr.records import MergedAdapter
from loramgr.references import is_path, parse_weighted
from loramgr.tensorfile import FLOAT8_DTYPES, FLOAT_DTYPES
from loramgr.workspace.adapters import reference
from loramgr.workspace.contributions import Contribution, Pick, whole_tensor
from loramgr.workspace.home import Home
from loramgr.workspace.inspecting import open_adapter
from loramgr.workspace.live_base import KnownBase, registered_base
from loramgr.workspace.live_layout import Layout
from loramgr.workspace.live_tensor import Content, Rewrite, Sum
from loramgr.workspace.options import MergeOptions
from loramgr.workspace.planning import MergePlan, Target, plan_merge
from loramgr.workspace.sources import OpenBase

if TYPE_CHECKING:
    import torch

__all__ = ["Asked", "LivePlan", "Request", "plan_live"]

Asked = str | Path | tuple[str | Path, float]


@dataclass(frozen=True, slots=True)
class Request:
    """How to merge into a model in memory.

    `base` is the base it should be, None for the one that the adapters record; `sha256_of` gives the digest of a
    tensor of the model as it is without anything merged. The rest is as in `MergeOptions`.
    """

    numerics: str
    keep_tied: bool
    force: bool
    replacements_of: str | None
    base: KnownBase | None
    sha256_of: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class LivePlan:
    """The adapters, what each tensor becomes, and the base that the model should be, None where nobody knows it.

    `base_names` maps the tensors that the base has to their names in its file.
    """

    adapters: tuple[MergedAdapter, ...]
    contents: dict[str, Content]
    base: KnownBase | None
    base_names: dict[str, str]


def plan_live(home: Home, layout: Layout, asked: Sequence[Asked], request: Request) -> LivePlan:
    """Plan the merge of adapters into the tensors of a layout; their factors are loaded, no weight changes.

    Raises UsageError without adapters, NotFoundError and IncompatibleError as a merge on disk, and IncompatibleError
    for what cannot be done in place: new tensors, other shapes, names that would have to be untied, tensors that are
    not plain memory.
    """
    if not asked:
        raise UsageError("no adapter to merge", "loramgr list")
    with ExitStack() as stack:
        picks = [_pick(stack, home, layout, each) for each in asked]
        base = request.base or _recorded_base(home, picks)
        plan = _plan(layout, picks, base, request)
        _check_in_place(plan, layout)
        touched = [plan.targets[name] for name in plan.touched]
        known, names = _known_names(base, touched, request)
        contents = {}
        for target in touched:
            fresh = known is not None and target.spec.name not in names
            contents[target.spec.name] = _content(target, layout, request, fresh=fresh)
    adapters = tuple(MergedAdapter(pick.ref, pick.version.digest, pick.weight) for pick in picks)
    return LivePlan(adapters, contents, known, names)


@dataclass(frozen=True)
class _BaseInMemory(OpenBase):
    """A model in memory in the place of an opened base: its ties are those that it has."""

    groups: tuple[TieGroup, ...] = ()

    @cached_property
    def ties(self) -> list[TieGroup]:
        """The names that are one tensor in the model."""
        return list(self.groups)


def _pick(stack: ExitStack, home: Home, layout: Layout, asked: Asked) -> Pick:
    text, weight = _weighted(asked)
    version, adapter, _ = stack.enter_context(open_adapter(home, text))
    # The model has all of its names, whatever task an adapter was trained for: none of a tie is out of use.
    adapter = replace(adapter, task_type=None)
    binding = bind(adapter, layout.specs, layout.ties, layout.config, dtypes=FLOAT_DTYPES | FLOAT8_DTYPES)
    return Pick(text, text if is_path(text) else reference(version), version, adapter, weight, binding)


def _weighted(asked: Asked) -> tuple[str, float]:
    if isinstance(asked, str):
        return parse_weighted(asked)
    what, weight = asked if isinstance(asked, tuple) else (asked, 1.0)
    text = what if isinstance(what, str) else str(what.absolute())
    if not math.isfinite(weight):
        raise UsageError(f"the weight {weight!r} of {text} is not finite", f"({text!r}, 0.5)")
    return text, float(weight)


def _recorded_base(home: Home, picks: Sequence[Pick]) -> KnownBase | None:
    digests = (pick.version.base.digest for pick in picks if pick.version.base is not None)
    return next((base for digest in digests if (base := registered_base(home, digest)) is not None), None)


def _plan(layout: Layout, picks: list[Pick], base: KnownBase | None, request: Request) -> MergePlan:
    tensors = {name: MemoryTensor(spec, layout.tensors[name]) for name, spec in layout.specs.items()}
    checkpoint = Checkpoint(Path(), Path(), (), dict(tensors), {}, None, None, layout.config, None, ())
    recorded = [pick.version.base.digest for pick in picks if pick.version.base is not None]
    digest = base.digest if base is not None else next(iter(recorded), None)
    name = None if base is None else base.name
    tables = _digests_beside_tables(layout, picks, request)
    model = _BaseInMemory(name, digest or "", "the model", None, checkpoint, tables, groups=tuple(layout.ties))
    force = request.force or digest is None
    options = MergeOptions(force=force, replacements_of=request.replacements_of, keep_tied=request.keep_tied)
    return plan_merge(model, picks, options)


def _digests_beside_tables(layout: Layout, picks: Sequence[Pick], request: Request) -> dict[str, TensorDigest]:
    """Return the digests of tensors for which an adapter brings a whole one, which may be the same."""
    found = {}
    for bound in (bound for pick in picks for bound in pick.binding.updates):
        name = bound.tied_source or bound.target
        if isinstance(bound.update, LowRank) and bound.update.table is not None and name in layout.tensors:
            spec = layout.specs[name]
            found[name] = TensorDigest(name, spec.dtype, spec.shape, request.sha256_of(name))
    return found


def _check_in_place(plan: MergePlan, layout: Layout) -> None:
    for name in plan.touched:
        target = plan.targets[name]
        refs = ", ".join(item.pick.ref for item in target.contributions)
        if target.source is None:
            raise IncompatibleError(
                f"{refs} brings {name}, which the model lacks, and in place it cannot be added",
                "load the model with the class for the adapter's task",
            )
        if target.replaces_shape:
            have = list(layout.tensors[name].shape)
            raise IncompatibleError(
                f"{refs} brings {name} with the shape {list(target.spec.shape)}, and in place it has to stay {have}",
                "load the model with as many labels or tokens as the adapter was trained with",
            )
    parted = [(name, target.source) for name, target in plan.targets.items() if target.source not in (None, name)]
    if parted:
        raise IncompatibleError(
            f"{parted[0][0]} and {parted[0][1]} are one tensor, and {plan.picks[0].ref} changes only one of them",
            "keep_tied=True to change both, as PEFT's merge does, or load the model untied",
        )
    layout.check_in_place(plan.touched)


def _known_names(
    base: KnownBase | None, touched: Sequence[Target], request: Request
) -> tuple[KnownBase | None, dict[str, str]]:
    """Return the base to compare the tensors with and their names in it; None where there is nothing to go by."""
    if base is None or request.force:
        return None, {}
    try:
        return base, _base_names(base, touched)
    except IncompatibleError:
        if request.base is not None:
            raise
        return None, {}  # a class may name its parameters otherwise than the files; the adapter fits the model


def _base_names(base: KnownBase, touched: Sequence[Target]) -> dict[str, str]:
    brought = [target.spec.name for target in touched if all(map(_is_whole, target.contributions))]
    required = [target.spec.name for target in touched if target.spec.name not in brought]
    return base.names(required, brought)


def _is_whole(item: Contribution) -> bool:
    return whole_tensor(item.update) is not None


def _content(target: Target, layout: Layout, request: Request, *, fresh: bool) -> Content:
    name = target.spec.name
    tensor = layout.tensors[name]
    viewable = tensor.dim() == 2 or (tensor.dim() > 2 and tensor.is_contiguous())
    terms = [_term(item) for item in target.contributions if _is_sum(item.update)]
    if not viewable or len(terms) < len(target.contributions):
        kept = tuple(_in_memory(item) for item in target.contributions)
        _check_float8(target)
        return Rewrite(target.spec, kept, request.numerics, fresh, request.force)
    reach = sum(map(_reach, terms))
    if not (math.isfinite(reach) or request.force):
        refs = ", ".join(item.pick.ref for item in target.contributions)
        raise IncompatibleError(f"{name}: the update is not finite (with {refs})", "force=True to merge it")
    return Sum(_change(name, tensor, terms, request.numerics), reach, request.force)


def _check_float8(target: Target) -> None:
    """Raise IncompatibleError for a float8 weight, unless a whole tensor takes its place."""
    first, *more = target.contributions
    whole = not more and first.weight == 1 and isinstance(first.update, Replacement)
    if target.spec.dtype in FLOAT8_DTYPES and not whole:
        raise IncompatibleError(
            f"{target.spec.name} is {target.spec.dtype}, and float8 weights take low-rank sums and whole tensors only "
            f"(with {', '.join(item.pick.ref for item in target.contributions)})",
            "load the model in bfloat16",
        )


def _is_sum(update: Update) -> bool:
    return isinstance(update, LowRank) and update.magnitude is None and update.table is None


def _term(item: Contribution) -> LowRankTerm:
    update = item.update
    assert isinstance(update, LowRank)
    lora_A, lora_B = update.lora_A.load().flatten(1), update.lora_B.load().flatten(1)
    left, right = (lora_A.T, lora_B.T) if item.bound.transposed else (lora_B, lora_A)
    return LowRankTerm(left, right, update.scaling, item.weight)


def _reach(term: LowRankTerm) -> float:
    """Return what no entry of the term exceeds: |weight · scaling| · r · max |left| · max |right|."""
    if not (term.left.numel() and term.right.numel()):
        return 0.0
    largest = [float(factor.abs().max()) for factor in (term.left, term.right)]
    return abs(term.weight * term.scaling) * term.left.shape[1] * largest[0] * largest[1]


def _change(name: str, tensor: torch.Tensor, terms: Sequence[LowRankTerm], numerics: str) -> Change:
    """Return the sum of the terms, on the tensor's device."""
    device = tensor.device
    if numerics == "exact":
        moved = [replace(term, left=term.left.to(device), right=term.right.to(device)) for term in terms]
        return ExactTerms(tuple(moved))
    try:
        factors = stacked(terms)
        matrix = tensor.detach().view(tensor.shape[0], -1) if tensor.dim() > 2 else tensor
        fast.check(matrix, factors)
    except IncompatibleError as error:
        raise IncompatibleError(f"{name}: {error.message}", 'attach with numerics="exact"') from error
    return factors.to(device)


def _in_memory(item: Contribution) -> Contribution:
    """Return the contribution with its tensors loaded: the files that they are read from need not stay."""
    return replace(item, bound=replace(item.bound, update=_loaded(item.update)))


def _loaded(value: Any) -> Any:
    """Return an update, or what one is made of, with its tensors in memory."""
    if hasattr(value, "read_bytes"):
        return MemoryTensor(value.spec, value.load())
    if isinstance(value, tuple):
        return tuple(map(_loaded, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _loaded(getattr(value, each.name)) for each in fields(value)})
    return value
