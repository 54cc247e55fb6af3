"""Whether an update fits the tensor it is for, and how that tensor is laid out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from loramgr.adapter import (
    Butterfly,
    Decomposed,
    LowRank,
    Orthogonal,
    Replacement,
    Rows,
    Scale,
    Shift,
    Update,
    whole_tensor,
)
from loramgr.checkpoints.dense_shapes import is_shaped_for
from loramgr.checkpoints.families import CONV1D_MODULES, CONV1D_TYPES, is_known_type, is_vocabulary
from loramgr.errors import IncompatibleError
from loramgr.tensorfile import FLOAT_DTYPES, TensorSpec, TensorView

__all__ = ["BoundKind", "Layouts", "Pair", "check_fits", "is_replaceable", "is_resizable", "refuse_quantized"]

BoundKind = Literal["linear", "conv1d", "embedding", "conv2d", "conv3d", "bias", "saved", "tokens", "experts", "vector"]

_TASK_HEADS = frozenset({"classifier", "score", "qa_outputs"})
_QUANTIZED_SUFFIXES = (".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB", ".scales")


@dataclass(frozen=True, slots=True)
class Pair:
    """An update and the tensor it is for, as it is in the base."""

    update: Update
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Layouts:
    """What decides the layout of a square matrix: model type, and whether the flags of all others came true.

    `trusted` is None when the adapter has no other matrix. PEFT saves one flag, that of the last layer it met: where
    Conv1D layers alone have `explained` it (ViT with GPT-2), it says nothing of a layer that is not named like one.
    """

    model_type: str | None
    trusted: bool | None
    explained: bool = False

    @classmethod
    def read(cls, pairs: Iterable[Pair], config: Mapping[str, Any] | None) -> Layouts:
        """Compare `fan_in_fan_out` with the shapes of the matrices that are not square; the pairs fit."""
        agreements = {
            pair.spec.name: layer.fan_in_fan_out == fits[1]
            for pair in pairs
            if (layer := layered(pair.update)) is not None and len(shape := _shape(pair)) == 2
            for fits in [_fitting(layer, shape)]
            if fits[0] != fits[1]
        }
        model_type = (config or {}).get("model_type")
        return cls(
            model_type if isinstance(model_type, str) else None,
            all(agreements.values()) if agreements else None,
            bool(agreements) and all(_is_named_conv1d(name) for name in agreements),
        )

    def is_transposed(self, update: Layered, spec: TensorSpec) -> bool:
        """Say whether the update's matrix is stored as (in, out); IncompatibleError when nothing tells."""
        straight, turned = _fitting(update, _shape(Pair(update, spec)))
        if straight != turned:
            return turned
        named_so = _is_named_conv1d(spec.name)
        if is_known_type(self.model_type):
            return named_so and self.model_type in CONV1D_TYPES
        misled = self.explained and update.fan_in_fan_out and not named_so
        if (self.trusted and not misled) or (self.trusted is None and update.fan_in_fan_out == named_so):
            return update.fan_in_fan_out
        raise IncompatibleError(
            f"{spec.name}: ambiguous layout: the matrix is square, and nothing says whether it is stored as "
            "(out, in) or (in, out)",
            "give the base a config.json with its model_type",
        )


def _is_named_conv1d(parameter: str) -> bool:
    return parameter.removesuffix(".weight").rpartition(".")[2] in CONV1D_MODULES


Layered = LowRank | Scale | Orthogonal | Butterfly  # what acts on inputs and outputs, and so has to know which is which


def layered(update: Update) -> Layered | None:
    """Return the update, or that within it, where its effect depends on how a matrix is stored; None elsewhere."""
    match update:
        case LowRank():
            return update if update.kind == "linear" else None
        case Scale() | Orthogonal() | Butterfly():
            return update
        case Decomposed():
            return layered(update.inner)
    return None


def features(update: Layered) -> tuple[int | None, int | None]:
    """Return the outputs and inputs that the update's tensors are for, None for what they do not say."""
    match update:
        case LowRank():
            return update.lora_B.spec.shape[0], update.lora_A.spec.shape[1]
        case Scale():
            size = update.vector.spec.elements
            return (size, None) if update.side == "output" else (None, size)
        case Orthogonal():
            blocks = update.vectors.spec.shape[0]
            return None, None if update.repeated else blocks * update.block_size
        case Butterfly():
            return update.scale.spec.elements, update.blocks.spec.shape[1] * update.blocks.spec.shape[2]


def _fitting(update: Layered, shape: tuple[int, ...]) -> tuple[bool, bool]:
    """Say whether a matrix of that shape fits stored as (out, in), and stored as (in, out)."""
    outputs, inputs = features(update)
    block = update.block_size if isinstance(update, Orthogonal) else 1

    def fits(out: int, into: int) -> bool:
        return outputs in (None, out) and inputs in (None, into) and into % block == 0

    return fits(*shape), fits(*shape[::-1])


