"""The plan of a merge: every tensor of the output, what it is made from, and what the configuration must say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramgr.checkpoints.config import ConfigChange
from loramgr.errors import IncompatibleError, UsageError
from loramgr.tensorfile import FLOAT_DTYPES, TensorSpec
from loramgr.workspace.contributions import Contribution, Pick, collect, part_ties, whole_tensor
from loramgr.workspace.options import MergeOptions
from loramgr.workspace.sources import OpenBase

__all__ = ["MergePlan", "Target", "copies", "parse_dtype", "plan_merge"]

_SPELLINGS = {
    "F64": ("f64", "fp64", "float64", "double"),
    "F32": ("f32", "fp32", "float32", "float"),
    "F16": ("f16", "fp16", "float16", "half"),
    "BF16": ("bf16", "bfloat16"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the output.

    `source` is the tensor of the base whose bytes it starts from, None for one that the base lacks; without
    contributions it is those bytes. `replaces_shape` says that the base's tensor has another shape.
    """

    spec: TensorSpec
    source: str | None
    contributions: tuple[Contribution, ...] = ()
    replaces_shape: bool = False


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What a merge will write.

    `targets` are all tensors of the output by name, `change` what its configuration must say, `notes` what the person
    should know.
    """

    base: OpenBase
    picks: tuple[Pick, ...]
    targets: dict[str, Target]
    change: ConfigChange
    notes: tuple[str, ...]

    @property
    def added(self) -> list[str]:
        """Tensors that the base's files lack."""
        return sorted(name for name in self.targets if name not in self.base.checkpoint.tensors)

    @property
    def touched(self) -> list[str]:
        """Tensors that an adapter contributes to."""
        return sorted(name for name, target in self.targets.items() if target.contributions)

    @property
    def modules_merged(self) -> int:
        """Number of modules with an update that is computed rather than copied."""
        computed = {
            item.bound.target
            for target in self.targets.values()
            for item in target.contributions
            if item.bound.kind not in ("saved", "bias")
        }
        return len(computed)


def parse_dtype(text: str | None) -> str | None:
    """Return safetensors' spelling of a floating-point dtype, None for None; UsageError for any other."""
    if text is None:
        return None
    for name, spellings in _SPELLINGS.items():
        if text.lower().removeprefix("torch.") in spellings:
            return name
    raise UsageError(f"{text!r} is not a dtype to store weights in", "--dtype float32, bfloat16, float16 or float64")


def plan_merge(base: OpenBase, picks: Sequence[Pick], options: MergeOptions) -> MergePlan:
    """Plan the merge of the picked adapters into the base; headers are read, no weights.

    Raises IncompatibleError for adapters of another base, or that cannot be combined.
    """
    if not options.force:
        _check_bases(base, picks)
    _check_choice(picks, options.replacements_of)
    contributions = collect(base, picks, options.replacements_of, keep_tied=options.keep_tied)
    parted = part_ties(base, contributions, picks, keep_tied=options.keep_tied)
    dtype = parse_dtype(options.dtype)
    targets = copies(base, parted, dtype)
    for name, items in contributions.items():
        targets[name] = _target(base, name, items, parted, dtype)
    change = ConfigChange(
        task_type=_task_type(picks, contributions),
        heads=_heads(contributions),
        vocab_size=_vocabulary(picks),
        dtype=dtype,
        untied=bool(parted),
    )
    return MergePlan(base, tuple(picks), targets, change, tuple(_notes(targets, parted)))


def _check_bases(base: OpenBase, picks: Sequence[Pick]) -> None:
    for pick in picks:
        own = pick.version.base
        if own is not None and own.digest != base.digest:
            named = own.name or own.digest
            raise IncompatibleError(
                f"{pick.ref} was trained on the base {named}, and this is {base.name or base.source}, {base.digest}",
                "merge it into its own base, or --force where you know better",
            )


