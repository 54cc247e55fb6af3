"""Measures the exact merge against what gives no such promise: a float32 `addmm`, and float64 with one rounding.

    python benchmarks/exact_merge.py [--size N] [--runs N] [--threads N] [--device cpu|cuda]

Each adapter is low-rank and in float32. GB/s are bytes of the weight over the median time; all are run in turns so that
a busy machine slows all of them. The last column counts the weights that the float32 `addmm` does not round correctly.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from loramgr.algebra.exact import merge_exact
from loramgr.algebra.rounding import round_float64
from loramgr.algebra.terms import LowRankTerm

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANKS = (4, 16, 64)
Merge = Callable[[torch.Tensor, LowRankTerm], torch.Tensor]
SCALING = 2.0


def addmm(weight: torch.Tensor, term: LowRankTerm) -> torch.Tensor:
    """Merge in float32 and cast."""
    return torch.addmm(weight.float(), term.left * term.scaling, term.right).to(weight.dtype)


def plain_float64(weight: torch.Tensor, term: LowRankTerm) -> torch.Tensor:
    """Merge in float64 and round once, with no proof that ties and cancellations come out right."""
    sums = torch.addmm(weight.double(), term.left.double() * term.scaling, term.right.double())
    return round_float64(sums, weight.dtype)


def proved(weight: torch.Tensor, term: LowRankTerm) -> torch.Tensor:
    """Merge exactly."""
    return merge_exact(weight, [term])


def seconds(merge: Merge, weight: torch.Tensor, term: LowRankTerm) -> float:
    """Return how long one merge takes."""
    start = time.perf_counter()
    merge(weight, term)
    if weight.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row(weight: torch.Tensor, rank: int, runs: int) -> str:
    """Return one line of the table."""
    rows, columns = weight.shape
    left, right = (torch.randn(shape, device=weight.device) / 50 for shape in ((rows, rank), (rank, columns)))
    term = LowRankTerm(left, right, SCALING)
    merges = (proved, addmm, plain_float64)
    rounds = [[seconds(merge, weight, term) for merge in merges] for _ in range(runs + 1)]
    gigabytes = weight.numel() * weight.element_size() / 1e9
    speeds = [gigabytes / statistics.median(times) for times in zip(*rounds[1:], strict=True)]
    wrong = int((proved(weight, term) != addmm(weight, term)).sum())
    cells = [str(weight.dtype).removeprefix("torch."), str(rank), *(f"{speed:.2f}" for speed in speeds)]
    return f"| {' | '.join(cells)} | {wrong / weight.numel():.2g} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="GB/s of the exact merge and of two that promise less.")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    weight = torch.randn(arguments.size, arguments.size, device=arguments.device) / 50
    print("| weight | rank | exact | float32 addmm | plain float64 | wrong in float32 |")
    print("|---|---|---|---|---|---|")
    for dtype in DTYPES:
        for rank in RANKS:
            print(row(weight.to(dtype), rank, arguments.runs), flush=True)
    print(
        f"\nmedians of {arguments.runs} runs, {arguments.size}², {arguments.threads} threads, torch {torch.__version__}"
    )
    where = torch.cuda.get_device_name(weight.device) if weight.is_cuda else torch.backends.cpu.get_cpu_capability()
    print(f"Python {platform.python_version()}, {platform.machine()}, {where}")


if __name__ == "__main__":
    main()
