"""Compare what two composed adapters keep of their tasks with what PEFT's `linear` keeps of them.

usage: python benchmarks/compose_tasks.py BASE TOKENS.safetensors FIRST SECOND

BASE is a model folder, FIRST and SECOND are adapter folders, and the tokens of each task a tensor of the file. Prints
the mean next-token loss on every task for each adapter alone and for both at 0.5 each: by `loramgr compose` with
`linear` and `ties`, and by PEFT's `add_weighted_adapter(combination_type="linear")`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loramgr import AddOptions, ComposeOptions, Workspace


def losses(model: Any, tokens: dict[str, torch.Tensor]) -> str:
    """Return the mean next-token loss of every task, as text."""
    with torch.no_grad():
        found = {task: model(input_ids=ids, labels=ids).loss.item() for task, ids in sorted(tokens.items())}
    return "  ".join(f"{task} {loss:.4f}" for task, loss in found.items())


def main() -> None:
    """Run the comparison and print its figures."""
    base, tokens = Path(sys.argv[1]), load_file(sys.argv[2])
    first, second = Path(sys.argv[3]), Path(sys.argv[4])

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(Path(scratch) / "home")
        for name, folder in (("first", first), ("second", second)):
            workspace.add(folder, AddOptions(name=name))
        for method in ("linear", "ties"):
            workspace.compose([("first", 0.5), ("second", 0.5)], method, ComposeOptions(method))
            workspace.export(method, Path(scratch) / method)
            print(f"compose {method:8}", losses(PeftModel.from_pretrained(fresh(), Path(scratch) / method), tokens))
    model = PeftModel.from_pretrained(fresh(), first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "both", combination_type="linear")
    for name, label in (("both", "PEFT linear"), ("first", "first alone"), ("second", "second alone")):
        model.set_adapter(name)
        print(f"{label:16}", losses(model, tokens))


if __name__ == "__main__":
    main()
