"""How a fine-tune differs from its base: what every tensor of it becomes in an adapter. Reads headers and digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from loramgr.adapter import LowRankKind
from loramgr.checkpoints.alignment import Alignment, align
from loramgr.checkpoints.families import CONV1D_MODULES, CONV1D_TYPES, is_known_type
from loramgr.checkpoints.shapes import is_resizable, refuse_quantized
from loramgr.digests import TensorDigest
from loramgr.errors import IncompatibleError, IntegrityError
from loramgr.tensorfile import FLOAT_DTYPES, Data, TensorSpec, TensorView
from loramgr.workspace.sources import OpenBase

__all__ = ["Changed", "Comparison", "compare", "read_checked"]

# what is a table or a vector to a model although it is stored as a matrix, by the last part of its module's name
_TABLE = re.compile(r"embed|norm|^(wte|wpe|shared|relative_attention_bias)$")
_EXPERTS = re.compile(r"moe|expert")
_CONVOLUTIONS = range(3, 6)  # dimensions of (out, in, kernel…)
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


@dataclass(frozen=True, slots=True)
class Changed:
    """A tensor of the fine-tune that is not the base's.

    `source` is the base's tensor, None where it has none. `kind` is what its factors would be, None for a tensor that
    is kept whole; `transposed` says that a matrix is stored as (in, out).
    """

    name: str
    view: TensorView
    source: str | None
    kind: LowRankKind | None = None
    transposed: bool = False

    @property
    def module(self) -> str:
        """The module whose parameter it is."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A fine-tune beside its base.

    `alignment` pairs the tensors of the fine-tune's files; `changed` are those that differ, by name; `left_out` are
    names of tensors that differ and that no adapter can hold (integers). `keeps_ties` says that what the base ties
    changed, and that the fine-tune has no tensor of its own for such a name; `task_type` is what its class is for, as
    PEFT spells it.
    """

    base: OpenBase
    finetuned: OpenBase
    alignment: Alignment
    changed: tuple[Changed, ...]
    left_out: tuple[str, ...]
    keeps_ties: bool
    task_type: str | None


def compare(base: OpenBase, finetuned: OpenBase, *, exact: bool) -> Comparison:
    """Compare a fine-tune with its base; a tensor that is the same by its digest is not read.

    Raises IncompatibleError for quantized models, for another architecture, and, naming it, for a changed tensor that
    an adapter cannot hold, unless `exact` says that it is kept elsewhere.
    """
    for each in (base, finetuned):
        _refuse_quantized(each)
    views = {**finetuned.checkpoint.tensors, **_tied_here(finetuned)}
    specs = {name: view.spec for name, view in views.items()}
    alignment = align(specs, _specs(base), base.ties, finetuned.source)
    real = finetuned.checkpoint.tensors.keys()
    changed, left_out = list[Changed](), list[str]()
    for name, view in sorted(views.items()):
        target = alignment.pairs.get(name)
        if name not in real and target not in base.checkpoint.tensors:
            continue  # tied in both models, or of a head that the base does not have
        source = alignment.sources.get(name)
        if source is not None and _is_same(finetuned.tensors[view.spec.name], base.tensors[source]):
            continue
        if _is_float(view.spec.dtype) and (source is None or _is_float(base.tensors[source].dtype)):
            changed.append(_changed(name, view, source, (base, finetuned)))
        else:
            left_out.append(name)
            _check_left_out(name, view, finetuned, new=source is None, exact=exact)
    keeps = _keeps_ties(base, {alignment.pairs[name] for name in alignment.pairs.keys() & real}, changed)
    return Comparison(base, finetuned, alignment, tuple(changed), tuple(left_out), keeps, _task_type(finetuned))


def read_checked(model: OpenBase, name: str) -> Data:
    """Return the bytes of a tensor of the model; IntegrityError when they are not those that its digest names."""
    data = model.checkpoint.tensors[name].read_bytes()
    if hashlib.sha256(data).hexdigest() != model.tensors[name].sha256:
        raise IntegrityError(
            f"{name}: the bytes in {model.source} are not those that {model.name or model.digest} has",
            f"loramgr base verify {model.name or model.source}",
        )
    return data


def _specs(model: OpenBase) -> dict[str, TensorSpec]:
    return {name: view.spec for name, view in model.checkpoint.tensors.items()}


def _refuse_quantized(model: OpenBase) -> None:
    try:
        refuse_quantized(_specs(model), model.checkpoint.config)
    except IncompatibleError as error:
        message = error.message.removeprefix("the base is quantized: ")
        raise IncompatibleError(
            f"{model.source} is quantized: {message}", "take the unquantized model that it was made from"
        ) from error


def _tied_here(finetuned: OpenBase) -> dict[str, TensorView]:
    """Return the tensors that the fine-tune has under further names, which its files leave out."""
    tensors = finetuned.checkpoint.tensors
    groups = [group for group in finetuned.ties if group.known and group.source in tensors]
    return {name: tensors[group.source] for group in groups for name in group.tied if name not in tensors}


def _is_same(one: TensorDigest, other: TensorDigest) -> bool:
    return one._replace(name=other.name) == other


def _is_float(dtype: str) -> bool:
    return dtype in FLOAT_DTYPES


def _check_left_out(name: str, view: TensorView, finetuned: OpenBase, *, new: bool, exact: bool) -> None:
    if not (new or exact):
        raise IncompatibleError(
            f"{name} is {view.spec.dtype} in {finetuned.source} and not the base's: an adapter holds plain floats only",
            "--exact keeps it in the remainder",
        )


def _changed(name: str, view: TensorView, source: str | None, models: tuple[OpenBase, OpenBase]) -> Changed:
    """Say what a tensor becomes: factors where it is a layer's matrix or kernel of the base's shape."""
    shape = view.spec.shape
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if source is None or models[0].tensors[source].shape != shape or not name.endswith(".weight"):
        return Changed(name, view, source)
    if is_resizable(name) or is_resizable(source) or _TABLE.search(leaf.lower()):
        return Changed(name, view, source)
    if len(shape) == 2:
        named_so = leaf in CONV1D_MODULES
        types = [kind for model in models if is_known_type(kind := (model.checkpoint.config or {}).get("model_type"))]
        return Changed(name, view, source, "linear", named_so and (not types or types[0] in CONV1D_TYPES))
    # one input channel is a depthwise kernel, whose groups no shape tells, or too small to be worth factors
    if len(shape) in _CONVOLUTIONS and shape[1] > 1 and not _EXPERTS.search(name):
        return Changed(name, view, source, "conv")
    return Changed(name, view, source)


def _keeps_ties(base: OpenBase, own: Collection[str], changed: Sequence[Changed]) -> bool:
    """Say whether tensors that the base ties changed, and none of those names is the fine-tune's `own`."""
    tied = {name for group in base.ties for name in group.tied} - base.checkpoint.tensors.keys()
    sources = {group.source for group in base.ties if not tied.isdisjoint(group.tied)}
    return tied.isdisjoint(own) and any(each.source in sources for each in changed)


def _task_type(finetuned: OpenBase) -> str | None:
    """Return what the fine-tune's class is for, None where its configuration does not say."""
    architectures = (finetuned.checkpoint.config or {}).get("architectures")
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return next((task for ending, task in _TASKS.items() if named.endswith(ending)), None)
