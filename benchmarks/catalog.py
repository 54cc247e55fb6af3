"""Measures how long the catalog takes to take in one more version, at several sizes.

    python benchmarks/catalog.py [--versions N]... [--runs N]

A version has the rows of a real adapter: 48 modules, 2 files, a parent, a tag, a label, a metric. Medians of whole
transactions with all syncs, for the journal's folder synced (EXTRA, as loramgr has it) and not synced (FULL).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import Engine, event

from loramgr.catalog.catalog import Catalog
from loramgr.catalog.rebuild import build
from loramgr.digests import digest_bytes
from loramgr.log import Entry

LIMIT_MS = 10.0
MODULES = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(12) for part in "qkvo"]
PER_NAME = 50


def entries(count: int, start: int = 0, heads: dict[str, Entry] | None = None) -> Iterator[Entry]:
    """Yield the entries that publish `count` versions after the first `start`, 50 to a name."""
    heads = {} if heads is None else heads
    for at in range(start, start + count):
        name = f"adapter-{at // PER_NAME}"
        previous = heads.get(name)
        heads[name] = entry = Entry(
            "adapter",
            "publish",
            name,
            None if previous is None else previous.digest,
            f"2026-01-01T00:00:00.{at:06}Z",
            "bench",
            content(at),
        )
        yield entry


def content(at: int) -> dict[str, Any]:
    """Return what the publish entry of the version says."""
    number = at % PER_NAME + 1
    files = [
        {"path": name, "digest": digest_bytes(f"{name} {at}".encode()), "bytes": 1000}
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    parents = [{"ref": f"adapter-{at // PER_NAME}@v{number - 1}", "digest": digest_bytes(b"parent")}]
    summary = {
        "weights_digest": digest_bytes(f"weights {at}".encode()),
        "base": digest_bytes(b"base"),
        "method": "lora",
        "format": "peft",
        "rank": 8,
        "ranks": dict.fromkeys(MODULES, 8),
        "alpha": 16.0,
        "scaling": 2.0,
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "modules": MODULES,
        "parameters": 1000,
        "bytes": 2000,
        "dtype": "F32",
        "files": files,
    }
    said = {"message": "", "tags": ["newest"], "labels": {"run": str(at)}, "metrics": {"loss": at / 7}, "recipe": None}
    version = digest_bytes(f"manifest {at}".encode())
    return {"number": number, "version": version, "parents": parents if number > 1 else [], "summary": summary, **said}


def medians(folder: Path, versions: int, runs: int, synchronous: str) -> float:
    """Return the median milliseconds of inserting one version into a catalog of so many."""
    path, uuid, heads = folder / f"{versions}-{synchronous}.sqlite3", "bench", dict[str, Entry]()
    build(path, uuid, entries(versions, 0, heads), replace=True)
    catalog = Catalog.open(path, uuid)
    event.listen(Engine, "connect", pragma := _pragma(synchronous))
    times = []
    for entry in entries(runs, versions, heads):
        started = time.perf_counter()
        with catalog.writing() as writer:
            writer.append(entry)
        times.append(time.perf_counter() - started)
    event.remove(Engine, "connect", pragma)
    return 1000 * statistics.median(times)


def _pragma(synchronous: str) -> Any:
    def connected(connection: Any, _: object) -> None:
        connection.execute(f"PRAGMA synchronous={synchronous}").close()

    return connected


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a median of EXTRA is above the limit."""
    parser = argparse.ArgumentParser(description="Medians of catalog inserts.")
    parser.add_argument("--versions", type=int, action="append", help="sizes of the catalog; default 1000 and 10000")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where to measure; default a temporary folder")
    chosen = parser.parse_args(arguments)
    worst = 0.0
    print("| versions | EXTRA, ms | FULL, ms |\n|---|---|---|")
    with TemporaryDirectory(dir=chosen.folder) as folder:
        for versions in chosen.versions or [1_000, 10_000]:
            extra, full = (medians(Path(folder), versions, chosen.runs, mode) for mode in ("EXTRA", "FULL"))
            print(f"| {versions:,} | {extra:.1f} | {full:.1f} |")
            worst = max(worst, extra)
    return int(worst > LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())
