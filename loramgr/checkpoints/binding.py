"""An adapter's updates, each bound to the tensor of a base's file that it changes or adds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from loramgr.adapter import Adapter, Experts, LowRank, Orthogonal, Replacement, Rows, Scale, Shift, Update, whole_tensor
from loramgr.checkpoints.families import (
    TASKS_WITHOUT_VOCABULARY_HEAD,
    TieGroup,
    is_input_embedding,
    is_output_head,
    is_vocabulary,
)
from loramgr.checkpoints.fitting import turned_experts
from loramgr.checkpoints.mixtures import Mixture, mixtures, parted
from loramgr.checkpoints.prefixes import Renaming, find_renaming, fitting_renamings
from loramgr.checkpoints.shapes import BoundKind, Layouts, Pair, check_fits, layered, refuse_quantized
from loramgr.checkpoints.tying import keep_tied
from loramgr.errors import IncompatibleError
from loramgr.tensorfile import FLOAT_DTYPES, TensorSpec

__all__ = ["Binding", "BoundUpdate", "bind"]


_KINDS: tuple[tuple[type[Update], BoundKind], ...] = (
    (Shift, "bias"),
    (Rows, "tokens"),
    (Replacement, "saved"),
    (Experts, "experts"),
)


@dataclass(frozen=True, slots=True)
class BoundUpdate:
    """An update and the tensor of the base's file that it is for.

    `name` is the parameter's name in the model that was trained, `target` its name in the file. With `transposed` the
    tensor is stored as the transpose of lora_B lora_A: (in, out) of a Conv1D, (vocabulary, dim) of an embedding.
    `new` targets are not in the base. `tied_source` is the tensor whose bytes a target has that the file leaves out
    because it is tied, None for every other target.
    """

    name: str
    target: str
    update: Update
    kind: BoundKind
    transposed: bool = False
    new: bool = False
    tied_source: str | None = None


@dataclass(frozen=True, slots=True)
class Binding:
    """All updates of an adapter, sorted by target; `vocab_size` is None unless the adapter changes it."""

    updates: tuple[BoundUpdate, ...]
    vocab_size: int | None = None

    @property
    def added(self) -> tuple[str, ...]:
        """Names of the tensors that the base lacks and does not tie."""
        return tuple(bound.target for bound in self.updates if bound.new)


@dataclass(frozen=True, slots=True)
class _Base:
    """The base as binding sees it: tensors in the file, and names that it leaves out: tied ones, and the model's own.

    `mixtures` are tensors that the file has in pieces, `renamed` the model's names of others that the file has.
    """

    specs: Mapping[str, TensorSpec]
    tied: dict[str, TieGroup]
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def all_specs(self) -> dict[str, TensorSpec]:
        """The tensors by every name that they have."""
        tied = {name: replace(self.specs[group.source], name=name) for name, group in self.tied.items()}
        return {**self.specs, **tied}

    def spec(self, name: str) -> TensorSpec | None:
        """Return the tensor of that name, a tied one's by its source; None where the base has none."""
        if name in self.specs or name in self.renamed:
            return self.specs[self.renamed.get(name, name)]
        if name in self.mixtures:
            return replace(self.mixtures[name].spec, name=name)
        group = self.tied.get(name)
        return None if group is None else replace(self.specs[group.source], name=name)


