"""What makes the fine-tune of a merge with the adapter that was extracted from it, bit for bit: one safetensors file.

Its metadata says, in `about`, which tensors the fine-tune has, with their digests, and which of the merged model each
is made of. `difference:NAME` holds the packed difference of the two (`loramgr.algebra.remainder`), `whole:NAME` a zlib
stream of the tensor's own bytes; a tensor without either is the merged one as it is, in the fine-tune's dtype.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from loramgr.digests import TensorDigest, canonical_json, tensors_digest
from loramgr.errors import IntegrityError, NotFoundError
from loramgr.formats import read_adapter
from loramgr.formats.folder import REMAINDER
from loramgr.tensorfile import FLOAT_DTYPES, Data, FileTensor, TensorSpec, encode_header, read_header
from loramgr.workspace.computing import Merger
from loramgr.workspace.contributions import Pick
from loramgr.workspace.differing import Comparison, read_checked
from loramgr.workspace.home import Home
from loramgr.workspace.inspecting import version_of_folder
from loramgr.workspace.matching import bind_to
from loramgr.workspace.options import MergeOptions
from loramgr.workspace.planning import MergePlan, plan_merge
from loramgr.workspace.producing import Producer

__all__ = ["Entry", "Remainder", "Remaker", "read_remainder", "write_remainder"]

_SCHEMA = 1
Item = TypeVar("Item")
Made = TypeVar("Made")
_DIFFERENCE, _WHOLE = "difference", "whole"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the fine-tune, and the name of the merged one that it is made of, None where there is none."""

    digest: TensorDigest
    merged: str | None

    @property
    def spec(self) -> TensorSpec:
        """The tensor without its bytes."""
        return TensorSpec(self.digest.name, self.digest.dtype, self.digest.shape)


@dataclass(frozen=True, slots=True)
class Remainder:
    """A remainder as read: digests of fine-tune and base, tensors, parts by their keys, and the fine-tune's config.

    `config` is the text of the fine-tune's config.json, None where it had none.
    """

    finetuned: str
    base: str
    entries: tuple[Entry, ...]
    parts: Mapping[str, FileTensor]
    config: str | None


class Remaker:
    """Makes the tensors of the fine-tune out of a planned merge and the remainder's parts; threads may share it."""

    def __init__(self, plan: MergePlan, merger: Merger, parts: Mapping[str, FileTensor]) -> None:
        self._plan = plan
        self._parts = parts
        self.producer = Producer(plan, merger)

    def make(self, entry: Entry) -> Data:
        """Return the bytes of one tensor; IntegrityError when they are not those that its digest names."""
        from loramgr.algebra.remainder import with_difference
        from loramgr.tensors import as_bytes, from_bytes

        name, spec = entry.digest.name, entry.spec
        whole, difference = (self._parts.get(f"{kind}:{name}") for kind in (_WHOLE, _DIFFERENCE))
        data: Data = self.candidate(entry) if whole is None else _inflated(whole)
        if difference is not None:
            made = with_difference(from_bytes(data, spec), bytes(difference.read_bytes()))
            data = as_bytes(made.contiguous())
        if hashlib.sha256(data).hexdigest() != entry.digest.sha256:
            raise IntegrityError(f"{name}: what comes out is not the tensor of the fine-tune", "loramgr verify")
        return data

    def candidate(self, entry: Entry) -> Data:
        """Return the bytes of the merged tensor that an entry is made of, in the entry's dtype."""
        from loramgr.algebra.casting import rounded
        from loramgr.tensors import as_bytes, from_bytes, torch_dtype

        target = self._plan.targets.get(str(entry.merged))
        if target is None or target.spec.shape != entry.digest.shape:
            raise IntegrityError(f"{entry.digest.name}: the merge has no tensor that it is made of", "loramgr verify")
        data = self.producer.produce(target)
        if target.spec.dtype == entry.digest.dtype:
            return data
        merged = from_bytes(data, target.spec)
        return as_bytes(rounded(merged, torch_dtype(entry.digest.dtype)).contiguous())


