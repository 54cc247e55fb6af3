"""Writes low-rank updates as a PEFT adapter, `adapter_config.json` and `adapter_model.safetensors`, tensor by tensor.

Whole tensors (heads, norms, biases, resized embeddings) go with it the way PEFT reads them back. What is written is
read by every PEFT since 0.10; keys and configuration as PEFT 0.21.2 writes them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from loramgr.errors import IncompatibleError
from loramgr.formats.folder import CONFIGURATION
from loramgr.formats.peft_keys import PREFIX
from loramgr.tensorfile import Data, TensorSpec, encode_header

if TYPE_CHECKING:
    import torch

__all__ = [
    "WEIGHTS",
    "Origins",
    "WrittenFactors",
    "WrittenTensor",
    "alpha_of",
    "configuration",
    "factor_bytes",
    "key_of",
    "patterned",
    "write_peft",
]

WEIGHTS = "adapter_model.safetensors"
_Value = TypeVar("_Value", int, float)


@dataclass(frozen=True, slots=True)
class WrittenFactors:
    """The low-rank update of one module: lora_B @ lora_A times `scaling`.

    `kind` is linear, embedding or conv; `shape_A` and `shape_B` are those of the tensors in the file, with the kernel
    for a convolution, (r, vocabulary) and (dim, r) for an embedding; `make` returns lora_A and lora_B of these shapes
    and of the dtype, contiguous on the CPU, when their turn comes. `fan_in_fan_out` as in PEFT's configuration.
    """

    kind: str
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    dtype: str
    make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    scaling: float = 1.0
    fan_in_fan_out: bool = False

    @property
    def rank(self) -> int:
        """The rank r of the two tensors."""
        return self.shape_A[0]


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """A whole tensor that takes a parameter's place; `make` returns its bytes when its turn comes."""

    spec: TensorSpec
    make: Callable[[], Data]


@dataclass(frozen=True, slots=True)
class Origins:
    """What an adapter says of where it comes from; None where nothing is known.

    `target_modules` None lists every module by its whole name. With `keeps_ties` names that the base ties stay tied.
    """

    base_name: str | None = None
    base_digest: str | None = None
    task_type: str | None = None
    target_modules: Sequence[str] | None = None
    keeps_ties: bool = False


def write_peft(
    folder: Path,
    factors: Mapping[str, WrittenFactors],
    tensors: Sequence[WrittenTensor],
    origins: Origins,
) -> None:
    """Write the adapter into an empty folder; `factors` by the full name of their module, no two tensors held at once.

    Of a module that has a whole tensor other than its bias PEFT expects all parameters. Raises IncompatibleError,
    naming it, for a tensor that PEFT could not read back, and where there is nothing to write.
    """
    if not factors and not tensors:
        raise IncompatibleError("there is nothing to write: no module and no tensor is left")
    placed = [(key_of(each.spec.name, factors), each) for each in tensors]
    (folder / CONFIGURATION).write_text(
        json.dumps(configuration(factors, tensors, origins), indent=2, sort_keys=True) + "\n"
    )
    metadata = {"format": "pt"} | ({} if origins.base_digest is None else {"base_digest": origins.base_digest})
    pairs = {name: _specs(name, each) for name, each in factors.items()}
    specs = [spec for pair in pairs.values() for spec in pair]
    specs += [TensorSpec(key, each.spec.dtype, each.spec.shape) for key, each in placed]
    with (folder / WEIGHTS).open("wb") as file:
        file.write(encode_header(specs, metadata))
        for name, each in factors.items():
            for data in factor_bytes(each, pairs[name]):
                file.write(data)
        for _, tensor in placed:
            file.write(tensor.make())


def _specs(module: str, factors: WrittenFactors) -> tuple[TensorSpec, TensorSpec]:
    ends = ("lora_embedding_A", "lora_embedding_B")
    if factors.kind != "embedding":
        ends = ("lora_A.weight", "lora_B.weight")
    shapes = (factors.shape_A, factors.shape_B)
    first, second = (
        TensorSpec(f"{PREFIX}{module}.{end}", factors.dtype, shape) for end, shape in zip(ends, shapes, strict=True)
    )
    return first, second


