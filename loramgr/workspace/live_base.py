"""What is known of the base that a model in memory should be: the digests of its tensors, by the file's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loramgr.checkpoints.prefixes import Renaming, find_renaming, fitting_renamings
from loramgr.digests import TensorDigest, parse_tensor_lines
from loramgr.errors import IncompatibleError, LoramgrError
from loramgr.tensorfile import TensorSpec
from loramgr.workspace.home import Home
from loramgr.workspace.sources import find_base, is_outside, open_source

__all__ = ["KnownBase", "asked_base", "registered_base"]


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base by its tensors; `config` is its configuration, None without one or where its files are not at hand."""

    name: str
    digest: str
    tensors: dict[str, TensorDigest]
    config: dict[str, Any] | None = None

    def names(self, required: Collection[str], brought: Collection[str]) -> dict[str, str]:
        """Return the model's names, each with its name in the base's file; names that the base lacks are left out.

        The `required` names have to be there, the `brought` ones are of tensors that an adapter replaces. Raises
        IncompatibleError where no change of prefix leads from the model's names to the base's.
        """
        away = [name for name in required if name not in self.tensors]
        renaming = find_renaming(away, self.tensors) if away else self._renaming(brought)
        renamed = {name: name if name in self.tensors else renaming.apply(name) for name in (*required, *brought)}
        return {name: known for name, known in renamed.items() if known in self.tensors}

    def _renaming(self, brought: Collection[str]) -> Renaming:
        away = [name for name in brought if name not in self.tensors]
        found = {renaming for name in away for renaming in fitting_renamings([name], self.tensors)}
        return found.pop() if len(found) == 1 else Renaming()

    def check(
        self,
        names: Mapping[str, str],
        specs: Mapping[str, TensorSpec],
        digests: Mapping[str, str | None],
        *,
        strict: bool,
    ) -> None:
        """Raise IncompatibleError, naming the tensor, when the model's are not those of the base.

        `names` are what `names` returned, `digests` the sha256 of the model's tensors, None for what is not compared.
        Bytes of another dtype than the base's cannot be compared; `strict` refuses them.
        """
        for name, file_name in names.items():
            spec, known = specs[name], self.tensors[file_name]
            if (known.dtype, known.shape) == (spec.dtype, spec.shape):
                if digests[name] not in (None, known.sha256):
                    raise IncompatibleError(
                        f"{name} of the model is not that of the base {self.name}, {self.digest}",
                        "load the weights of that base, or force=True where you know better",
                    )
            elif strict:
                raise IncompatibleError(
                    f"{name} is {spec.dtype} {list(spec.shape)} in the model, and {known.dtype} {list(known.shape)} "
                    f"in the base {self.name}",
                    "load the model as its files store it, or attach without naming the base",
                )


def asked_base(home: Home, text: str) -> KnownBase:
    """Find a base by name, digest, prefix, path or hub address; a registered one's files need not be at hand."""
    if is_outside(text):
        found = find_base(home, text)
        return KnownBase(found.name or found.source, found.digest, found.tensors, found.checkpoint.config)
    with home.catalog.reading() as reader:
        record = reader.base(text)
    config = None
    with suppress(LoramgrError, OSError):  # a model has a configuration of its own; only a dictionary lacks one
        config = open_source(record.source, record.revision)[0].config
    return KnownBase(record.name, record.digest, parse_tensor_lines(home.store.blobs.get(record.digest)), config)


def registered_base(home: Home, digest: str) -> KnownBase | None:
    """Return the registered base of that digest, None where none is."""
    with home.catalog.reading() as reader:
        records = reader.bases_with_digest(digest)
    if not records:
        return None
    return KnownBase(records[0].name, digest, parse_tensor_lines(home.store.blobs.get(digest)))