def write_remainder(home: Home, folder: Path, comparison: Comparison, device: str) -> None:
    """Write the remainder beside the adapter in the folder, read it back, and prove that it gives the fine-tune.

    Raises IntegrityError where it does not, and for bytes of either model that are not those of its digest.
    """
    base, tuned = comparison.base, comparison.finetuned
    adapter = read_adapter(folder)
    pick = Pick("", folder.name, version_of_folder(home, folder, adapter), adapter, 1.0, bind_to(adapter, base))
    plan = plan_merge(base, [pick], MergeOptions())
    maker = Remaker(plan, Merger(device, force=True), {})
    landed = {bound.name: bound.target for bound in pick.binding.updates}
    entries, specs = list[Entry](), list[TensorSpec]()
    spill = folder.parent / "parts"

    def part(name: str) -> tuple[Entry, str, Data]:
        entry = Entry(tuned.tensors[name], _merged_name(name, landed, comparison, plan))
        return entry, *_part(maker, entry, read_checked(tuned, name))

    with spill.open("wb") as file:
        for entry, key, data in _in_order(home, part, sorted(tuned.checkpoint.tensors)):
            entries.append(entry)
            if key:
                specs.append(TensorSpec(key, "U8", (len(data),)))
                file.write(data)
    about = {
        "schema": _SCHEMA,
        "finetuned": tuned.digest,
        "base": base.digest,
        "tensors": [[*each.digest, each.merged] for each in entries],
        "config": (tuned.checkpoint.config_bytes or b"").decode() or None,
    }
    with (folder / REMAINDER).open("wb") as out, spill.open("rb") as parts:
        out.write(encode_header(specs, {"about": canonical_json(about).decode()}))
        shutil.copyfileobj(parts, out, 1 << 20)
    _prove(home, folder, plan, device)


def read_remainder(folder: Path) -> Remainder:
    """Read the remainder in an adapter's folder; NotFoundError where there is none, IntegrityError for damage."""
    path = folder / REMAINDER
    if not path.exists():
        raise NotFoundError(
            "the adapter has no remainder: it was not extracted with --exact", "leave out --with-remainder"
        )
    header = read_header(path)
    try:
        about = json.loads((header.metadata or {})["about"])
        if about["schema"] != _SCHEMA:
            raise IntegrityError(f"{path}: a remainder of another version, {about['schema']!r}")
        entries = tuple(
            Entry(TensorDigest(name, dtype, tuple(shape), sha256), merged)
            for name, dtype, shape, sha256, merged in about["tensors"]
        )
        return Remainder(about["finetuned"], about["base"], entries, header.tensors, about["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: the remainder is damaged: {error}", "loramgr verify") from error


def _merged_name(name: str, landed: Mapping[str, str], comparison: Comparison, plan: MergePlan) -> str | None:
    """Return the merged tensor that is nearest to one of the fine-tune's, None where none is of its shape."""
    alignment = comparison.alignment
    spec = comparison.finetuned.checkpoint.tensors[name].spec
    for each in (landed.get(name), alignment.pairs.get(name), alignment.sources.get(name)):
        target = None if each is None else plan.targets.get(each)
        if target is not None and target.spec.shape == spec.shape and _are_alike(spec.dtype, target.spec.dtype):
            return target.spec.name
    return None


def _are_alike(dtype: str, other: str) -> bool:
    return dtype == other or {dtype, other} <= FLOAT_DTYPES


def _part(maker: Remaker, entry: Entry, wanted: Data) -> tuple[str, Data]:
    """Return key and bytes of what turns the merged tensor into the wanted one; an empty key where nothing has to."""
    from loramgr.algebra.remainder import packed_difference
    from loramgr.tensors import from_bytes

    name = entry.digest.name
    if entry.merged is None:
        return f"{_WHOLE}:{name}", zlib.compress(wanted)
    candidate = maker.candidate(entry)
    if hashlib.sha256(candidate).hexdigest() == entry.digest.sha256:
        return "", b""
    if entry.digest.dtype not in FLOAT_DTYPES:
        return f"{_WHOLE}:{name}", zlib.compress(wanted)
    packed = packed_difference(from_bytes(wanted, entry.spec), from_bytes(candidate, entry.spec))
    return f"{_DIFFERENCE}:{name}", packed


def _inflated(part: FileTensor) -> bytes:
    try:
        return zlib.decompress(part.read_bytes())
    except zlib.error as error:
        raise IntegrityError(f"{part.spec.name}: the remainder is damaged: {error}", "loramgr verify") from error


def _in_order(home: Home, work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Yield what threads make of the items, in their order, a few of them ahead."""
    pending: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(home.jobs) as pool:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > home.jobs:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _prove(home: Home, folder: Path, plan: MergePlan, device: str) -> None:
    """Make every tensor once more out of what was written, and compare the digest of all with the fine-tune's."""
    remainder = read_remainder(folder)
    maker = Remaker(plan, Merger(device, force=True), remainder.parts)

    def made(entry: Entry) -> TensorDigest:
        return entry.digest._replace(sha256=hashlib.sha256(maker.make(entry)).hexdigest())

    found = [*_in_order(home, made, remainder.entries)]
    if tensors_digest(found) != remainder.finetuned:
        raise IntegrityError(f"base, adapter and remainder give {tensors_digest(found)}, not {remainder.finetuned}")
