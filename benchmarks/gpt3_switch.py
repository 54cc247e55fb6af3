"""Merges, switches and unmerges a set of weights of GPT-3 175B's shape on one GPU, and proves the base by its digest.

    python benchmarks/gpt3_switch.py [--layers N] [--size N] [--rank N] [--json FILE]

96 layers × q and v of 12288² in bfloat16 are 58 GB, an adapter of rank 4 in bfloat16 37.7 MB. Times are compared with
reading and writing all of the weights once. The digest covers every tensor's sha256, before and after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from loramgr.algebra import engine
from loramgr.algebra.engine import Merged
from loramgr.algebra.factors import Factors
from loramgr.tensors import as_bytes


def adapter(number: int, size: int, rank: int) -> list[Factors]:
    """Return one pair of factors for each weight, their products 5% of weights of deviation 0.02."""
    scale = 0.05 * 0.02 / rank**0.5
    pairs = [(torch.randn(size, rank, device="cuda"), torch.randn(rank, size, device="cuda")) for _ in range(number)]
    return [Factors(left.bfloat16(), (right * scale).bfloat16(), 1.0) for left, right in pairs]


def digest(weights: list[torch.Tensor]) -> str:
    """Return the sha256 of the sha256 of every tensor's bytes."""

    def one(weight: torch.Tensor) -> bytes:
        return hashlib.sha256(as_bytes(weight.cpu())).digest()

    with ThreadPoolExecutor(8) as threads:
        return hashlib.sha256(b"".join(threads.map(one, weights))).hexdigest()


def seconds(work: Callable[[], object]) -> float:
    """Return how long the work takes, to the end of what it queued."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_all(weights: list[torch.Tensor], buffer: torch.Tensor) -> None:
    """Read every weight and write as many bytes."""
    for weight in weights:
        buffer.copy_(weight)


def merge_all(weights: list[torch.Tensor], task: list[Factors], kept: list[Merged]) -> None:
    """Merge a task everywhere."""
    kept[:] = [engine.merge_(w, f, residual=True, wait=False) for w, f in zip(weights, task, strict=True)]
    engine.settle(kept)


def switch_all(weights: list[torch.Tensor], old: list[Factors], new: list[Factors], kept: list[Merged]) -> None:
    """Switch everywhere; each old residual is freed before the next new one is made."""
    for place, weight in enumerate(weights):
        residual = kept[place].residual
        assert residual is not None
        kept[place] = engine.switch_(weight, old[place], residual, new[place], wait=False)
    engine.settle(kept)


def unmerge_all(weights: list[torch.Tensor], task: list[Factors], kept: list[Merged]) -> None:
    """Take a task out everywhere."""
    for weight, factors, merged in zip(weights, task, kept, strict=True):
        assert merged.residual is not None
        engine.unmerge_(weight, factors, merged.residual)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="Switch tasks on GPT-3-sized weights.")
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--size", type=int, default=12288)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    number, size = 2 * arguments.layers, arguments.size
    weights = [torch.empty(size, size, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02) for _ in range(number)]
    old, new = adapter(number, size, arguments.rank), adapter(number, size, arguments.rank)
    warm, buffer = weights[0].clone(), torch.empty_like(weights[0])
    kept: list[Merged] = []
    merge_all([warm], old[:1], kept)
    switch_all([warm], old[:1], new[:1], kept)
    unmerge_all([warm], new[:1], kept)
    del warm
    before = digest(weights)
    figures = {
        "copy": min(seconds(lambda: copy_all(weights, buffer)) for _ in range(3)),
        "merge": seconds(lambda: merge_all(weights, old, kept)),
        "switch": seconds(lambda: switch_all(weights, old, new, kept)),
        "switch back": seconds(lambda: switch_all(weights, new, old, kept)),
    }
    residuals = sum(merged.residual.nbytes for merged in kept if merged.residual is not None)
    figures["unmerge"] = seconds(lambda: unmerge_all(weights, old, kept))
    after = digest(weights)
    peak = torch.cuda.max_memory_allocated()
    print(f"{number} weights of {size}², {number * weights[0].nbytes / 1e9:.1f} GB; {torch.cuda.get_device_name()}")
    print(
        f"adapter {sum(f.left.nbytes + f.right.nbytes for f in old) / 1e6:.1f} MB, residuals {residuals / 1e9:.2f} GB"
    )
    for name, value in figures.items():
        print(f"{name}: {value * 1e3:.1f} ms, {value / figures['copy']:.2f} × one read and write")
    print(f"peak memory {peak / 1e9:.1f} GB; digest before {before[:12]}, after {after[:12]}, equal: {before == after}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**figures, "peak": peak, "residuals": residuals, "equal": before == after})
        )


if __name__ == "__main__":
    main()