def _check_choice(picks: Sequence[Pick], chosen: str | None) -> None:
    if chosen is not None and not any(pick.means(chosen) for pick in picks):
        raise UsageError(f"--replacements-of {chosen!r} is none of the adapters", f"--replacements-of {picks[0].ref}")


def copies(base: OpenBase, parted: dict[str, str], dtype: str | None) -> dict[str, Target]:
    """Return every tensor of the base, and every name that parts from it, as they are."""
    sources = {**{name: name for name in base.checkpoint.tensors}, **parted}
    return {name: Target(_stored(base, name, source, dtype), source) for name, source in sources.items()}


def _stored(base: OpenBase, name: str, source: str, dtype: str | None) -> TensorSpec:
    spec = base.checkpoint.tensors[source].spec
    return TensorSpec(name, dtype if dtype and spec.dtype in FLOAT_DTYPES else spec.dtype, spec.shape)


def _target(
    base: OpenBase, name: str, items: Sequence[Contribution], parted: dict[str, str], dtype: str | None
) -> Target:
    source = parted.get(name, name if name in base.checkpoint.tensors else None)
    wholes = [view.spec for item in items if (view := whole_tensor(item.update)) is not None]
    if source is None:
        spec = wholes[0]
        return Target(TensorSpec(name, dtype or spec.dtype, spec.shape), None, tuple(items))
    stored = _stored(base, name, source, dtype)
    resized = next((spec.shape for spec in wholes if spec.shape != stored.shape), None)
    if resized is None:
        return Target(stored, source, tuple(items))
    _check_resized(name, items, resized)
    return Target(TensorSpec(name, stored.dtype, resized), source, tuple(items), replaces_shape=True)


def _check_resized(name: str, items: Sequence[Contribution], shape: tuple[int, ...]) -> None:
    """Refuse to weight a tensor of another shape than the base's, or to mix it with updates made for the old one."""
    brings = [item for item in items if whole_tensor(item.update) is not None]
    if len(items) > 1:
        refs = " and ".join(item.pick.ref for item in items)
        raise IncompatibleError(f"{name}: {refs} cannot be combined, one of them changes its shape to {list(shape)}")
    if brings[0].weight != 1:
        raise IncompatibleError(
            f"{name}: {brings[0].pick.ref} changes its shape to {list(shape)}, which has no part of {brings[0].weight}",
            "merge it with weight 1",
        )


def _heads(contributions: dict[str, list[Contribution]]) -> dict[str, tuple[int, ...]]:
    return {
        name: view.spec.shape
        for name, items in contributions.items()
        for item in items
        if (view := whole_tensor(item.update)) is not None
    }


def _task_type(picks: Sequence[Pick], contributions: dict[str, list[Contribution]]) -> str | None:
    """Return the task of the adapter that brings whole tensors, else the first one's that has one."""
    bringing = [
        item.pick for items in contributions.values() for item in items if whole_tensor(item.update) is not None
    ]
    return next((pick.adapter.task_type for pick in [*bringing, *picks] if pick.adapter.task_type), None)


def _vocabulary(picks: Sequence[Pick]) -> int | None:
    sizes: dict[int, str] = {pick.binding.vocab_size: pick.ref for pick in picks if pick.binding.vocab_size is not None}
    if len(sizes) > 1:
        said = " and ".join(f"{ref} ({size})" for size, ref in sizes.items())
        raise IncompatibleError(f"the adapters bring vocabularies of different sizes: {said}")
    return next(iter(sizes), None)


def _notes(targets: dict[str, Target], parted: dict[str, str]) -> list[str]:
    notes = []
    if parted:
        names = ", ".join(f"{name} (was {source})" for name, source in sorted(parted.items()))
        notes.append(f"untied, since the adapter changes only one of two names: {names}")
    for name, target in sorted(targets.items()):
        ignored = [item for item in target.contributions if target.source is None and item.weight != 1]
        notes += [f"{name}: the base lacks it, so it is {item.pick.ref}'s whatever the weight" for item in ignored]
    return notes
