"""A state dictionary of nothing but biases, as a training by BitFit leaves it (Ben Zaken et al., arXiv 2106.10199)."""

from __future__ import annotations

from loramgr.adapter import Adapter, Replacement, Update
from loramgr.formats.evidence import Evidence
from loramgr.formats.files import AdapterFiles
from loramgr.formats.hints import ReadHints
from loramgr.tensorfile import FLOAT_DTYPES

__all__ = ["detect"]


def detect(files: AdapterFiles) -> Evidence | None:
    """Recognise a file without configuration in which every tensor is a vector called `….bias`."""
    if files.configuration_path is not None or files.gguf is not None or not files.tensors:
        return None
    for name, view in files.tensors.items():
        if not name.endswith(".bias") or len(view.spec.shape) != 1 or view.spec.dtype not in FLOAT_DTYPES:
            return None
        if any(part.startswith("lora_") for part in name.split(".")):
            return None
    return Evidence("bitfit", None, (f"all {len(files.tensors)} tensors are biases",), _read)


def _read(files: AdapterFiles, hints: ReadHints) -> Adapter:
    updates: dict[str, Update] = {name: Replacement(view) for name, view in sorted(files.tensors.items())}
    return Adapter(
        format="bitfit",
        method="bitfit",
        config={},
        updates=updates,
        tensors=files.tensors,
        alpha=None,
        scaling=None,
        target_modules=(),
    )