def factor_bytes(factors: WrittenFactors, specs: Sequence[TensorSpec]) -> Iterator[Data]:
    """Make the factors and yield the bytes of each; the specs are what they were announced as in the file."""
    from loramgr.tensors import as_bytes, torch_dtype

    for tensor, spec in zip(factors.make(), specs, strict=True):
        if tuple(tensor.shape) != spec.shape or tensor.dtype != torch_dtype(spec.dtype):
            raise ValueError(f"{spec.name} was made as {tuple(tensor.shape)} {tensor.dtype}")
        yield as_bytes(tensor)


def key_of(name: str, factors: Mapping[str, WrittenFactors]) -> str:
    """Return the name in the file of a tensor that replaces a parameter."""
    module, _, parameter = name.rpartition(".")
    if not module:
        raise IncompatibleError(f"{name}: PEFT saves parameters of modules only, and this one is the model's own")
    if module not in factors:
        return f"{PREFIX}{name}"
    if parameter != "bias":
        raise IncompatibleError(f"{name}: it cannot be replaced as a whole and have low-rank factors too")
    return f"{PREFIX}{module}.base_layer.{parameter}"


def configuration(
    factors: Mapping[str, WrittenFactors], tensors: Sequence[WrittenTensor], origins: Origins
) -> dict[str, Any]:
    """Return adapter_config.json as its keys and values."""
    saved, biases = _whole_modules([each.spec.name for each in tensors], factors)
    listed = origins.target_modules if origins.target_modules is not None else sorted(factors)
    return {
        **patterned(factors),
        "base_model_name_or_path": origins.base_name,
        "bias": "none" if not biases else "lora_only" if biases <= factors.keys() else "all",
        "fan_in_fan_out": any(each.fan_in_fan_out for each in factors.values()),
        "inference_mode": True,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "target_modules": sorted(listed),
        "task_type": origins.task_type,
        **({"ensure_weight_tying": True} if origins.keeps_ties else {}),
        "use_dora": False,
    }


class Scaled(Protocol):
    """A low-rank update as far as a configuration tells of it."""

    @property
    def rank(self) -> int:
        """Its rank."""

    @property
    def scaling(self) -> float:
        """What its product is multiplied with."""


def patterned(factors: Mapping[str, Scaled]) -> dict[str, Any]:
    """Return the fields of a configuration that say which rank and scaling every module has; raises as `alpha_of`."""
    alphas = {name: alpha_of(each.scaling, each.rank) for name, each in factors.items()}
    rank, alpha = _commonest([each.rank for each in factors.values()], 1), _commonest([*alphas.values()], 1.0)
    return {
        "alpha_pattern": {_pattern(name, factors): each for name, each in alphas.items() if each != alpha},
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "r": rank,
        "rank_pattern": {_pattern(name, factors): each.rank for name, each in factors.items() if each.rank != rank},
        "use_rslora": False,
    }


def _whole_modules(names: Sequence[str], factors: Mapping[str, WrittenFactors]) -> tuple[set[str], set[str]]:
    """Return the modules of replaced tensors that are saved whole, and those of which only the bias is replaced."""
    parameters: dict[str, set[str]] = {}
    for name in names:
        module, _, parameter = name.rpartition(".")
        parameters.setdefault(module, set()).add(parameter)
    biases = {module for module, found in parameters.items() if module in factors or found == {"bias"}}
    return parameters.keys() - biases, biases


def alpha_of(scaling: float, rank: int) -> float:
    """Return the alpha whose quotient by the rank is the scaling, bit for bit.

    Raises IncompatibleError for the few scalings that no quotient gives.
    """
    product = scaling * rank
    for alpha in (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf)):
        if alpha / rank == scaling:
            return alpha
    raise IncompatibleError(f"no alpha divided by the rank {rank} is the scaling {scaling!r}")


def _commonest(values: Sequence[_Value], otherwise: _Value) -> _Value:
    return Counter(values).most_common(1)[0][0] if values else otherwise


def _pattern(module: str, modules: Iterable[str]) -> str:
    """Return the module's name as a key of a pattern: PEFT before 0.14 compares names, later ones match expressions.

    A key also fits the modules whose names end with it after a dot; where there are such, it is tied to the beginning.
    """
    key = module if re.fullmatch(r"[\w.]*", module) else re.escape(module)
    return f"^{key}" if any(other.endswith(f".{module}") for other in modules) else key
