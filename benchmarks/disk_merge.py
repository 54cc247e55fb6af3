"""Measures merging an adapter into a model folder against copying the folder, and against a script with PEFT.

    python benchmarks/disk_merge.py [--gigabytes N]... [--runs N] [--folder DIR] [--no-peft]

Whole processes, in turns so that a busy machine slows all of them, and each turn begins with another one, since what a
process leaves in memory and on the disk helps or hinders the next; medians, and medians of the ratios of one turn.
`cp -r` and `sync` is the floor. The time of `import torch`, measured in the same turn, is taken off both Python
programs. Peak resident memory is that of the process, as the kernel counts it. The base is registered beforehand.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from loramgr.cores import usable_cores
from loramgr.tensorfile import TensorSpec, encode_header

WIDTH, INNER, VOCABULARY, HEADS, KEY_HEADS = 2048, 5632, 32000, 32, 4
LAYER_BYTES = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 8 + 3 * WIDTH * INNER + 2 * WIDTH)
SHARD_BYTES = 460_000_000
LIMITS = {"q,v r=4": 1.5, "all-linear r=16": 3.5}
FASTER_THAN_PEFT = {"q,v r=4": 2.5, "all-linear r=16": 3.0}
MEMORY_BYTES = 400_000_000 + 3 * 2 * VOCABULARY * WIDTH
TARGETS = {
    "q,v r=4": (4, ("q_proj", "v_proj")),
    "all-linear r=16": (16, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
}
PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size="450MB")
"""


class Run(NamedTuple):
    """What one process took: seconds of wall clock and of CPU, and its peak resident bytes."""

    seconds: float
    cpu: float
    peak: int


def shapes() -> dict[str, tuple[int, int]]:
    """Return (out, in) of a layer's linear modules."""
    key = WIDTH * KEY_HEADS // HEADS
    attention = {"q_proj": (WIDTH, WIDTH), "k_proj": (key, WIDTH), "v_proj": (key, WIDTH), "o_proj": (WIDTH, WIDTH)}
    inner = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    return {f"self_attn.{name}": shape for name, shape in attention.items()} | {
        f"mlp.{name}": shape for name, shape in inner.items()
    }


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a Llama of so many layers, as transformers has them."""
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for layer in range(layers):
        for name, shape in shapes().items():
            yield f"model.layers.{layer}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCABULARY, WIDTH)


def make_base(folder: Path, layers: int) -> None:
    """Write a Llama in bfloat16 with weights of the usual size, in shards with an index."""
    import torch

    from loramgr.tensors import as_bytes

    folder.mkdir()
    shards: list[list[TensorSpec]] = [[]]
    for name, shape in tensors(layers):
        spec = TensorSpec(name, "BF16", shape)
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + spec.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for at, specs in enumerate(shards):
        name = f"model-{at + 1:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(encode_header(specs, {"format": "pt"}))
            for spec in specs:
                weight_map[spec.name] = name
                file.write(as_bytes((torch.randn(spec.shape, generator=generator) * 0.02).bfloat16()))
    total = sum(spec.nbytes for specs in shards for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(layers)))


def config(layers: int) -> dict[str, object]:
    """Return the configuration of the model."""
    return {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"},
        **{"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": layers, "vocab_size": VOCABULARY},
        **{"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "tie_word_embeddings": False},
    }


def make_adapter(folder: Path, layers: int, rank: int, targets: tuple[str, ...]) -> None:
    """Write an adapter in float32, as PEFT saves one, whose delta is about 5% of the weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for layer in range(layers):
        for name, (out, in_) in shapes().items():
            if name.rpartition(".")[2] in targets:
                module = f"base_model.model.model.layers.{layer}.{name}"
                factors[f"{module}.lora_A.weight"] = torch.randn(rank, in_, generator=generator) * 0.02
                factors[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.025 / rank**0.5
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps({**said, "target_modules": list(targets)}))


