"""Writes a GGUF model as a bfloat16 safetensors folder: `python dequantize.py FILE.gguf FOLDER`.

transformers reads GGUF but refuses to save what it read, so the tensors go through a fresh model of the same
configuration. The folder appears by rename, so a run that is cut off leaves none.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM


def dequantize(source: Path, folder: Path) -> None:
    """Read the GGUF file and make the folder."""
    quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    model = LlamaForCausalLM(quantized.config)
    model.load_state_dict(quantized.state_dict(), strict=False)
    model.tie_weights()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        model.to(torch.bfloat16).save_pretrained(Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)


if __name__ == "__main__":
    dequantize(Path(sys.argv[1]), Path(sys.argv[2]))
