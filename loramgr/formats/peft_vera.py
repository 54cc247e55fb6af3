"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): two random projections of all layers, and two vectors of each.

The delta of a layer is (b ⊙ B)(d ⊙ A), with the first rows of B and the first columns of A that the layer needs; how
many columns only the base says. Where the projections were not saved they are drawn again from the configuration's
key, as PEFT 0.21.2 draws them (`tuners/vera/model.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loramgr.adapter import LowRank, Opaque, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields
from loramgr.formats.peft_tuners import TunerModule
from loramgr.formats.resolving import known_name
from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.views import ComputedTensor

if TYPE_CHECKING:
    import torch

__all__ = ["VeraProjections", "read_vera"]

Projections = tuple[TensorView, TensorView]

_NOT_SAVED = "its projections were not saved, and only the base says in which size they are drawn"


@dataclass(frozen=True, slots=True)
class VeraProjections:
    """Gives VeRA's layers their factors by the sizes of a base; `saved` are vera_A and vera_B, None: to be drawn."""

    fields: Fields
    modules: Mapping[str, TunerModule]
    saved: Projections | None

    @property
    def described(self) -> str:
        """What the updates are until then."""
        return "projections of a size that the file does not say"

    @property
    def is_needed(self) -> bool:
        """Whether the projections have to be drawn."""
        return self.saved is None

    def resolve(
        self, updates: Mapping[str, Update], specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> dict[str, Update]:
        """Return the updates with the factors of every layer, under the names that they have.

        A layer that the base lacks keeps the whole of saved projections. Raises IncompatibleError, naming the module,
        where such a one keeps others from being drawn, and for layers in two 16-bit dtypes.
        """
        layers = {name: self._layer(module, specs) for name, module in self.modules.items()}
        found = [each for each in layers.values() if each is not None]
        projections = self.saved or _drawn(self.fields, found)
        others: dict[str, Update] = {
            name: each for name, each in updates.items() if not isinstance(each, LowRank | Opaque)
        }
        flag = self.fields.flag("fan_in_fan_out")
        return others | {
            f"{name}.weight": _update(module, projections, layers[name], flag=flag)
            for name, module in self.modules.items()
        }

    def _layer(self, module: TunerModule, specs: Mapping[str, TensorSpec]) -> TensorSpec | None:
        """Return the base's weight as (out, in), None where it has none that fits and none is needed."""
        name = known_name(f"{module.name}.weight", specs)
        spec = None if name is None else specs[name]
        outputs = _outputs(module)
        if spec is not None and len(spec.shape) == 2 and outputs in spec.shape:
            inputs = spec.shape[1] if spec.shape[0] == outputs else spec.shape[0]
            return TensorSpec(spec.name, spec.dtype, (outputs, inputs))
        if not self.is_needed:
            return None
        there = "has no such layer" if spec is None else f"has it as {spec.shape}, not with {outputs} outputs"
        raise module.refused(f"the base {there}, and VeRA's projections have the size of its largest layer")


def read_vera(
    fields: Fields, modules: Mapping[str, TunerModule], shared: Mapping[str, TensorView]
) -> tuple[dict[str, Update], VeraProjections]:
    """Return the updates as far as they are known without a base, and what completes them.

    Raises IncompatibleError, naming the module, for tensors that do not fit each other, and for a projection that the
    configuration announces and the file lacks.
    """
    rank = fields.rank("r")
    for module in modules.values():
        module.take("vera_lambda_b", (1,))
        d = module.take("vera_lambda_d", (1,))
        if d.spec.elements != rank:
            raise module.refused(f"vera_lambda_d is {d.spec.shape}, the configuration says rank {rank}")
    naming = VeraProjections(fields, modules, _saved(fields, modules, shared))
    if naming.saved is not None:
        return naming.resolve({}, {}, None), naming
    _key(fields)
    kept = [view for module in modules.values() for view in module.tensors.values()]
    return {view.spec.name: Opaque(view, "vera", _NOT_SAVED, rank) for view in kept}, naming


def _saved(fields: Fields, modules: Mapping[str, TunerModule], shared: Mapping[str, TensorView]) -> Projections | None:
    """Return the projections in the file, checked; None where the configuration says that they are not there."""
    announced = fields.content.get("save_projection") is None or fields.flag("save_projection")
    missing = [role for role in ("vera_A", "vera_B") if role not in shared]
    if missing and (announced or shared):
        raise IncompatibleError(
            f"{fields.path}: the file holds no {missing[0]}, one of VeRA's projections",
            "save_projection is false in the configuration of an adapter that was saved without them",
        )
    if missing:
        return None
    a, b = shared["vera_A"].spec.shape, shared["vera_B"].spec.shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
        raise IncompatibleError(f"{fields.path}: vera_A is {a} and vera_B is {b}: they do not multiply")
    if a[0] != fields.rank("r"):
        raise IncompatibleError(f"{fields.path}: vera_A has rank {a[0]}, the configuration says {fields.rank('r')}")
    for module in modules.values():
        if _outputs(module) > b[0]:
            raise module.refused(f"vera_lambda_b has {_outputs(module)} values, and vera_B {b[0]} rows")
    return shared["vera_A"], shared["vera_B"]


def _outputs(module: TunerModule) -> int:
    return module.tensors["vera_lambda_b"].spec.elements


def _update(module: TunerModule, projections: Projections, layer: TensorSpec | None, *, flag: bool) -> LowRank:
    """Return the factors of a layer (out, in), those of every input that the projections have where it is None."""
    first, second = projections
    b, d = module.tensors["vera_lambda_b"], module.tensors["vera_lambda_d"]
    rank, known = first.spec.shape
    outputs, inputs = _outputs(module), known if layer is None else min(layer.shape[1], known)
    lora_A = ComputedTensor(
        TensorSpec(d.spec.name, "F64", (rank, inputs)),
        lambda: d.load().double()[:, None] * first.load()[:, :inputs].double(),
    )
    lora_B = ComputedTensor(
        TensorSpec(b.spec.name, "F64", (outputs, rank)),
        lambda: b.load().double()[:, None] * second.load()[:outputs].double(),
    )
    return LowRank("linear", lora_A, lora_B, rank, float(rank), 1.0, flag, shared=layer is None)


def _key(fields: Fields) -> int:
    """Return the key of the generator, PEFT's default where there is none."""
    key = fields.content.get("projection_prng_key", 0)
    if type(key) is not int or not -(1 << 63) <= key < 1 << 64:
        raise fields.refused("projection_prng_key", "a whole number of 64 bits")
    return key


def _drawn(fields: Fields, layers: list[TensorSpec]) -> Projections:
    """Return the projections for these layers; they take the largest number of inputs, and that of outputs.

    PEFT casts them to the dtype of the layers, from which 16 bits leave their mark.
    """
    rank, key = fields.rank("r"), _key(fields)
    outputs, inputs = (max((spec.shape[side] for spec in layers), default=0) for side in (0, 1))
    halves = sorted({spec.dtype for spec in layers} & {"F16", "BF16"})
    if len(halves) > 1:
        raise IncompatibleError(f"{layers[0].name} and others are F16 and BF16: which one rounded VeRA's projections?")
    dtype = halves[0] if halves else "F32"
    draw = _Draw(key, rank, outputs, inputs, dtype)
    return (
        ComputedTensor(TensorSpec("vera_A", dtype, (rank, inputs)), lambda: draw.both()[0]),
        ComputedTensor(TensorSpec("vera_B", dtype, (outputs, rank)), lambda: draw.both()[1]),
    )


@dataclass(frozen=True, slots=True)
class _Draw:
    """What the projections are drawn from: vera_A and then vera_B, uniform by Kaiming's bound for their columns."""

    key: int
    rank: int
    outputs: int
    inputs: int
    dtype: str

    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return vera_A (rank, inputs) and vera_B (outputs, rank)."""
        import torch

        from loramgr.tensors import torch_dtype

        generator = torch.Generator(device="cpu").manual_seed(self.key)

        def drawn(rows: int, columns: int) -> torch.Tensor:
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
            made = torch.empty((rows, columns), dtype=torch.float32)
            return made.uniform_(-bound, bound, generator=generator).to(torch_dtype(self.dtype))

        first = drawn(self.rank, self.inputs)
        return first, drawn(self.outputs, self.rank)
