"""Adapters of cloneofsimo/lora: factors by their number (`unet:0:up`), ranks in the metadata, token embeddings.

Source: cloneofsimo/lora `lora_diffusion/lora.py` (`save_safeloras_with_embeds`). The number of a pair is its place
among the linear layers of some classes of the model, in the order in which the model's code makes them. A checkpoint
does not have that order, so the layers cannot be told without the model's code: such an adapter is kept, not merged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from loramgr.adapter import Adapter, Opaque, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.evidence import Evidence, counted
from loramgr.formats.files import AdapterFiles
from loramgr.formats.hints import ReadHints
from loramgr.formats.layers import Source, adapter_of, checked_tensors
from loramgr.formats.suffixed_keys import Module
from loramgr.tensorfile import TensorView

__all__ = ["detect", "read_cloneofsimo"]

_FACTOR = re.compile(r"(?P<component>[^:]+):(?P<number>\d{1,6}):(?P<role>up|down)")
_EMBEDDING = "<embed>"
_MANY = 5
_OBSTACLE = (
    "cloneofsimo/lora numbers the layers in the order of the model's code, which no checkpoint has: its layers cannot "
    "be told"
)


def detect(files: AdapterFiles) -> Evidence | None:
    """Return what was seen of the numbered names, None where no tensor has one."""
    names = [name for name in files.tensors if _FACTOR.fullmatch(name)]
    if files.configuration is not None or not names:
        return None
    found = [counted(names, "numbered as cloneofsimo/lora does")]
    ranks = [key for key in files.metadata if key.endswith(":rank")]
    if ranks:
        found.append(f"{len(ranks)} ranks in the metadata")
    return Evidence("cloneofsimo", None, tuple(found), read_cloneofsimo)


def read_cloneofsimo(files: AdapterFiles, hints: ReadHints) -> Adapter:
    """Read the file's header; it needs no hints, and has no alphas: the scaling is 1.

    Raises IntegrityError for damaged files, and IncompatibleError for pairs that are not whole or numbered without a
    gap, ranks that the metadata contradicts, and tensors that nothing explains.
    """
    tensors = checked_tensors(files)
    modules: dict[str, Module] = {}
    embeddings: dict[str, Update] = {}
    for name, view in sorted(tensors.items()):
        match = _FACTOR.fullmatch(name)
        if match:
            path = f"{match['component']}:{match['number']}"
            modules.setdefault(path, Module(path)).tensors[match["role"]] = view
        else:
            embeddings[name] = _embedding(files, name, view)
    _check_numbers(modules)
    for path, module in modules.items():
        _check_rank(module, files.metadata.get(f"{path}:rank"))
    read = adapter_of(Source("cloneofsimo", files, names_are_own=True), modules)
    return replace(
        read,
        updates=dict(sorted((read.updates | embeddings).items())),
        target_modules=_classes(files.metadata),
        warnings=_warnings(embeddings),
        obstacle=_OBSTACLE,
    )


def _embedding(files: AdapterFiles, name: str, view: TensorView) -> Update:
    """Return the row of a token that the adapter adds to the vocabulary, which the metadata marks."""
    if files.metadata.get(name) != _EMBEDDING or len(view.spec.shape) != 1:
        raise IncompatibleError(f"{files.weights}: no rule explains the tensor {name!r}")
    return Opaque(view, "textual inversion", "the row of a new token, which only its tokenizer could place")


def _check_numbers(modules: Mapping[str, Module]) -> None:
    """Refuse a gap in the numbers: every later layer would be another one."""
    numbers: dict[str, list[int]] = {}
    for path in modules:
        component, _, number = path.rpartition(":")
        numbers.setdefault(component, []).append(int(number))
    for component, found in numbers.items():
        if sorted(found) != list(range(len(found))):
            gap = next(place for place, number in enumerate(sorted(found)) if place != number)
            raise IncompatibleError(f"{component}: the layers are not numbered one by one, as {component}:{gap} shows")


def _check_rank(module: Module, noted: str | None) -> None:
    module.need("down", "up")
    rank = module.shape("down")[0] if module.shape("down") else 0
    if noted is not None and noted != str(rank):
        raise module.refused(f"down is {module.shape('down')}, and the metadata gives it the rank {noted}")


def _classes(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the classes of the model whose linear layers are counted, as the metadata lists them."""
    lists = [text for key, text in metadata.items() if ":" not in key and text.startswith("[")]
    return tuple(sorted({name for text in lists for name in re.findall(r'"(\w+)"', text)}))


def _warnings(embeddings: Mapping[str, Update]) -> tuple[str, ...]:
    said = [f"It cannot be merged: {_OBSTACLE}.", "It has no alphas: the format means a scaling of 1."]
    if embeddings:
        names = ", ".join(list(embeddings)[:_MANY])
        said.append(f"Kept as they are, the embeddings of new tokens (textual inversion): {names}.")
    return tuple(said)