def refuse_quantized(specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> None:
    """Raise IncompatibleError for a base whose weights are quantized; a float base made from GGUF is none."""
    hint = "merge into the unquantized model that it was made from"
    quantization = (config or {}).get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method", "unknown") != "gguf":
        method = quantization.get("quant_method", "unknown")
        raise IncompatibleError(f"the base is quantized: quantization_config says {method}", hint)
    for name in sorted(specs):
        if name.endswith(_QUANTIZED_SUFFIXES):
            raise IncompatibleError(f"the base is quantized: it has {name}", hint)


def check_fits(pair: Pair, dtypes: Collection[str] = FLOAT_DTYPES) -> None:
    """Raise IncompatibleError, naming the tensor and both shapes, unless the update can be applied to the tensor.

    `dtypes` are those that count as floats; files keep the scales of float8 weights elsewhere.
    """
    update, spec = pair.update, pair.spec
    if spec.dtype not in dtypes:
        raise IncompatibleError(
            f"{spec.name}: the base stores it as {spec.dtype}, a quantized or integer type",
            "merge into the unquantized model that it was made from",
        )
    replacement = whole_tensor(update)
    if replacement is not None:
        _check_replacement(spec, replacement)
    if isinstance(update, LowRank):
        _check_factors(pair, update)
    elif isinstance(update, Shift):
        _require(spec, update.vector.spec.shape == _shape(pair), update.vector)
    elif isinstance(update, Rows):
        _check_rows(pair, update)
    elif (layer := layered(update)) is not None and len(spec.shape) == 2:
        _require(spec, any(_fitting(layer, spec.shape)) and _fits_magnitude(update, layer), *update.views())
    elif not isinstance(update, Replacement):
        _require(spec, is_shaped_for(update, spec.shape), *update.views())


def _shape(pair: Pair) -> tuple[int, ...]:
    """Return the shape that the tensor has once the adapter's own table took its place."""
    table = None if isinstance(pair.update, Replacement) else whole_tensor(pair.update)
    return pair.spec.shape if table is None else table.spec.shape


def _require(spec: TensorSpec, fits: bool, *views: TensorView) -> None:
    if not fits:
        shapes = " and ".join(f"{view.spec.name} {list(view.spec.shape)}" for view in views)
        raise IncompatibleError(
            f"{spec.name} {list(spec.shape)} of the base does not fit the adapter's {shapes}",
            "name the base that the adapter was trained on",
        )


def is_resizable(name: str) -> bool:
    """Say whether the tensor is of the vocabulary or of a task's head, in whose place one of more rows may come."""
    return is_vocabulary(name) or not _TASK_HEADS.isdisjoint(name.split("."))


def is_replaceable(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor of the shape may take the place of the base's."""
    return spec.shape == shape or (
        is_resizable(spec.name) and len(spec.shape) == len(shape) > 0 and spec.shape[1:] == shape[1:]
    )


def _check_replacement(spec: TensorSpec, tensor: TensorView) -> None:
    _require(spec, is_replaceable(spec, tensor.spec.shape), tensor)


def _check_factors(pair: Pair, update: LowRank) -> None:
    shape, a, b = _shape(pair), update.lora_A.spec.shape, update.lora_B.spec.shape
    fits = len(a) >= 2 and len(b) >= 2 and a[0] == b[1]
    if update.kind == "linear":  # also of a kernel that is flattened behind the outputs
        flat = len(shape) > 2 and (shape[0], prod(shape[1:])) == (b[0], a[1])
        fits = fits and (flat or shape in ((b[0], a[1]), (a[1], b[0])))
    elif update.kind == "embedding":
        fits = fits and shape == (a[1], b[0])
    else:
        fits = fits and len(shape) == len(b) and shape == (b[0], *a[1:]) and set(b[2:]) <= {1}
    _require(pair.spec, fits, update.lora_A, update.lora_B)
    if update.magnitude is not None:
        _require(pair.spec, update.magnitude.spec.elements == b[0], update.magnitude)


def _fits_magnitude(update: Update, layer: Layered) -> bool:
    """Say whether the factors multiply, and a magnitude around them has one value for each output, or input."""
    multiply = not isinstance(layer, LowRank) or layer.lora_A.spec.shape[:1] == layer.lora_B.spec.shape[1:]
    if isinstance(update, Decomposed):
        return multiply and update.magnitude.spec.elements == features(layer)[update.by_input]
    return multiply


def _check_rows(pair: Pair, update: Rows) -> None:
    shape = _shape(pair)
    _require(pair.spec, len(shape) == 2 and update.rows.spec.shape == (len(update.indices), shape[1]), update.rows)
    wrong = [index for index in update.indices if not 0 <= index < shape[0]]
    if wrong:
        raise IncompatibleError(f"{pair.spec.name} has {shape[0]} rows, and the adapter replaces row {wrong[0]}")
    if len(set(update.indices)) != len(update.indices):
        raise IncompatibleError(f"{pair.spec.name}: the adapter replaces one row twice")
