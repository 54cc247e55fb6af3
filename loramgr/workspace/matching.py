"""Which base an adapter belongs to, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loramgr.adapter import Adapter, FileHash
from loramgr.checkpoints.binding import Binding, bind
from loramgr.checkpoints.families import TieGroup, tied_groups
from loramgr.digests import TensorDigest, parse_tensor_lines
from loramgr.errors import IncompatibleError, LoramgrError
from loramgr.records import BaseRecord
from loramgr.tensorfile import TensorSpec
from loramgr.workspace.base_files import base_with_file, is_of_file
from loramgr.workspace.home import Home
from loramgr.workspace.sources import OpenBase, find_base, is_outside, open_source, slug

__all__ = ["Match", "Matcher", "bind_registered", "bind_to", "match_base", "resolved_for", "specs_of"]


@dataclass(frozen=True, slots=True)
class Match:
    """The base an adapter belongs to, None for none that is known, and sentences for the person."""

    digest: str | None
    warnings: tuple[str, ...] = ()


class Matcher:
    """Finds the bases of adapters among those registered when it was made; what it reads of a base it keeps.

    `asked` is the base asked for, None for the one that an adapter records or names; with `force` an adapter that does
    not fit, or records another base, is a warning. Several threads may share it.
    """

    def __init__(self, home: Home, asked: str | None, *, force: bool) -> None:
        self._home = home
        self._asked = asked
        self._force = force
        with home.catalog.reading() as reader:
            self._bases = reader.bases()
        self._layouts: dict[str, _Layout] = {}
        self._filed: dict[FileHash, BaseRecord | None] = {}

    def match(self, adapter: Adapter) -> Match:
        """Find the adapter's base: the one asked for, else by recorded digest, by its file's hash, or by its name.

        Raises IncompatibleError when the adapter does not fit the base, or records another one than asked for.
        """
        if self._asked is not None:
            return self._match_asked(adapter, self._asked)
        if adapter.base_digest is not None:
            return self._match_recorded(adapter, adapter.base_digest)
        filed = self._with_file(adapter)
        if filed is not None:  # nobody asked for it, so what does not fit can be kept all the same
            return Match(filed.digest, _tolerated(lambda: self._check(adapter, filed), force=True))
        named = _named(self._bases, adapter.base_name)
        digests = sorted({base.digest for base in named})
        if len(digests) == 1:
            return Match(named[0].digest, (*self._check(adapter, named[0]), *_other_file(adapter, named[0].name)))
        said = f" It names {adapter.base_name!r}." if adapter.base_name else ""
        why = (
            f"{len(digests)} registered bases go by the name it gives"
            if digests
            else "no registered base goes by its name"
        )
        return Match(None, (f"no base: {why}.{said} Tie it to one with `loramgr bind`.",))

    def resolved(self, adapter: Adapter, match: Match) -> Adapter:
        """Return the adapter with the names and layouts of its base, itself where that is not at hand."""
        if adapter.naming is None or match.digest is None:
            return adapter
        if self._asked is not None and is_outside(self._asked):
            base = self._outside
            return _resolved(adapter, _Layout(specs_of(base), base.ties, base.checkpoint.config))
        known = next((base for base in self._bases if base.digest == match.digest), None)
        if known is None:
            return adapter
        if known.name not in self._layouts:
            self._layouts[known.name] = _layout(self._home, known)
        return _resolved(adapter, self._layouts[known.name])

    @cached_property
    def _outside(self) -> OpenBase:
        return find_base(self._home, str(self._asked))

    @cached_property
    def _registered(self) -> BaseRecord:
        with self._home.catalog.reading() as reader:
            return reader.base(str(self._asked))

    def _match_asked(self, adapter: Adapter, asked: str) -> Match:
        if is_outside(asked):
            digest = self._outside.digest
            fits = adapter.obstacle is not None
            warnings = () if fits else _tolerated(lambda: bind_to(adapter, self._outside), force=self._force)
        else:
            digest = self._registered.digest
            warnings = self._check(adapter, self._registered)
        if adapter.base_digest not in (None, digest):
            message = f"the adapter records the base {adapter.base_digest}, and {asked} is {digest}"
            if not self._force:
                raise IncompatibleError(message, "give the base it was trained on, or --force where you know better")
            warnings += (message,)
        return Match(digest, (*warnings, *self._file_doubts(adapter, digest, asked)))

    def _file_doubts(self, adapter: Adapter, digest: str, asked: str) -> tuple[str, ...]:
        """Return a sentence where the base that was asked for is not the file whose hash the adapter records."""
        if adapter.base_file is None:
            return ()
        if is_outside(asked):
            known = is_of_file(self._outside.checkpoint, adapter.base_file)
        else:
            filed = self._with_file(adapter)
            known = filed is not None and filed.digest == digest
        return () if known else _other_file(adapter, asked)

    def _with_file(self, adapter: Adapter) -> BaseRecord | None:
        """Return the base with the file whose hash the adapter records; None for no hash, and where none has it."""
        hashed = adapter.base_file
        if hashed is None:
            return None
        if hashed not in self._filed:
            self._filed[hashed] = base_with_file(self._bases, hashed)
        return self._filed[hashed]

    def _match_recorded(self, adapter: Adapter, digest: str) -> Match:
        bases = [base for base in self._bases if base.digest == digest]
        if not bases:
            return Match(digest, (f"the recorded base {digest} is not registered here: loramgr base add PATH",))
        return Match(digest, self._check(adapter, bases[0]))

    def _check(self, adapter: Adapter, base: BaseRecord) -> tuple[str, ...]:
        if adapter.obstacle is not None:
            return ()  # nothing of it is for a tensor of the base
        if base.name not in self._layouts:
            self._layouts[base.name] = _layout(self._home, base)
        return _tolerated(lambda: self._layouts[base.name].bind(adapter), force=self._force, base=base.name)


def _other_file(adapter: Adapter, base: str) -> tuple[str, ...]:
    if adapter.base_file is None:
        return ()
    return (f"it records the hash of its base's file, and {base} is not that file: sha256 {adapter.base_file.sha256}",)


def match_base(home: Home, adapter: Adapter, asked: str | None, *, force: bool) -> Match:
    """Find the base of one adapter; see `Matcher`."""
    return Matcher(home, asked, force=force).match(adapter)


def bind_registered(home: Home, adapter: Adapter, base: BaseRecord) -> Binding:
    """Bind an adapter's updates to a registered base by names and shapes; IncompatibleError when they do not fit."""
    return _layout(home, base).bind(adapter)


