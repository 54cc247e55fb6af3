"""Switches one layer a thousand times among eight tasks and counts the weights that have changed, ours and PEFT's.

python benchmarks/task_switches.py [--size N] [--switches N] [--rank N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from loramgr.algebra import engine
from loramgr.algebra.factors import Factors

TASKS = 8


def ours(weight: torch.Tensor, tasks: list[Factors], switches: int) -> str:
    """Switch through the tasks in place and unmerge; return which kernel ran."""
    merged = engine.merge_(weight, tasks[0], residual=True)
    for turn in range(switches):
        assert merged.residual is not None
        merged = engine.switch_(weight, tasks[turn % TASKS], merged.residual, tasks[(turn + 1) % TASKS])
    assert merged.residual is not None
    return engine.unmerge_(weight, tasks[switches % TASKS], merged.residual)


def peft(weight: torch.Tensor, tasks: list[Factors], switches: int) -> torch.Tensor:
    """Do the same with PEFT's merge_adapter and unmerge_adapter; return the weight."""
    from peft import LoraConfig, get_peft_model

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    rank = tasks[0].rank
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
    model: Any = get_peft_model(torch.nn.Sequential(layer), config, adapter_name="0")
    for name in range(1, TASKS):
        model.add_adapter(str(name), config)
    tuned: Any = model.base_model.model[0]
    for name, task in enumerate(tasks):
        tuned.lora_A[str(name)].weight.data = task.right.clone()
        tuned.lora_B[str(name)].weight.data = task.left.clone()
    model.merge_adapter(["0"])
    for turn in range(switches):
        model.unmerge_adapter()
        model.merge_adapter([str((turn + 1) % TASKS)])
    model.unmerge_adapter()
    result: torch.Tensor = tuned.base_layer.weight.data
    return result


def drift(weight: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
    """Return how many weights changed, and by how much."""
    distance = (weight.float() - base.float()).abs()
    integer = torch.int16 if base.element_size() == 2 else torch.int32
    different = weight.view(integer) != base.view(integer)
    return {
        "changed": int(different.sum()),
        "share": float(different.double().mean()),
        "largest": float(distance.max()),
        "mean": float(distance.mean() / base.float().abs().mean()),
    }


def main() -> None:
    """Print both rows."""
    parser = argparse.ArgumentParser(description="Count what a thousand switches change.")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, rank = arguments.size, arguments.rank
    base = (torch.randn(size, size, device=device) * 0.02).bfloat16()
    scale = 0.05 * 0.02 / rank**0.5
    tasks = [
        Factors(torch.randn(size, rank, device=device), torch.randn(rank, size, device=device) * scale, 1.0)
        for _ in range(TASKS)
    ]
    weight = base.clone()
    kernel = ours(weight, tasks, arguments.switches)
    rows = {f"loramgr ({kernel})": drift(weight, base), "PEFT": drift(peft(base, tasks, arguments.switches), base)}
    print("| | weights changed | share | largest change | mean change / mean weight |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['changed']} | {row['share']:.3g} | {row['largest']:.3g} | {row['mean']:.3g} |")
    print(
        f"\n{size}², bfloat16, r={rank}, {TASKS} tasks of 5%, {arguments.switches} switches, then unmerged; on {device}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
