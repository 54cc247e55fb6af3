"""Whose tokenizer a merged model needs: an adapter's own, when it changes what the vocabulary means."""

from __future__ import annotations

from pathlib import Path

from loramgr.adapter import Rows
from loramgr.errors import IncompatibleError
from loramgr.formats.folder import REMAINDER
from loramgr.workspace.contributions import Pick
from loramgr.workspace.planning import MergePlan

__all__ = ["carried_tokenizer"]

_NOT_OF_TOKENIZER = frozenset(
    {"README.md", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", REMAINDER}
)


def carried_tokenizer(plan: MergePlan, folders: dict[str, Path]) -> dict[str, Path]:
    """Return the tokenizer files that take the place of the base's, by relative name; none for most adapters.

    An adapter's tokenizer is needed when it resizes the vocabulary or trains rows of it. Raises IncompatibleError
    when two adapters bring different ones.
    """
    carried: dict[str, Path] = {}
    for pick in plan.picks:
        if pick.binding.vocab_size is None and not _trains_tokens(pick):
            continue
        for name in (file.path for file in pick.version.files if file.path not in _NOT_OF_TOKENIZER):
            path = folders[pick.ref] / name
            if name in carried and carried[name].read_bytes() != path.read_bytes():
                raise IncompatibleError(f"the adapters bring different tokenizers: {name} of {pick.ref} is another")
            carried[name] = path
    return carried


def _trains_tokens(pick: Pick) -> bool:
    return any(isinstance(bound.update, Rows) for bound in pick.binding.updates)