@dataclass(frozen=True, slots=True)
class _Layout:
    """What an adapter has to fit: the tensors, which of their names are one, and the configuration, None without."""

    specs: dict[str, TensorSpec]
    ties: list[TieGroup]
    config: dict[str, Any] | None

    @property
    def all_specs(self) -> dict[str, TensorSpec]:
        """The tensors by every name that they have."""
        tied = {name: group.source for group in self.ties for name in group.tied if group.source in self.specs}
        return {**{name: replace(self.specs[source], name=name) for name, source in tied.items()}, **self.specs}

    def bind(self, adapter: Adapter) -> Binding:
        """Bind the adapter's updates to these tensors; IncompatibleError when they do not fit."""
        return bind(adapter, self.specs, self.ties, self.config)


def _layout(home: Home, base: BaseRecord) -> _Layout:
    tensors = parse_tensor_lines(home.store.blobs.get(base.digest))
    specs = {name: _spec(tensor) for name, tensor in tensors.items()}
    try:
        checkpoint, _, _ = open_source(base.source, base.revision)
    except (LoramgrError, OSError):  # names and shapes are known without the files; only config.json is not
        return _Layout(specs, tied_groups(None, list(specs)), None)
    ties = tied_groups(checkpoint.config, list(specs), checkpoint.aliases)
    return _Layout(specs, ties, checkpoint.config)


def resolved_for(home: Home, adapter: Adapter, digest: str | None) -> Adapter:
    """Return the adapter with the names and layouts of a registered base.

    Itself where no base is known and where it does not fit, which is told where the adapter is bound.
    """
    if adapter.naming is None or digest is None:
        return adapter
    with home.catalog.reading() as reader:
        bases = reader.bases_with_digest(digest)
    if not bases:
        return adapter
    return _resolved(adapter, _layout(home, bases[0]))


def _resolved(adapter: Adapter, layout: _Layout) -> Adapter:
    try:
        return adapter.resolved(layout.all_specs, layout.config)
    except IncompatibleError:
        return adapter


def specs_of(base: OpenBase) -> dict[str, TensorSpec]:
    """Return an open base's tensors by every name that they have, tied ones among them."""
    specs = {name: view.spec for name, view in base.checkpoint.tensors.items()}
    return _Layout(specs, base.ties, base.checkpoint.config).all_specs


def bind_to(adapter: Adapter, base: OpenBase) -> Binding:
    """Bind an adapter's updates to the tensors of an open base; IncompatibleError when they do not fit."""
    specs = {name: view.spec for name, view in base.checkpoint.tensors.items()}
    return bind(adapter, specs, base.ties, base.checkpoint.config)


def _spec(tensor: TensorDigest) -> TensorSpec:
    return TensorSpec(tensor.name, tensor.dtype, tensor.shape)


def _tolerated(check: Callable[[], object], *, force: bool, base: str | None = None) -> tuple[str, ...]:
    try:
        check()
    except IncompatibleError as error:
        if force:
            return (error.message,)
        prefix = f"the adapter does not fit the base {base}: " if base else ""
        hint = error.hint or "name another base with --base, or --force where you know better"
        raise IncompatibleError(f"{prefix}{error.message}", hint) from error
    return ()


def _named(bases: list[BaseRecord], name: str | None) -> list[BaseRecord]:
    """Return the bases that a configuration's `base_model_name_or_path` may mean, by the first rule that finds any."""
    if not name:
        return []
    last = Path(name.rstrip("/")).name
    rules = (
        [base for base in bases if base.name == name],
        [base for base in bases if base.source in (name, f"hf://{name}", str(Path(name).absolute()))],
        [base for base in bases if base.name == slug(last)],
    )
    return next((found for found in rules if found), [])
