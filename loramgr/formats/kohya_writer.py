"""Writes an adapter as one file of kohya's sd-scripts or of LyCORIS, tensor by tensor.

A module's scaling becomes an alpha of its own (scaling · rank), so rsLoRA and patterns are right for every reader. The
dotted module names are noted in the metadata, so that loramgr reads the file back without the base.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loramgr.adapter import Adapter, Decomposed, Hadamard, Kronecker, LowRank, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.factor_views import multiplied
from loramgr.formats.foreign_names import flattened, kohya_component
from loramgr.formats.kohya import MODULE_NAMES
from loramgr.formats.layers import TASK_TYPE
from loramgr.formats.peft_writer import WrittenTensor, alpha_of
from loramgr.tensorfile import Data, TensorSpec, TensorView, encode_header

__all__ = ["write_kohya", "write_lycoris"]

FILE = "adapter.safetensors"
_LARGEST = (2 - 2**-23) * 2.0**127  # of float32
_HADAMARD = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")


def write_kohya(adapter: Adapter, folder: Path, base_digest: str | None = None) -> list[str]:
    """Write the adapter with kohya's names, `lora_unet_…` and `lora_te_…`; return notes for a person.

    `base_digest` is noted in the metadata, None for none. Raises IncompatibleError, naming the parameter, for what the
    format cannot hold: whole tensors, biases, embeddings, layers stored as (in, out), and every update but LoRA, DoRA,
    LoHa and LoKr.
    """
    return _write(adapter, folder, None, base_digest)


def write_lycoris(adapter: Adapter, folder: Path, base_digest: str | None = None) -> list[str]:
    """Write the adapter with the names of LyCORIS' wrapper, `lycoris_…`; as `write_kohya` in everything else."""
    return _write(adapter, folder, "lycoris_", base_digest)


@dataclass(frozen=True, slots=True)
class _File:
    """The file as it grows: its tensors, and the modules' own names by those that it gives them."""

    tensors: list[WrittenTensor] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, module: str, suffix: str, view: TensorView, shape: tuple[int, ...] | None = None) -> None:
        """Add a stored tensor of the module's, in another shape where one is given."""
        spec = TensorSpec(f"{module}.{suffix}", view.spec.dtype, shape or view.spec.shape)
        self.tensors.append(WrittenTensor(spec, view.read_bytes))

    def add_alpha(self, module: str, scaling: float, rank: int) -> None:
        """Add the alpha whose quotient by the rank is the scaling, in float64 where float32 does not hold it."""
        alpha = alpha_of(scaling, rank)
        if alpha == 0:
            raise IncompatibleError(f"{self.names[module]}: its scaling is 0, and in kohya an alpha of 0 is the rank")
        is_single = abs(alpha) <= _LARGEST and struct.unpack("<f", struct.pack("<f", alpha))[0] == alpha
        data = struct.pack("<f" if is_single else "<d", alpha)
        spec = TensorSpec(f"{module}.alpha", "F32" if is_single else "F64", ())
        self.tensors.append(WrittenTensor(spec, lambda: data))


def _write(adapter: Adapter, folder: Path, prefix: str | None, base_digest: str | None) -> list[str]:
    file = _File()
    for name, update in adapter.updates.items():
        own, _, parameter = name.rpartition(".")
        if parameter != "weight":
            raise _refused(name, update)
        module = _flat(own, prefix, adapter)
        if file.names.setdefault(module, own) != own:
            raise IncompatibleError(f"{own} and {file.names[module]} are both {module} in kohya's spelling")
        _add(file, module, name, update)
    if not file.tensors:
        raise IncompatibleError("there is nothing to write: the adapter has no update")
    with (folder / FILE).open("wb") as out:
        for data in _content(file, _metadata(file, adapter, base_digest)):
            out.write(data)
    return [
        f"The modules' names begin with {', '.join(sorted({_start(module) for module in file.names}))}.",
        *(["LyCORIS' merge_to applies the scaling of LoHa and LoKr twice; its forward pass, once, is right."]
          if any(isinstance(each, Hadamard | Kronecker) for each in adapter.updates.values()) else []),
    ]  # fmt: skip


def _flat(module: str, prefix: str | None, adapter: Adapter) -> str:
    if prefix is not None:
        return f"{prefix}{flattened(module)}"
    component, rest = kohya_component(module, is_pipeline=adapter.format == "diffusers")
    return f"{component}{flattened(rest)}"


