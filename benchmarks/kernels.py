"""Measures merge, unmerge and switch on a GPU against a copy of the weight, `addmm` and PEFT.

    python benchmarks/kernels.py [--quick] [--runs N] [--json FILE]

Every figure is the time of a device copy of the weight (one read and one write) over the time of the work: 1 is the
speed of memory, 0.5 takes twice as long. Medians; all that stands in a line ran in turns. Deltas are 5% of the weight.
PEFT is its own `merge_adapter` and `unmerge_adapter` of one linear layer; its base does not come back. The last columns
are the share of weights that ours and PEFT's changed after a merge and an unmerge.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from loramgr.algebra import engine
from loramgr.algebra.factors import Factors

SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192), (12288, 12288))
COLUMNS = ("TB/s copy", "addmm", "merge", "merge+residual", "unmerge", "switch", "PEFT merge", "PEFT unmerge",
           "PEFT both", "residual", "changed", "PEFT changed")  # fmt: skip
Work = Callable[[], object]


def factors_of(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> Factors:
    """Return random factors whose product is 5% of a weight of deviation 0.02."""
    left = torch.randn(shape[0], rank, device="cuda")
    right = torch.randn(rank, shape[1], device="cuda") * (0.05 * 0.02 / rank**0.5)
    return Factors(left.to(dtype), right.to(dtype), 1.0)


def timed(work: Work) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Run the work between two events; the GPU is busy until all of it is queued, so only its own time counts."""
    torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    work()
    stop.record()
    return start, stop


def milliseconds(rounds: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    """Return the median time, the first two rounds left out."""
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(stop) for start, stop in rounds[2:]))


class Peer:
    """PEFT's own merge of one linear layer of the same weight and factors."""

    def __init__(self, weight: torch.Tensor, factors: Factors) -> None:
        from peft import LoraConfig, get_peft_model

        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        config = LoraConfig(r=factors.rank, lora_alpha=factors.rank, target_modules=["0"], init_lora_weights=False)
        self._model: Any = get_peft_model(torch.nn.Sequential(layer), config, autocast_adapter_dtype=False)
        layers: Any = self._model.base_model.model
        self.layer = layers[0]
        self.layer.lora_A["default"].weight.data = factors.right.clone()
        self.layer.lora_B["default"].weight.data = factors.left.clone()

    def merge(self) -> None:
        """Merge, as `merge_adapter` does."""
        self._model.merge_adapter()

    def unmerge(self) -> None:
        """Unmerge, as `unmerge_adapter` does."""
        self._model.unmerge_adapter()


def changed(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the share of weights whose bits differ."""
    integer = torch.int16 if one.element_size() == 2 else torch.int32
    return float((one.view(integer) != other.view(integer)).double().mean())


def measure(shape: tuple[int, int], rank: int, dtype: torch.dtype, adapter: torch.dtype, runs: int) -> dict[str, float]:
    """Return one line of the table."""
    base = (torch.randn(shape, device="cuda") * 0.02).to(dtype)
    weight, other = base.clone(), torch.empty_like(base)
    old, new = factors_of(shape, rank, adapter), factors_of(shape, rank, adapter)
    left, right = old.left.to(dtype), old.right.to(dtype)
    peer = Peer(base, old)
    times: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in COLUMNS}
    kept: dict[str, engine.Merged] = {}

    def note(name: str, work: Work) -> None:
        times[name].append(timed(work))

    def merge() -> None:
        kept["old"] = engine.merge_(weight, old, residual=True, wait=False)

    def switch() -> None:
        residual = kept["old"].residual
        assert residual is not None
        kept["new"] = engine.switch_(weight, old, residual, new, wait=False)

    def unmerge() -> None:
        residual = kept["new"].residual
        assert residual is not None
        engine.unmerge_(weight, new, residual)

    for _ in range(runs + 2):
        note("TB/s copy", lambda: other.copy_(base))
        weight.copy_(base)
        note("addmm", lambda: weight.addmm_(left, right))
        weight.copy_(base)
        note("merge", lambda: engine.merge_(weight, old, residual=False))
        weight.copy_(base)
        note("merge+residual", merge)
        engine.settle([kept["old"]])
        note("switch", switch)
        engine.settle([kept["new"]])
        note("unmerge", unmerge)
        note("PEFT merge", peer.merge)
        note("PEFT unmerge", peer.unmerge)
    copy = milliseconds(times["TB/s copy"])
    line = {name: copy / milliseconds(rounds) for name, rounds in times.items() if rounds}
    line["TB/s copy"] = 2 * base.nbytes / copy / 1e9
    line["PEFT both"] = 1 / (1 / line["PEFT merge"] + 1 / line["PEFT unmerge"])
    assert kept["old"].residual is not None
    line["residual"] = kept["old"].residual.nbytes / base.nbytes
    line["changed"], line["PEFT changed"] = changed(weight, base), changed(peer.layer.base_layer.weight.data, base)
    return line


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Merging on a GPU as fractions of the speed of a copy.")
    parser.add_argument("--quick", action="store_true", help="only the shapes and ranks that targets are set for")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    halves = (torch.bfloat16, torch.float16)
    cases = list(product(SHAPES, (4, 16, 64), halves, (torch.bfloat16, torch.float32)))
    if arguments.quick:
        cases = [((12288, 12288), 16, halves[0], each) for each in (halves[0], torch.float32)]
        cases += [((8192, 8192), 64, halves[0], each) for each in (halves[0], torch.float32)]
    lines = []
    print(f"| shape | r | weight | adapter | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    for shape, rank, dtype, adapter in cases:
        line = measure(shape, rank, dtype, adapter, arguments.runs)
        names = [str(each).removeprefix("torch.") for each in (dtype, adapter)]
        cells = [f"{line[name]:.2g}" if "changed" in name else f"{line[name]:.2f}" for name in COLUMNS]
        print(f"| {shape[0]}×{shape[1]} | {rank} | {' | '.join([*names, *cells])} |", flush=True)
        lines.append({"shape": shape, "rank": rank, "weight": names[0], "adapter": names[1], **line})
        torch.cuda.empty_cache()
    print(f"\nmedians of {arguments.runs} runs, {torch.cuda.get_device_name()}, {versions()}")
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1))


def versions() -> str:
    """Return the versions of what was measured."""
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "peft"))


if __name__ == "__main__":
    main()
