"""Adapters of the `adapters` library (AdapterHub): bottleneck layers and others, kept whole.

Its `adapter_config.json` has an object `config` beside `hidden_size` and `model_type`, and every tensor's name has the
part `adapters`, `loras`, `prefix_tunings` or another of its own (Pfeiffer et al. 2020, arXiv 2007.07779).
"""

from __future__ import annotations

from loramgr.adapter import Adapter, Opaque, Update
from loramgr.formats.configuration import Fields
from loramgr.formats.evidence import Evidence
from loramgr.formats.files import AdapterFiles
from loramgr.formats.hints import ReadHints

__all__ = ["detect"]

_METHODS = {"prefix_tuning": "prefix_tuning", "prompt_tuning": "prompt_tuning", "lora": "lora", "reft": "reft"}
_REASONS = {
    "bottleneck": "bottleneck adapters add layers to the model, which no weight can hold",
    "prefix_tuning": "prefix tuning puts trained keys and values before those of every layer and changes no weight",
    "prompt_tuning": "prompt tuning puts trained vectors before the input and changes no weight",
}


def detect(files: AdapterFiles) -> Evidence | None:
    """Recognise the library by the keys of its configuration."""
    fields = files.configuration
    if fields is None or "peft_type" in fields.content or not isinstance(fields.content.get("config"), dict):
        return None
    if not {"hidden_size", "model_type"} <= fields.content.keys():
        return None
    return Evidence("adapterhub", None, ("adapter_config.json has config, hidden_size and model_type",), _read)


def _read(files: AdapterFiles, hints: ReadHints) -> Adapter:
    fields = files.configuration
    if fields is None:
        raise ValueError("detect saw a configuration")
    method = _method(Fields(fields.path, fields.mapping("config")))
    reason = _REASONS.get(method, f"loramgr does not compute what {method} of the adapters library does to the weights")
    updates: dict[str, Update] = {name: Opaque(view, method, reason) for name, view in sorted(files.tensors.items())}
    return Adapter(
        format="adapterhub",
        method=method,
        config=fields.content,
        updates=updates,
        tensors=files.tensors,
        alpha=None,
        scaling=None,
        target_modules=(),
        base_name=fields.text("model_name"),
        obstacle=reason,
    )


def _method(config: Fields) -> str:
    architecture = config.text("architecture")
    return "bottleneck" if architecture is None else _METHODS.get(architecture, architecture)
