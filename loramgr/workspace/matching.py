"""Which base an adapter belongs to, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loramgr.adapter import Adapter
from loramgr.catalog.reader import Reader
from loramgr.checkpoints.binding import Binding, bind
from loramgr.checkpoints.families import tied_groups
from loramgr.digests import TensorDigest, parse_tensor_lines
from loramgr.errors import IncompatibleError, LoramgrError
from loramgr.records import BaseRecord
from loramgr.tensorfile import TensorSpec
from loramgr.workspace.home import Home
from loramgr.workspace.sources import OpenBase, find_base, is_outside, open_source, slug

__all__ = ["Match", "bind_registered", "bind_to", "match_base"]


@dataclass(frozen=True, slots=True)
class Match:
    """The base an adapter belongs to, None for none that is known, and sentences for the person."""

    digest: str | None
    warnings: tuple[str, ...] = ()


def match_base(home: Home, adapter: Adapter, asked: str | None, *, force: bool) -> Match:
    """Find the adapter's base: the one asked for, else by recorded digest, else by the name in its configuration.

    Raises IncompatibleError when the adapter does not fit the base, or records another one than asked for; with
    `force` these become warnings.
    """
    if asked is not None:
        return _asked(home, adapter, asked, force=force)
    if adapter.base_digest is not None:
        return _recorded(home, adapter, adapter.base_digest, force=force)
    with home.catalog.reading() as reader:
        named = _named(reader, adapter.base_name)
    digests = sorted({base.digest for base in named})
    if len(digests) == 1:
        return Match(named[0].digest, _check(home, adapter, named[0], force=force))
    said = f" It names {adapter.base_name!r}." if adapter.base_name else ""
    why = (
        f"{len(digests)} registered bases go by the name it gives" if digests else "no registered base goes by its name"
    )
    return Match(None, (f"no base: {why}.{said} Tie it to one with `loramgr bind`.",))


def bind_registered(home: Home, adapter: Adapter, base: BaseRecord) -> Binding:
    """Bind an adapter's updates to a registered base by names and shapes; IncompatibleError when they do not fit."""
    tensors = parse_tensor_lines(home.store.blobs.get(base.digest))
    specs = {name: _spec(tensor) for name, tensor in tensors.items()}
    try:
        checkpoint, _, _ = open_source(base.source, base.revision)
    except (LoramgrError, OSError):  # names and shapes are known without the files; only config.json is not
        return bind(adapter, specs, tied_groups(None, list(specs)), None)
    ties = tied_groups(checkpoint.config, list(specs), checkpoint.aliases)
    return bind(adapter, specs, ties, checkpoint.config)


def bind_to(adapter: Adapter, base: OpenBase) -> Binding:
    """Bind an adapter's updates to the tensors of an open base; IncompatibleError when they do not fit."""
    specs = {name: view.spec for name, view in base.checkpoint.tensors.items()}
    return bind(adapter, specs, base.ties, base.checkpoint.config)


def _spec(tensor: TensorDigest) -> TensorSpec:
    return TensorSpec(tensor.name, tensor.dtype, tensor.shape)


def _asked(home: Home, adapter: Adapter, asked: str, *, force: bool) -> Match:
    warnings: tuple[str, ...] = ()
    if is_outside(asked):
        base = find_base(home, asked)
        digest = base.digest
        warnings += _tolerated(lambda: bind_to(adapter, base), force=force)
    else:
        with home.catalog.reading() as reader:
            record = reader.base(asked)
        digest = record.digest
        warnings += _check(home, adapter, record, force=force)
    if adapter.base_digest not in (None, digest):
        message = f"the adapter records the base {adapter.base_digest}, and {asked} is {digest}"
        if not force:
            raise IncompatibleError(message, "give the base it was trained on, or --force where you know better")
        warnings += (message,)
    return Match(digest, warnings)


def _recorded(home: Home, adapter: Adapter, digest: str, *, force: bool) -> Match:
    with home.catalog.reading() as reader:
        bases = reader.bases_with_digest(digest)
    if not bases:
        return Match(digest, (f"the recorded base {digest} is not registered here: loramgr base add PATH",))
    return Match(digest, _check(home, adapter, bases[0], force=force))


def _check(home: Home, adapter: Adapter, base: BaseRecord, *, force: bool) -> tuple[str, ...]:
    return _tolerated(lambda: bind_registered(home, adapter, base), force=force, base=base.name)


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


def _named(reader: Reader, name: str | None) -> list[BaseRecord]:
    """Return the bases that a configuration's `base_model_name_or_path` may mean, by the first rule that finds any."""
    if not name:
        return []
    bases = reader.bases()
    last = Path(name.rstrip("/")).name
    rules = (
        [base for base in bases if base.name == name],
        [base for base in bases if base.source in (name, f"hf://{name}", str(Path(name).absolute()))],
        [base for base in bases if base.name == slug(last)],
    )
    return next((found for found in rules if found), [])
