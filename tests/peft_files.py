"""Small PEFT adapters on disk, for tests: by hand, byte for byte, and as PEFT itself writes them."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path
from typing import Any

from loramgr.tensorfile import TensorSpec, encode_header

PREFIX = "base_model.model."
PLAIN = {"m.q.lora_A.weight": (2, 4), "m.q.lora_B.weight": (6, 2)}


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """Write float32 tensors of halves under PEFT's prefix; a name that starts with `!` goes without it."""
    specs = [
        TensorSpec(name[1:] if name.startswith("!") else PREFIX + name, "F32", shape) for name, shape in shapes.items()
    ]
    data = b"".join(struct.pack("<f", 0.5) * spec.elements for spec in specs)
    path.write_bytes(encode_header(specs, metadata) + data)
    return path


def write_adapter(
    folder: Path,
    shapes: dict[str, tuple[int, ...]] | None = None,
    metadata: dict[str, str] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter of rank 2 and alpha 4 and return its folder; a configuration value of `...` drops the key."""
    folder.mkdir(exist_ok=True)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], **config}
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    write_weights(folder / "adapter_model.safetensors", PLAIN if shapes is None else shapes, metadata)
    return folder


def tiny_llama(tied: bool = False) -> Any:
    """Return a Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
            max_position_embeddings=16,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def tiny_gpt2() -> Any:
    """Return a GPT-2 of one layer with random weights (Conv1D layers, tied head)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
    )


def save_with_peft(folder: Path, model: Any, config: Any, **options: Any) -> Any:
    """Wrap the model, save its untrained adapter to the folder and return the live PEFT model."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = get_peft_model(model, config)
        live.save_pretrained(folder, **options)
    return live
