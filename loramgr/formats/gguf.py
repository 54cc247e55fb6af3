"""LoRA adapters of llama.cpp: one GGUF file, `blk.0.attn_q.weight.lora_a` names, one alpha for all.

Source: llama.cpp `src/llama-adapter.cpp` and `convert_lora_to_gguf.py`. scaling is alpha / rank, the rank lora_b's
second dimension; an embedding's lora_a is (vocabulary, r).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loramgr.adapter import Adapter, LowRank, Naming, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import is_number
from loramgr.formats.evidence import Evidence, counted
from loramgr.formats.files import AdapterFiles
from loramgr.formats.gguf_file import GgufFile, QuantizedTensor
from loramgr.formats.gguf_names import Architecture, names_of
from loramgr.formats.hints import ReadHints
from loramgr.tensorfile import FLOAT_DTYPES, TensorSpec, TensorView
from loramgr.views import ComputedTensor, transposed

__all__ = ["EMBEDDING", "detect", "read_gguf_adapter", "reordered"]

EMBEDDING = "token_embd.weight"
_ALPHA = "adapter.lora.alpha"
_ENDS = (".lora_a", ".lora_b")
_MANY = 5


def detect(files: AdapterFiles) -> Evidence | None:
    """Return what was seen in the header of a GGUF file that says it is an adapter, None for every other file."""
    if files.gguf is None or files.gguf.metadata.get("general.type") != "adapter":
        return None
    said = [f"{key} is {files.gguf.metadata.get(key)!r}" for key in ("general.type", "adapter.type")]
    factors = [name for name in files.gguf.tensors if name.endswith(_ENDS)]
    return Evidence("gguf", None, ("the file is GGUF", *said, counted(factors, "factors")), read_gguf_adapter)


def read_gguf_adapter(files: AdapterFiles, hints: ReadHints) -> Adapter:
    """Read the adapter in a GGUF file, its header only; hints are not needed.

    Its names stay llama.cpp's, and the rows of q and k in its order, until it meets a base. Raises IncompatibleError
    for another kind of adapter, a missing alpha, tensors that are no factors, and shapes that do not multiply.
    """
    file = files.gguf
    if file is None:
        raise IncompatibleError(f"{files.weights}: not a GGUF file")
    kind, architecture = (file.metadata.get(key) for key in ("adapter.type", "general.architecture"))
    if kind != "lora" or not isinstance(architecture, str):
        raise IncompatibleError(f"{files.weights}: an adapter of type {kind!r} for {architecture!r}, not lora")
    alpha = file.metadata.get(_ALPHA)
    if not isinstance(alpha, int | float) or not is_number(alpha):
        raise IncompatibleError(f"{files.weights}: {_ALPHA} is {alpha!r}, it must be a number: the scaling needs it")
    updates = _updates(file, float(alpha))
    scalings = {update.scaling for update in updates.values()}
    return Adapter(
        format="gguf",
        method="lora",
        config={key: value for key, value in sorted(file.metadata.items()) if not isinstance(value, list)},
        updates=dict(updates),
        tensors=file.tensors,
        alpha=float(alpha),
        scaling=scalings.pop() if len(scalings) == 1 else None,
        target_modules=tuple(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in updates})),
        base_name=_text(file.metadata.get("general.base_model.0.name")),
        warnings=tuple(_warnings(file)),
        obstacle=_obstacle(file),
        naming=_LlamaNames(architecture),
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _obstacle(file: GgufFile) -> str | None:
    if "adapter.alora.invocation_tokens" in file.metadata:
        return "aLoRA acts only after its invocation tokens, so that no weights are the same as it"
    return None


def _warnings(file: GgufFile) -> list[str]:
    quantized = sorted({file.types[name] for name, view in file.tensors.items() if isinstance(view, QuantizedTensor)})
    return [f"Factors are quantized ({', '.join(quantized)}): their exact values are used."] if quantized else []


def _updates(file: GgufFile, alpha: float) -> dict[str, LowRank]:
    left = sorted(name for name in file.tensors if not name.endswith(_ENDS))
    if left or not file.tensors:
        raise IncompatibleError(
            f"{file.path}: no rule explains these tensors: {', '.join(left[:_MANY]) or 'none at all'}"
        )
    modules = sorted({name[: -len(_ENDS[0])] for name in file.tensors})
    return {name: _low_rank(file, name, alpha) for name in modules}


def _low_rank(file: GgufFile, name: str, alpha: float) -> LowRank:
    pair = [file.tensors.get(f"{name}{end}") for end in _ENDS]
    first, second = pair
    if first is None or second is None:
        raise IncompatibleError(f"{file.path}: {name} has only one of lora_a and lora_b")
    is_embedding = name == EMBEDDING
    lora_A = transposed(first) if is_embedding and len(first.spec.shape) == 2 else first
    for view in (lora_A, second):
        if view.spec.dtype not in FLOAT_DTYPES or len(view.spec.shape) != 2 or 0 in view.spec.shape:
            raise IncompatibleError(
                f"{file.path}: {view.spec.name} is {view.spec.dtype} {list(view.spec.shape)}, no factor of a matrix"
            )
    rank = second.spec.shape[1]
    if lora_A.spec.shape[0] != rank:
        raise IncompatibleError(
            f"{file.path}: {name}: lora_a {list(first.spec.shape)} and lora_b {list(second.spec.shape)} do not multiply"
        )
    # llama.cpp takes an alpha of 0 for none: then the scaling is 1
    scaling = alpha / rank if alpha else 1.0
    return LowRank("embedding" if is_embedding else "linear", lora_A, second, rank, alpha or float(rank), scaling)


@dataclass(frozen=True, slots=True)
class _LlamaNames(Naming):
    """llama.cpp's names of the tensors of one architecture, and its order of the rows of q and k."""

    architecture: str

    @property
    def described(self) -> str:
        """Whose names they are, for a person."""
        return f"the names of llama.cpp for {self.architecture}"

    @property
    def is_needed(self) -> bool:
        """Whether the updates mean nothing before."""
        return True

    def resolve(
        self, updates: Mapping[str, Update], specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> dict[str, Update]:
        """Return the updates by the base's names, the rows of q and k in its order; see `Naming`."""
        architecture = Architecture.of(self.architecture, config)
        own = {mapped: name for name, mapped in names_of(self.architecture, sorted(specs)).items()}
        resolved: dict[str, Update] = {}
        for name, update in updates.items():
            if name not in own:
                raise IncompatibleError(
                    f"the base has no tensor that llama.cpp calls {name}", "name the base it was trained on"
                )
            heads = architecture.rotated_heads(name)
            resolved[own[name]] = update if heads is None else _in_halves(update, heads)
        return resolved


def _in_halves(update: Update, heads: int) -> Update:
    if not isinstance(update, LowRank):
        return update
    return replace(update, lora_B=reordered(update.lora_B, heads, to_llama=False))


def reordered(view: TensorView, heads: int, *, to_llama: bool) -> ComputedTensor:
    """Return the rows of a q or k, of lora_B too, in llama.cpp's order or back in transformers'.

    IncompatibleError where the rows cannot be those of so many heads, in halves.
    """
    rows = view.spec.shape[0]
    if rows % (2 * heads):
        raise IncompatibleError(f"{view.spec.name}: {rows} rows are not those of {heads} heads")
    halves = (heads, 2, rows // heads // 2, -1) if to_llama else (heads, rows // heads // 2, 2, -1)
    return ComputedTensor(view.spec, lambda: view.load().reshape(halves).transpose(1, 2).reshape(view.spec.shape))
