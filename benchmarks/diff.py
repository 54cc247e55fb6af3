"""Measures `diff` of two adapters over all linear modules of a Llama-8B's size, without the import of torch.

    python benchmarks/diff.py [--runs N] [--rank R] [--dtype float32]

224 modules of 4096². The floor is the reading of both files' tensors in as many threads. Medians over processes that
take turns; the files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

MODULES = 224
SIZE = 4096
LIMIT = 2.0
COMPARE = """
import sys, time, torch
from loramgr import Workspace
workspace = Workspace(sys.argv[3])
workspace.list()
start = time.perf_counter()
report = workspace.diff(sys.argv[1], sys.argv[2])
assert report.summary.changed == len(report.modules)
print(time.perf_counter() - start)
"""
READ = """
import os, sys, time, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from loramgr.formats import read_adapter
start = time.perf_counter()
views = [view for path in sys.argv[1:3] for view in read_adapter(Path(path)).tensors.values()]
with ThreadPoolExecutor(os.cpu_count()) as pool:
    for _ in pool.map(lambda view: view.load(), views): pass
print(time.perf_counter() - start)
"""


def write_adapter(folder: Path, seed: int, rank: int, dtype: str) -> Path:
    """Write an adapter of random factors and return its folder."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for position in range(MODULES):
        module = f"base_model.model.model.layers.{position // 7}.self_attn.m{position % 7}_proj"
        for name, shape in (("lora_A", (rank, SIZE)), ("lora_B", (SIZE, rank))):
            values = torch.randn(shape, generator=generator) * 0.02
            tensors[f"{module}.{name}.weight"] = values.to(getattr(torch, dtype))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [f"m{position}_proj" for position in range(7)]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main() -> int:
    """Print the medians; 1 when the comparison is above the limit."""
    parser = argparse.ArgumentParser(description="`diff` of two adapters against the reading of their files.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    times: dict[str, list[float]] = {COMPARE: [], READ: []}
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        paths = [write_adapter(root / name, seed, options.rank, options.dtype) for seed, name in enumerate("ab")]
        for _ in range(options.runs + 1):  # the first fills caches
            for code, measured in times.items():
                command = [sys.executable, "-c", code, *map(str, paths), str(root / "home")]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                measured.append(float(done.stdout))
    own, floor = (statistics.median(measured[1:]) for measured in times.values())
    size = f"{MODULES} modules of {SIZE}², r={options.rank}, {options.dtype}"
    print(f"{size}: diff {own:.2f} s, reading both files {floor:.2f} s; {options.runs} runs, {os.cpu_count()} cores")
    return int(own > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
