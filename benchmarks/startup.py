"""Measures what a command costs before it does anything, against the imports that it cannot do without.

    python benchmarks/startup.py [--runs N]

Medians of whole processes, taken in turns so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

LIMIT = 1.5
LORAMGR = [sys.executable, "-m", "loramgr"]
PAIRS = (
    ("loramgr --help", [*LORAMGR, "--help"], "import click"),
    ("loramgr --version", [*LORAMGR, "--version"], "import click"),
    ("loramgr list", [*LORAMGR, "list"], "import click, sqlalchemy.orm"),
)


def seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Return how long the process takes, from its start to its end."""
    start = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def medians(commands: Sequence[Sequence[str]], runs: int, environment: Mapping[str, str]) -> list[float]:
    """Return each command's median in milliseconds; a first round, which fills caches, does not count."""
    rounds = [[seconds(command, environment) for command in commands] for _ in range(runs + 1)]
    return [1000 * statistics.median(times) for times in zip(*rounds[1:], strict=True)]


def table(runs: int, environment: Mapping[str, str]) -> tuple[list[str], float]:
    """Return the lines of a Markdown table and the largest ratio in it."""
    commands = [each for _, command, imports in PAIRS for each in (command, [sys.executable, "-c", imports])]
    times = medians(commands, runs, environment)
    rows = list(zip(PAIRS, times[::2], times[1::2], strict=True))
    lines = ["| command | ms | against | ms | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| `{name}` | {own:.0f} | `{imports}` | {other:.0f} | {own / other:.2f} |"
        for (name, _, imports), own, other in rows
    ]
    return lines, max(own / other for _, own, other in rows)


def main() -> int:
    """Print the table; 1 when a ratio is above the limit."""
    parser = argparse.ArgumentParser(description="Medians of loramgr's start-up against those of its imports.")
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    with TemporaryDirectory() as folder:
        environment = os.environ | {"LORAMGR_HOME": str(Path(folder) / "home")}
        # So that `list` opens a catalog as every later command does.
        subprocess.run([*LORAMGR, "db", "upgrade"], env=environment, stdout=subprocess.DEVNULL, check=True)
        lines, worst = table(runs, environment)
    print("\n".join(lines))
    print(f"\nmedians of {runs} runs, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
