"""How PEFT's adapters are recognised."""

from __future__ import annotations

from loramgr.adapter import Adapter
from loramgr.formats.evidence import Evidence, counted
from loramgr.formats.files import AdapterFiles
from loramgr.formats.hints import ReadHints
from loramgr.formats.peft import read_peft
from loramgr.formats.peft_initial import read_from_initial, read_to_look_at
from loramgr.formats.peft_keys import PREFIX

__all__ = ["detect", "evidence"]

_TORCHTUNE = (".lora_a.weight", ".lora_b.weight")


def detect(files: AdapterFiles) -> Evidence | None:
    """Return what was seen of PEFT's configuration, None where there is none or the tensors are torchtune's."""
    fields = files.configuration
    if fields is None or "peft_type" not in fields.content or files.gguf is not None:
        return None
    if any(name.endswith(_TORCHTUNE) and not name.startswith(PREFIX) for name in files.tensors):
        return None
    return evidence(files)


def evidence(files: AdapterFiles) -> Evidence:
    """Return what a configuration and the names say for PEFT, whether or not it is complete."""
    fields = files.configuration
    said = [] if fields is None else [f"{fields.path.name} has peft_type {fields.content.get('peft_type')!r}"]
    version = None if fields is None else fields.content.get("peft_version")
    if isinstance(version, str):
        said.append(f"written by PEFT {version}")
    named = [name for name in files.tensors if name.startswith(PREFIX)]
    if named:
        said.append(counted(named, f"named with the prefix {PREFIX}"))
    return Evidence("peft", None, tuple(said), _read)


def _read(files: AdapterFiles, hints: ReadHints) -> Adapter:
    if hints.initial is not None:
        return read_from_initial(files.folder, hints.initial)
    return read_to_look_at(files.folder) if hints.is_looked_at else read_peft(files.folder)