def _start(module: str) -> str:
    return f"{'_'.join(module.split('_')[:2])}_" if module.startswith("lora_") else "lycoris_"


def _content(file: _File, metadata: dict[str, str]) -> Iterator[Data]:
    yield encode_header([each.spec for each in file.tensors], metadata)
    for tensor in file.tensors:
        yield tensor.make()


def _metadata(file: _File, adapter: Adapter, base_digest: str | None) -> dict[str, str]:
    kept = {key: value for key, value in adapter.config.items() if key.startswith("ss_") and isinstance(value, str)}
    said = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(adapter.ranks.values(), default="")),
        "ss_network_alpha": str(adapter.alpha or ""),
        "ss_sd_model_name": adapter.base_name or "",
        "base_digest": base_digest or adapter.base_digest or "",
        TASK_TYPE: adapter.task_type or "",
        MODULE_NAMES: json.dumps(file.names, sort_keys=True, separators=(",", ":")),
    }
    return {key: value for key, value in (said | kept).items() if value}


def _add(file: _File, module: str, name: str, update: Update) -> None:
    """Add the tensors of one update; IncompatibleError, naming the parameter, for one that kohya has no tensors for."""
    match update:
        case Decomposed(epsilon=0.0):
            _add(file, module, name, update.inner)
            file.add(module, "dora_scale", update.magnitude, _magnitude_shape(update))
        case LowRank():
            _add_low_rank(file, module, name, update)
        case Hadamard():
            _add_hadamard(file, module, update)
        case Kronecker():
            _add_kronecker(file, module, update)
        case _:
            raise _refused(name, update)


def _add_hadamard(file: _File, module: str, update: Hadamard) -> None:
    for part in _HADAMARD:
        if (view := getattr(update, part)) is not None:
            file.add(module, f"hada_{part}", view)
    file.add_alpha(module, update.scaling, update.rank)


def _add_low_rank(file: _File, module: str, name: str, update: LowRank) -> None:
    if update.kind == "embedding" or update.table is not None or update.fan_in_fan_out:
        raise _refused(name, update)
    file.add(module, "lora_down.weight", update.lora_A)
    file.add(module, "lora_up.weight", update.lora_B)
    file.add_alpha(module, update.scaling, update.rank)
    if update.magnitude is not None:
        ones = (1,) * (len(update.lora_A.spec.shape) - 1)
        file.add(module, "dora_scale", update.magnitude, (update.magnitude.spec.elements, *ones))


def _add_kronecker(file: _File, module: str, update: Kronecker) -> None:
    """Add both sides; where both are whole LyCORIS takes no alpha, so the scaling goes into the first, in float32."""
    sides = {"w1": update.w1, "w2": update.w2}
    is_whole = all(len(views) == 1 for views in sides.values())
    if is_whole:
        sides["w1"] = (multiplied(update.w1[0], update.scaling),)
    for side, views in sides.items():
        for view, part in zip(views, ("_a", "_b") if len(views) == 2 else ("",), strict=True):
            file.add(module, f"lokr_{side}{part}", view)
    if update.t2 is not None:
        file.add(module, "lokr_t2", update.t2)
    if is_whole:
        file.add_alpha(module, 1.0, 1)  # it means nothing, and LyCORIS fails without
    else:
        file.add_alpha(module, update.scaling, _factored_rank(sides))


def _factored_rank(sides: dict[str, tuple[TensorView, ...]]) -> int:
    """Return what LyCORIS divides alpha by the rank of w1 where that is factored, else w2's."""
    return next(views[1].spec.shape[0] for views in sides.values() if len(views) == 2)


def _magnitude_shape(update: Decomposed) -> tuple[int, ...]:
    count, inner = update.magnitude.spec.elements, update.inner
    dims = len(inner.lora_A.spec.shape) if isinstance(inner, LowRank) else max(2, len(update.magnitude.spec.shape))
    ones = (1,) * (dims - 2)
    return (1, count, *ones) if update.by_input else (count, 1, *ones)


def _refused(name: str, update: Update) -> IncompatibleError:
    what = type(update).__name__
    reasons = {
        "LowRank": "an embedding, a layer stored as (in, out) or one with a whole table",
        "Shift": "a change of a bias",
        "Replacement": "a whole tensor",
        "Rows": "trained token rows",
    }
    return IncompatibleError(
        f"{name}: kohya's format cannot hold {reasons.get(what, f'an update of the kind {what}')}",
        "export it as --format peft",
    )