def bind(
    adapter: Adapter,
    specs: Mapping[str, TensorSpec],
    ties: Sequence[TieGroup],
    config: Mapping[str, Any] | None,
    *,
    dtypes: Collection[str] = FLOAT_DTYPES,
) -> Binding:
    """Bind every update of the adapter to a tensor of the base and check that it fits.

    `specs` are the tensors of the base's file, `ties` the names that are one tensor (`families.tied_groups`),
    `config` is config.json, None without one; `dtypes` count as floats. Nothing is read but headers, except where a
    tied name has an update of its own although ties are to be kept. Names of a format that has its own become the
    base's. Raises IncompatibleError, naming the tensor, for names that cannot be resolved, shapes that do not fit, a
    quantized base, or tied names that nobody can know.
    """
    if adapter.obstacle is not None:
        raise IncompatibleError(f"the adapter cannot be merged: {adapter.obstacle}", "it is kept and exported as it is")
    refuse_quantized(specs, config)
    tied = {name: group for group in ties for name in group.tied if name not in specs}
    base = _Base(specs, tied, *mixtures(specs))
    adapter = adapter.resolved(base.all_specs, config)
    renaming = _renaming(adapter.updates, base)
    targets = {name: _target(name, renaming, base) for name in sorted(adapter.updates)}
    lacking = {
        name for name, update in adapter.updates.items() if _is_optional(update) and not base.spec(targets[name])
    }
    targets = {name: target for name, target in targets.items() if name not in lacking}
    pairs = {
        name: Pair(adapter.updates[name], spec)
        for name, target in targets.items()
        if (spec := base.spec(target)) is not None
    }
    pairs = turned_experts(pairs, config)
    for pair in pairs.values():
        check_fits(pair, dtypes)
    layouts = Layouts.read(pairs.values(), config)
    bound = [
        each
        for name, target in targets.items()
        for each in (
            _bind_existing(name, pairs[name], layouts, base)
            if name in pairs
            else [_bind_new(name, target, adapter.updates[name], layouts, base)]
        )
    ]
    if adapter.keeps_ties:
        bound = keep_tied(bound)
    bound = [replace(each, kind="bias") if _is_trained_bias(each.name, adapter.updates) else each for each in bound]
    bound.sort(key=lambda update: update.target)
    _refuse_unclear(bound, ties)
    return Binding(tuple(bound), _vocabulary(bound, base, adapter))


def _target(name: str, renaming: Renaming, base: _Base) -> str:
    """Return the name in the file; a name that the change of prefix is not for keeps its own."""
    renamed = renaming.apply(name)
    if renamed is None or (base.spec(renamed) is None and base.spec(name) is not None):
        return name
    return renamed


def _renaming(updates: Mapping[str, Update], base: _Base) -> Renaming:
    """Resolve what must exist in the base; lacking that, what usually does."""
    known = base.specs.keys() | base.tied.keys() | base.mixtures.keys() | base.renamed.keys()
    required = {name for name, update in updates.items() if _must_exist(name, update, updates)}
    carried = {name for name, update in updates.items() if not isinstance(update, Replacement)}
    # a head stands outside of the model that carries the prefix, so it says nothing about the prefix
    heads = {name for name in required if is_output_head(name) and name in known}
    if required or carried:
        return find_renaming(required - heads or required or carried, known)
    return _renaming_of_saved(sorted(updates), known)


def _renaming_of_saved(names: list[str], known: Collection[str]) -> Renaming:
    """Resolve an adapter that only replaces tensors: by those that are in the base, else it only adds."""
    found = {renaming for name in names for renaming in fitting_renamings([name], known)}
    if len(found) > 1:
        raise IncompatibleError(f"{', '.join(names)}: several changes of prefix lead to tensors of the base: ambiguous")
    return found.pop() if found else Renaming()


def _must_exist(name: str, update: Update, updates: Mapping[str, Update]) -> bool:
    if isinstance(update, Replacement):
        return _is_trained_bias(name, updates)
    return whole_tensor(update) is None and not _is_optional(update)


def _is_optional(update: Update) -> bool:
    return isinstance(update, Scale) and update.optional


def _is_trained_bias(name: str, updates: Mapping[str, Update]) -> bool:
    """Say whether the name is a bias that `bias="all"` replaced, rather than part of a module that was saved whole."""
    if not (name.endswith(".bias") and isinstance(updates[name], Replacement)):
        return False
    return not isinstance(updates.get(name.removesuffix("bias") + "weight"), Replacement)


def _bind_existing(name: str, pair: Pair, layouts: Layouts, base: _Base) -> Iterator[BoundUpdate]:
    """Yield the update, or its parts for the tensors that the file has in its place, by these tensors' names."""
    target, update = pair.spec.name, pair.update
    if target in base.mixtures:
        kind = _kind(update, pair.spec, layouts)[0]
        for spec, part in parted(update, base.mixtures[target]):
            yield BoundUpdate(spec.name, spec.name, part, kind)
        return
    kind, transposed = _kind(update, pair.spec, layouts)
    group = base.tied.get(target)
    tied_source = None if group is None else group.source
    yield BoundUpdate(name, target, update, kind, transposed, tied_source=tied_source)


