"""Extraction of low-rank factors from a dense difference, against the dense decomposition in float32.

    python benchmarks/extract.py [--size 4096] [--rank 64] [--device cuda] [--runs 3]

The dense way is what merge tools do: `torch.linalg.svd(difference.float(), full_matrices=False)`, truncated. Both keep
float32 factors; the time of loramgr's includes the error that it measures. The spectrum falls as that of a full
fine-tune does (σ_i ~ i^-0.55: rank 64 of 4096 keeps about half of the energy).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from loramgr.algebra.extraction import extracted, residual_norm
from loramgr.algebra.goals import Goal

DECAY = 0.55


def difference(size: int, device: str) -> torch.Tensor:
    """Return a matrix (size, size) in float64 with a spectrum like that of a fine-tune."""
    generator = torch.Generator().manual_seed(0)
    both = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    left, right = (torch.linalg.qr(each).Q.double() for each in both)
    values = torch.arange(1, size + 1, dtype=torch.float64, device=device) ** -DECAY
    made: torch.Tensor = left * (values / 100) @ right.T
    return made


def dense(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left and right factors by the whole decomposition in float32."""
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def timed(run: Callable[[], object], device: str, runs: int) -> float:
    """Return the median seconds of some runs, the first one aside."""
    seconds = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    """Print time and energy kept of both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    matrix = difference(asked.size, asked.device)
    norm = float(matrix.norm())
    dense_seconds = timed(partial(dense, matrix, 1), asked.device, asked.runs)
    print(f"{asked.size} x {asked.size} on {asked.device}, dense float32: {dense_seconds * 1e3:.1f} ms")
    for rank in asked.rank:
        left, right = dense(matrix, rank)
        best = 1 - (residual_norm(matrix, left.double(), right.double()) / norm) ** 2
        goal = Goal(rank=rank)
        seconds = timed(partial(extracted, matrix, goal, "benchmark"), asked.device, asked.runs)
        made = extracted(matrix, goal, "benchmark")
        kept = 1 - (made.error / made.norm) ** 2
        print(
            f"rank {rank:4}: {seconds * 1e3:8.1f} ms, {dense_seconds / seconds:6.1f} times faster; "
            f"energy {kept:.6f} of {best:.6f} ({1 - kept / best:+.4%} less)"
        )


if __name__ == "__main__":
    main()