def apart(work: Callable[..., None], *arguments: object) -> None:
    """Do the work in a process of its own: the peak memory of a process counts what its parent had at the start."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def run(*command: str | Path) -> Run:
    """Run a command that must succeed, beginning with nothing left to write to the disk."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - started
    if status:
        assert process.stderr is not None
        raise SystemExit(f"{command[0]} failed:\n{process.stderr.read().decode()}")
    return Run(took, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def turn(place: Path, kind: str, first: int, *, peft: bool) -> dict[str, Run]:
    """Run every contender once, in a cycle from the given one, and return what each took."""
    output, base, adapter = place / "output", place / "base", place / kind.partition(" ")[0]
    loramgr: list[str | Path] = [sys.executable, "-m", "loramgr", "--home", place / "home", "--quiet"]
    runs = {"import": run(sys.executable, "-c", "import torch")}
    commands: dict[str, list[str | Path]] = {
        "loramgr": [*loramgr, "merge", "base", adapter, "-o", output],
        "copy": ["sh", "-c", f"cp -r '{base}' '{output}' && sync -f '{output}'"],
    }
    if peft:
        synced = f"'{sys.executable}' -c '{PEFT}' '{base}' '{adapter}' '{output}' && sync -f '{output}'"
        commands["peft"] = ["sh", "-c", synced]
    for at in range(len(commands)):
        name = list(commands)[(first + at) % len(commands)]
        runs[name] = run(*commands[name])
        shutil.rmtree(output)
    return runs


def medians(turns: list[dict[str, Run]], name: str) -> Run:
    """Return the medians of one contender."""
    return Run(*(statistics.median(values) for values in zip(*(each[name] for each in turns), strict=True)))


def ratio(turns: list[dict[str, Run]], name: str, to: str) -> float:
    """Return the median over the turns of the ratio of two contenders, without what `import torch` takes."""

    def net(runs: dict[str, Run], which: str) -> float:
        return runs[which].seconds - (0 if which == "copy" else runs["import"].seconds)

    return statistics.median(net(runs, name) / net(runs, to) for runs in turns)


def measure(place: Path, gigabytes: float, options: argparse.Namespace) -> bool:
    """Print the rows of a base of that size; True when all goals are met."""
    layers = round((gigabytes * 1e9 - 4 * VOCABULARY * WIDTH) / LAYER_BYTES)
    apart(make_base, place / "base", layers)
    run(sys.executable, "-m", "loramgr", "--home", place / "home", "base", "add", place / "base", "--name", "base")
    size = sum(file.stat().st_size for file in (place / "base").iterdir())
    met = True
    for kind, (rank, targets) in TARGETS.items():
        apart(make_adapter, place / kind.partition(" ")[0], layers, rank, targets)
        turns = [turn(place, kind, first, peft=not options.no_peft) for first in range(options.runs)]
        for name in sorted(turns[0].keys() - {"import"}):
            took = medians(turns, name)
            told = f"{took.seconds:.2f} | {ratio(turns, name, 'copy'):.2f} | {took.cpu:.1f} | {took.peak / 1e6:.0f}"
            print(f"| {size / 1e9:.1f} GB | {kind} | {name} | {told} |", flush=True)
        met &= ratio(turns, "loramgr", "copy") <= LIMITS[kind] and medians(turns, "loramgr").peak <= MEMORY_BYTES
        if not options.no_peft:
            met &= ratio(turns, "peft", "loramgr") >= FASTER_THAN_PEFT[kind]
    return met


def main() -> int:
    """Print the table; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description="Merging on disk against copying, and against PEFT.")
    parser.add_argument("--gigabytes", type=float, action="append", help="sizes of the base; default 2.2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work: the disk that is measured")
    parser.add_argument("--no-peft", action="store_true")
    options = parser.parse_args()
    print("| base | adapter | | s | of cp | CPU s | peak MB |\n|---|---|---|---|---|---|---|")
    met = True
    for gigabytes in options.gigabytes or [2.2]:
        with TemporaryDirectory(dir=options.folder) as name:
            met &= measure(Path(name), gigabytes, options)
    print(f"\nmedians of {options.runs}; load {os.getloadavg()[0]:.1f}; allowed memory {MEMORY_BYTES / 1e6:.0f} MB")
    print(f"Python {platform.python_version()}, torch {version('torch')}, {platform.machine()}, {usable_cores()} cores")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