def _bind_new(name: str, target: str, update: Update, layouts: Layouts, base: _Base) -> BoundUpdate:
    """Bind an update that brings its own tensor: a head that the base lacks."""
    tensor = whole_tensor(update)
    if tensor is None:
        raise IncompatibleError(f"the base has no tensor {target} that the adapter updates")
    other = next((known for known in sorted(base.specs) if is_output_head(known)), None)
    if is_output_head(target) and other is not None:
        raise IncompatibleError(f"the adapter brings the output head {name}, which the base calls {other}")
    spec = replace(tensor.spec, name=target)
    check_fits(Pair(update, spec))
    kind, transposed = _kind(update, spec, layouts)
    return BoundUpdate(name, target, update, kind, transposed, new=True)


def _kind(update: Update, spec: TensorSpec, layouts: Layouts) -> tuple[BoundKind, bool]:
    """Return what the update is to a person, and whether its product is transposed."""
    for kind, name in _KINDS:
        if isinstance(update, kind):
            return name, False
    if isinstance(update, LowRank) and update.kind == "embedding":
        return "embedding", True
    if len(spec.shape) != 2:
        return _kind_of_other(spec), False
    is_embedding = isinstance(update, Orthogonal) and update.is_embedding
    if is_embedding or (is_input_embedding(spec.name) and not isinstance(update, LowRank)):
        return "embedding", False
    layer = layered(update)
    transposed = layer is not None and layouts.is_transposed(layer, spec)
    return "conv1d" if transposed else "linear", transposed


def _kind_of_other(spec: TensorSpec) -> BoundKind:
    """Return what a tensor is that is no matrix: a bias, another vector, or the kernel of a convolution."""
    if len(spec.shape) < 2:
        return "bias" if spec.name.endswith(".bias") else "vector"
    kernels: dict[int, BoundKind] = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
    return kernels.get(len(spec.shape), "conv2d")


def _refuse_unclear(bound: Sequence[BoundUpdate], ties: Sequence[TieGroup]) -> None:
    """Refuse two updates of one tensor, and an update of a tensor whose tied names nobody can know."""
    for first, second in pairwise(bound):
        if first.target == second.target:
            raise IncompatibleError(f"{first.name} and {second.name} both update {first.target} of the base")
    guessed = {group.source for group in ties if not group.known}
    for update in bound:
        if not guessed.isdisjoint({update.target, update.tied_source}):
            raise IncompatibleError(
                f"{update.target}: the base may tie its output head to its embeddings, and no config.json says",
                "set tie_word_embeddings to false in the base's config.json if it has no tied head",
            )


def _vocabulary(bound: Sequence[BoundUpdate], base: _Base, adapter: Adapter) -> int | None:
    """Return the new number of rows of the vocabulary's tensors; IncompatibleError when some would keep the old one."""
    rows = {update.target: _rows(update) for update in bound if is_vocabulary(update.target)}
    resized = {
        target: (spec.shape[0], new)
        for target, new in rows.items()
        if new is not None and (spec := base.spec(target)) is not None and new != spec.shape[0]
    }
    if not resized:
        return None
    old, new = next(iter(resized.values()))
    heads_kept = adapter.task_type not in TASKS_WITHOUT_VOCABULARY_HEAD
    for name in sorted([*base.specs, *base.tied]):
        spec = base.spec(name)
        follows = adapter.keeps_ties and name in base.tied
        counts = is_vocabulary(name) and (heads_kept or is_input_embedding(name)) and not follows
        if counts and spec is not None and spec.shape[:1] == (old,) and rows.get(name) != new:
            raise IncompatibleError(
                f"{name} keeps {old} rows while the adapter brings a vocabulary of {new} in {next(iter(resized))}",
                "save the adapter with its output head, or with ensure_weight_tying",
            )
    return new


def _rows(bound: BoundUpdate) -> int | None:
    """Return the rows of the tensor that takes the base's place, None where none does."""
    update = bound.update
    tensor = whole_tensor(update)
    return None if tensor is None else tensor.spec.shape[0]
