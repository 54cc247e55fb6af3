"""Time `linear` of three adapters over a Llama-8B's worth of modules beside PEFT's `svd` way, and measure the memory.

usage: python benchmarks/compose.py [--modules 224] [--size 4096] [--rank 16] [--device cpu] [--skip-dense]

Prints the seconds to read the factors of three adapters, combine and write them, with their exact error; the same
truncated to the rank of one; and those of the dense way, which adds up the deltas of ONE module as PEFT 0.21.2's
`combination_type="svd"` does, decomposes the sum with `torch.linalg.svd(full_matrices=True)`, and is multiplied by the
number of modules. Peak memory is that of the process above what it had before, relative to the bytes of all factors.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from loramgr.formats import read_adapter
from loramgr.formats.peft_writer import Origins, WrittenFactors, write_peft
from loramgr.workspace.combining import Part, combine

WEIGHTS = (0.5, 0.3, 0.2)


def random_adapter(folder: Path, modules: int, size: int, rank: int) -> None:
    """Write an adapter of random float32 factors."""
    generator = torch.Generator().manual_seed(len(folder.name))

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        pair = torch.randn(2, rank * size, generator=generator)
        return pair[0].reshape(rank, size), pair[1].reshape(size, rank) / size

    names = (f"model.layers.{index // 7}.m{index % 7}" for index in range(modules))
    factors = {name: WrittenFactors("linear", (rank, size), (size, rank), "F32", make, 2.0) for name in names}
    folder.mkdir()
    write_peft(folder, factors, [], Origins())


def ours(folders: list[Path], output: Path, rank: int | None, device: str) -> tuple[float, float]:
    """Combine the adapters as `loramgr compose` does, without the catalog; return seconds and one module's error."""
    from loramgr.algebra.composing.composed import Parameters

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `loramgr compose` does: the cores of low-rank deltas are too small to be shared
    started = time.perf_counter()
    parts = [Part(f.name, read_adapter(f), weight) for f, weight in zip(folders, WEIGHTS, strict=True)]
    combination = combine(parts, Parameters("linear", rank), "F32", device, lambda view: False)
    output.mkdir()
    write_peft(output, combination.factors, combination.tensors, Origins())
    seconds = time.perf_counter() - started
    torch.set_num_threads(threads)
    return seconds, min(combination.account.modules, key=lambda module: module.name).relative_error


def dense(folders: list[Path], rank: int, device: str) -> tuple[float, float]:
    """Do the same module as PEFT's `svd` does; return seconds and relative error."""
    adapters = [read_adapter(folder) for folder in folders]
    name = min(adapters[0].updates)
    started = time.perf_counter()
    deltas = []
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        update = adapter.updates[name]
        lora_A, lora_B = (view.load().to(device) for view in update.views())
        deltas.append(lora_B @ lora_A * 2.0 * weight)
    total = torch.stack(deltas).sum(0)
    left, values, right = torch.linalg.svd(total, full_matrices=True)
    kept = (left[:, :rank] * values[:rank]).cpu(), right[:rank].cpu()
    seconds = time.perf_counter() - started
    whole = total.cpu().double()
    return seconds, float((kept[0].double() @ kept[1].double() - whole).norm() / whole.norm())


def peak() -> int:
    """Return the largest resident size so far in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", type=int, default=224)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip-dense", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("a", "bb", "ccc")]
        for folder in folders:
            random_adapter(folder, options.modules, options.size, options.rank)
        if options.device != "cpu":
            torch.linalg.qr(torch.randn(64, 64, device=options.device))  # the libraries load here
        small = Path(scratch) / "one"
        random_adapter(small, 1, options.size, options.rank)
        ours([small] * 3, Path(scratch) / "warm", None, options.device)
        factors = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
        before = peak()
        exact, error = ours(folders, Path(scratch) / "exact", None, options.device)
        above = max(0, peak() - before)
        print(f"linear, exact:      {exact:8.2f} s for {options.modules} modules, error {error:.1e}")
        print(f"peak memory:        {above / factors:8.3f} of the factors' {factors / 1e6:.0f} MB")
        short, error = ours(folders, Path(scratch) / "short", options.rank, options.device)
        print(f"linear, rank {options.rank}:    {short:8.2f} s, error {error:.6f}")
        if options.skip_dense:
            return
        one, error = dense(folders, options.rank, options.device)
        whole = one * options.modules
        print(f"dense, rank {options.rank}:     {one:8.2f} s for one module, error {error:.6f}; {whole:.0f} s for all")
        print(f"ratios:             {whole / exact:8.0f} (exact), {whole / short:.0f} (rank {options.rank})")


if __name__ == "__main__":
    main()
