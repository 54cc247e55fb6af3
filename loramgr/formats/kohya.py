"""Adapters of kohya's sd-scripts and of LyCORIS: one file, `lora_unet_…` names, alpha as a tensor, `ss_*` metadata.

Sources: sd-scripts `networks/lora.py` and `library/train_util.py`, LyCORIS 4.1 `kohya.py` and `wrapper.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from loramgr.adapter import Adapter
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import parse_object
from loramgr.formats.evidence import Evidence, counted
from loramgr.formats.files import AdapterFiles
from loramgr.formats.foreign_names import is_spelled
from loramgr.formats.hints import ReadHints
from loramgr.formats.layers import Source, adapter_of, checked_tensors
from loramgr.formats.suffixed_keys import KOHYA_ROLES, LYCORIS_ROLES, Module, modules_of, split_name, unexplained
from loramgr.tensorfile import TensorView

__all__ = ["MODULE_NAMES", "detect"]

MODULE_NAMES = "loramgr_modules"  # metadata of files that loramgr wrote: a module's name in the file → its own
_FACTORS = frozenset({"down", "up"})
_DORA = re.compile(r'"(?:dora_wd|weight_decompose)":\s*"?(?:true|1)\b', re.IGNORECASE)


def detect(files: AdapterFiles) -> Evidence | None:
    """Return what was seen of kohya's or LyCORIS' names; None where no tensor has them, or a configuration is there."""
    if files.configuration is not None or files.gguf is not None:
        return None
    kohya = [name for name in files.tensors if _role(name, KOHYA_ROLES) in _FACTORS]
    lycoris = [name for name in files.tensors if _role(name, LYCORIS_ROLES) is not None]
    if not (kohya or lycoris):
        return None
    found = [counted(names, what) for names, what in ((kohya, "named as kohya does"), (lycoris, "of LyCORIS")) if names]
    metadata = sorted(key for key in files.metadata if key.startswith("ss_"))
    if metadata:
        found.append(f"metadata of sd-scripts, {len(metadata)} keys")
    dotted = any("." in _path(each) for each in (*kohya, *lycoris))
    return Evidence(_format_of(files), "dotted names" if dotted else "names with underscores", tuple(found), read_kohya)


def read_kohya(files: AdapterFiles, hints: ReadHints) -> Adapter:
    """Read the file of kohya's or LyCORIS', its header and the alphas; it needs no hints.

    Raises IntegrityError for damaged files, and IncompatibleError for tensors, shapes and names that no rule explains.
    """
    tensors = checked_tensors(files)
    names = _own_names(files, tensors)
    modules, left = modules_of(tensors, KOHYA_ROLES | LYCORIS_ROLES, names)
    left = _with_vectors(modules, left, tensors, names)
    if left:
        raise unexplained(left)
    source = Source(_format_of(files), files, bool(names), ranks=None if names else _noted_ranks(files.metadata))
    adapter = adapter_of(source, modules)
    return replace(adapter, warnings=(*adapter.warnings, *_contradictions(files.metadata, modules)))


def _contradictions(metadata: Mapping[str, str], modules: Mapping[str, Module]) -> Iterator[str]:
    """Yield what sd-scripts noted of the training that no tensor of the file bears out."""
    roles = {role for module in modules.values() for role in module.tensors}
    alpha = metadata.get("ss_network_alpha")
    if alpha is not None and "alpha" not in roles:
        yield f"The metadata has ss_network_alpha {alpha!r} and no tensor an alpha: the tensors count, as for loaders."
    if "magnitude" not in roles and _DORA.search(metadata.get("ss_network_args", "")):
        yield "The metadata's ss_network_args ask for DoRA, and the file holds no dora_scale: it is read as it is."


def _noted_ranks(metadata: Mapping[str, str]) -> frozenset[int]:
    """Return the ranks that sd-scripts noted: network_dim, and the numbers among the network's arguments."""
    text = f"{metadata.get('ss_network_dim', '')} {metadata.get('ss_network_args', '')}"
    return frozenset(int(number) for number in re.findall(r"\b\d{1,6}\b", text))


def _format_of(files: AdapterFiles) -> str:
    """Return lycoris for a file with tensors, names or metadata of LyCORIS', else kohya."""
    written = files.metadata.get("ss_network_module", "").startswith("lycoris")
    named = any(name.startswith("lycoris_") or _role(name, LYCORIS_ROLES) is not None for name in files.tensors)
    return "lycoris" if written or named else "kohya"


def _role(name: str, roles: Mapping[str, str]) -> str | None:
    parts = split_name(name, roles)
    return None if parts is None else parts[1]


def _path(name: str) -> str:
    parts = split_name(name, KOHYA_ROLES | LYCORIS_ROLES)
    return name if parts is None else parts[0]


def _with_vectors(
    modules: Mapping[str, Module], left: list[str], tensors: Mapping[str, TensorView], names: Mapping[str, str]
) -> list[str]:
    """Give IA3's vectors, named as plain weights are, to the modules with `on_input`; return what is still left."""
    still = []
    for name in left:
        path = name.removesuffix(".weight")
        module = modules.get(names.get(path, path))
        if path != name and module is not None and "on_input" in module.tensors:
            module.tensors["weight"] = tensors[name]
        else:
            still.append(name)
    return still


def _own_names(files: AdapterFiles, tensors: Mapping[str, TensorView]) -> dict[str, str]:
    """Return the modules' own names by those in the file, as loramgr noted them when it wrote the file, else nothing.

    Raises IncompatibleError for a note that does not fit the tensors' names.
    """
    text = files.metadata.get(MODULE_NAMES)
    if text is None:
        return {}
    noted = parse_object(f"{files.weights}: {MODULE_NAMES}", text.encode())
    for path in sorted({_path(name) for name in tensors}):
        own = noted.get(path)
        if not isinstance(own, str) or not is_spelled(path, own):
            raise IncompatibleError(
                f"{files.weights}: {MODULE_NAMES} in the metadata says that the module {path} is {own!r}",
                "write the file again, or remove the note from its metadata",
            )
    if len(set(noted.values())) != len(noted):
        raise IncompatibleError(f"{files.weights}: {MODULE_NAMES} in the metadata names one module twice")
    return {path: str(own) for path, own in noted.items()}
