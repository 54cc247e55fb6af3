"""Measures adding many adapters at once against copying, syncing and hashing the same files.

    python benchmarks/bulk_add.py [--adapters N] [--runs N] [--folder DIR]

The peer is what a careful person does by hand: `cp -r`, `sync`, `sha256sum`. The floor is `cp -r` and `sync` alone.
Medians of whole processes, taken in turns so that a busy machine slows all of them; syncs are counted by strace, where
it is installed, in a run of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from loramgr.tensorfile import TensorSpec, encode_header

LIMIT = 1.0
SYNCS_A_BLOB = 2.0
LAYERS, RANK, WIDTH = 16, 8, 1024
CONFIGURATION = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
LORAMGR = [sys.executable, "-m", "loramgr"]
SYNCS = ("fsync", "fdatasync", "sync", "syncfs", "sync_file_range", "msync")


def make_adapters(folder: Path, count: int) -> None:
    """Write adapters of 2 MiB of float32, all different, as PEFT names them; a fixed seed."""
    specs = [
        TensorSpec(
            f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{factor}.weight",
            "F32",
            (RANK, WIDTH) if factor == "A" else (WIDTH, RANK),
        )
        for layer in range(LAYERS)
        for name in ("q_proj", "v_proj")
        for factor in "AB"
    ]
    header = encode_header(specs, {"format": "pt"})
    generator = random.Random(0)
    for at in range(count):
        data = bytearray(generator.randbytes(sum(spec.nbytes for spec in specs)))
        data[3::4] = b"\x3c" * (len(data) // 4)  # finite floats of the size of weights
        adapter = folder / f"adapter-{at:05d}"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(json.dumps(CONFIGURATION))
        (adapter / "adapter_model.safetensors").write_bytes(header + data)


def seconds(work: Callable[[], object]) -> float:
    """Return how long the work takes, beginning with nothing left to write to the disk."""
    os.sync()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(*command: str | Path) -> None:
    """Run a command that must succeed, its output thrown away."""
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def add(source: Path, home: Path) -> None:
    """Add all adapters to a home, in a process of its own."""
    run(*LORAMGR, "--home", home, "--quiet", "add", source)


def copy(source: Path, target: Path) -> None:
    """Copy a folder and make the file system durable: the floor."""
    run("cp", "-r", source, target)
    run("sync", "-f", target)


def copy_and_hash(source: Path, target: Path) -> None:
    """Copy, sync and hash what was copied: the peer."""
    copy(source, target)
    run("find", target, "-type", "f", "-exec", "sha256sum", "{}", "+")


def measure(source: Path, folder: Path, runs: int) -> list[float]:
    """Return the medians of adding, of the peer and of the floor."""
    target = folder / "target"
    rounds = []
    for _ in range(runs):
        times = []
        for work in (add, copy_and_hash, copy):
            times.append(seconds(lambda work=work: work(source, target)))  # type: ignore[misc]
            shutil.rmtree(target)
        rounds.append(times)
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def count_syncs(source: Path, folder: Path) -> tuple[dict[str, int], int] | None:
    """Return how often each call that syncs was made, and how many blobs there are then; None without strace."""
    strace = shutil.which("strace")
    if strace is None:
        return None
    home, trace = folder / "target", folder / "trace"
    traced: list[str | Path] = [strace, "-f", "-qq", "-o", trace, "-e", f"trace={','.join(SYNCS)}"]
    run(*traced, *LORAMGR, "--home", home, "--quiet", "add", source)
    calls = re.findall(rf"^\d+ +({'|'.join(SYNCS)})\(", trace.read_text(), re.MULTILINE)
    blobs = sum(path.is_file() for path in (home / "store" / "blobs").rglob("*"))
    shutil.rmtree(home)
    return {name: calls.count(name) for name in SYNCS if name in calls}, blobs


def table(times: Sequence[float], size: int) -> list[str]:
    """Return the lines of a Markdown table; ratios are to the peer."""
    names = ("loramgr add DIR", "cp -r, sync, sha256sum (peer)", "cp -r, sync (floor)")
    rows = [
        f"| {name} | {took:.2f} | {size / took / 1e6:.0f} | {took / times[1]:.2f} |"
        for name, took in zip(names, times, strict=True)
    ]
    return ["| | s | MB/s | ratio |", "|---|---|---|---|", *rows]


def main() -> int:
    """Print the table; 1 when adding is slower than the peer or syncs too often."""
    parser = argparse.ArgumentParser(description="Adding many adapters against copying, syncing and hashing them.")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Where to work: the disk that is measured.")
    options = parser.parse_args()
    with TemporaryDirectory(dir=options.folder) as name:
        folder, source = Path(name), Path(name) / "source"
        make_adapters(source, options.adapters)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        times = measure(source, folder, options.runs)
        counted = count_syncs(source, folder)
    print("\n".join(table(times, size)))
    print(
        f"\n{options.adapters} adapters, {size / 1e9:.2f} GB, median of {options.runs}; load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
    )
    if counted is None:
        return int(times[0] > LIMIT * times[1])
    calls, blobs = counted
    rate = sum(calls.values()) / blobs
    told = ", ".join(f"{count} {name}" for name, count in calls.items())
    print(f"syncs: {told}; {rate:.2f} for each of {blobs} blobs")
    return int(times[0] > LIMIT * times[1] or rate > SYNCS_A_BLOB)


if __name__ == "__main__":
    sys.exit(main())
