"""Adapters that we write: read back by ourselves, and by PEFT, which computes with them what was meant."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_files import tiny_gpt2, tiny_llama

from loramgr.adapter import LowRank, Replacement
from loramgr.errors import IncompatibleError
from loramgr.formats import read_adapter
from loramgr.formats.peft_writer import WEIGHTS, Origins, WrittenFactors, WrittenTensor, alpha_of, write_peft
from loramgr.tensorfile import TensorSpec, read_header
from loramgr.tensors import as_bytes, dtype_name

Q, V, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"
DIGEST = "sha256:" + "ab" * 32
Pair = tuple[torch.Tensor, torch.Tensor]


def pair(a: Sequence[int], b: Sequence[int], seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*a, generator=generator), torch.randn(*b, generator=generator) / 4


def linear(pair: Pair, scaling: float = 1.0, *, kind: str = "linear", flipped: bool = False) -> WrittenFactors:
    a, b = pair
    return WrittenFactors(kind, tuple(a.shape), tuple(b.shape), dtype_name(a.dtype), lambda: pair, scaling, flipped)


def whole(name: str, tensor: torch.Tensor) -> WrittenTensor:
    return WrittenTensor(TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)), lambda: as_bytes(tensor))


def written(
    folder: Path, factors: Mapping[str, WrittenFactors], tensors: Sequence[WrittenTensor] = (), origins: Any = None
) -> Path:
    folder.mkdir(exist_ok=True)
    write_peft(folder, factors, tensors, origins or Origins())
    return folder


def config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content


def peft_logits(model: torch.nn.Module, folder: Path, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing or unexpected keys, and of a layout that PEFT corrects
        warnings.filterwarnings("ignore", category=FutureWarning)
        live = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        output = live(**batch)
    found: torch.Tensor = getattr(output, "logits", output)
    return found


def changed_logits(
    model: torch.nn.Module, changes: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return what the model computes with some of its parameters replaced, computed before PEFT wraps it."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({**before, **changes})
    with torch.no_grad():
        output = model.eval()(**batch)
    model.load_state_dict(before)
    found: torch.Tensor = getattr(output, "logits", output)
    return found.clone()


TOKENS = {"input_ids": torch.arange(12).reshape(2, 6)}


def delta(made: Pair, scaling: float = 1.0) -> torch.Tensor:
    return scaling * made[1].flatten(1) @ made[0].flatten(1)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    q, v = pair((3, 8), (8, 3)), pair((2, 8), (4, 2), 1)
    head = torch.randn(16, 8).bfloat16()
    origins = Origins("llama", DIGEST, "CAUSAL_LM", ["q_proj", "v_proj"])
    folder = written(tmp_path / "a", {Q: linear(q, 0.75), V: linear(v, 0.1)}, [whole("lm_head.weight", head)], origins)

    adapter = read_adapter(folder)

    assert sorted(adapter.updates) == ["lm_head.weight", f"{Q}.weight", f"{V}.weight"]
    for name, made, scaling in ((Q, q, 0.75), (V, v, 0.1)):
        update = adapter.updates[f"{name}.weight"]
        assert isinstance(update, LowRank)
        assert torch.equal(update.lora_A.load(), made[0])
        assert torch.equal(update.lora_B.load(), made[1])
        assert (update.rank, update.scaling) == (made[0].shape[0], scaling)
    saved = adapter.updates["lm_head.weight"]
    assert isinstance(saved, Replacement)
    assert torch.equal(saved.tensor.load(), head)
    assert (adapter.base_name, adapter.base_digest, adapter.task_type) == ("llama", DIGEST, "CAUSAL_LM")
    assert adapter.target_modules == ("q_proj", "v_proj")
    assert adapter.warnings == ()


def test_peft_computes_with_ranks_and_alphas_of_every_module(tmp_path: Path) -> None:
    model, made = tiny_llama(), {Q: pair((3, 8), (8, 3)), V: pair((2, 8), (4, 2), 1), UP: pair((2, 8), (12, 2), 2)}
    scalings = {Q: 0.75, V: 2.0, UP: 1 / 3}
    folder = written(tmp_path / "a", {name: linear(made[name], scalings[name]) for name in made})
    state = model.state_dict()
    changes = {f"{name}.weight": state[f"{name}.weight"] + delta(made[name], scalings[name]) for name in made}
    wanted = changed_logits(model, changes, TOKENS)

    found = peft_logits(model, folder, TOKENS)

    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    content = config(folder)
    assert content["rank_pattern"] == {Q: 3}
    assert content["r"] == 2
    assert len(content["alpha_pattern"]) == 2


def test_peft_computes_with_embeddings_saved_modules_and_norms(tmp_path: Path) -> None:
    model = tiny_llama()
    table, q = pair((2, 16), (8, 2)), pair((2, 8), (8, 2), 1)
    head, norm = torch.randn(16, 8), torch.rand(8) + 0.5
    folder = written(
        tmp_path / "a",
        {"model.embed_tokens": linear(table, 0.5, kind="embedding"), Q: linear(q)},
        [whole("lm_head.weight", head), whole("model.norm.weight", norm)],
    )
    state = model.state_dict()
    changes = {
        "model.embed_tokens.weight": state["model.embed_tokens.weight"] + delta(table, 0.5).T,
        f"{Q}.weight": state[f"{Q}.weight"] + delta(q),
        "lm_head.weight": head,
        "model.norm.weight": norm,
    }
    wanted = changed_logits(model, changes, TOKENS)

    found = peft_logits(model, folder, TOKENS)

    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert config(folder)["modules_to_save"] == ["lm_head", "model.norm"]
    update = read_adapter(folder).updates["model.embed_tokens.weight"]
    assert isinstance(update, LowRank)
    assert update.kind == "embedding"


def test_peft_computes_with_conv1d_and_replaced_biases(tmp_path: Path) -> None:
    model, name = tiny_gpt2(), "transformer.h.0.attn.c_attn"
    made, bias, other = pair((2, 8), (24, 2)), torch.randn(24), torch.randn(8)
    folder = written(
        tmp_path / "a",
        {name: linear(made, 2.0, flipped=True)},
        [whole(f"{name}.bias", bias), whole("transformer.h.0.mlp.c_proj.bias", other)],
    )
    weight = model.state_dict()[f"{name}.weight"] + delta(made, 2.0).T
    changes = {f"{name}.weight": weight, f"{name}.bias": bias, "transformer.h.0.mlp.c_proj.bias": other}
    wanted = changed_logits(model, changes, TOKENS)

    found = peft_logits(model, folder, TOKENS)

    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert config(folder)["fan_in_fan_out"] is True
    assert config(folder)["bias"] == "all"
    read = read_adapter(folder).updates
    assert isinstance(read[f"{name}.bias"], Replacement)
    assert isinstance(read["transformer.h.0.mlp.c_proj.bias"], Replacement)


def test_the_bias_of_a_module_with_factors_is_that_of_its_layer(tmp_path: Path) -> None:
    model, name = tiny_gpt2(), "transformer.h.0.attn.c_attn"
    made, bias = pair((2, 8), (24, 2)), torch.randn(24)
    folder = written(tmp_path / "a", {name: linear(made, flipped=True)}, [whole(f"{name}.bias", bias)])
    weight = model.state_dict()[f"{name}.weight"] + delta(made).T
    wanted = changed_logits(model, {f"{name}.weight": weight, f"{name}.bias": bias}, TOKENS)
    assert (peft_logits(model, folder, TOKENS) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (config(folder)["bias"], config(folder)["modules_to_save"]) == ("lora_only", None)


class Convolutions(torch.nn.Module):
    """A convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.lin = torch.nn.Linear(5, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.lin(self.conv(pixels).mean((2, 3)))
        return found


def test_peft_computes_with_convolutions(tmp_path: Path) -> None:
    model, made, lin = Convolutions(), pair((2, 3, 3, 3), (5, 2, 1, 1)), pair((2, 5), (4, 2), 1)
    factors = {"conv": linear(made, 0.5, kind="conv"), "lin": linear(lin, 0.5)}
    folder = written(tmp_path / "a", factors)
    state, batch = model.state_dict(), {"pixels": torch.randn(2, 3, 6, 6)}
    changes = {
        "conv.weight": state["conv.weight"] + delta(made, 0.5).reshape(5, 3, 3, 3),
        "lin.weight": state["lin.weight"] + delta(lin, 0.5),
    }
    wanted = changed_logits(model, changes, batch)
    assert (peft_logits(model, folder, batch) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    update = read_adapter(folder).updates["conv.weight"]
    assert isinstance(update, LowRank)
    assert update.kind == "conv"


def test_a_module_whose_name_ends_anothers_keeps_its_own_rank_and_alpha(tmp_path: Path) -> None:
    names = {"q": (2, 1.0), "text.q": (3, 0.5), "text.x.q": (3, 0.5), "text.v": (3, 0.5)}
    factors = {name: linear(pair((rank, 8), (8, rank)), scaling) for name, (rank, scaling) in names.items()}
    adapter = read_adapter(written(tmp_path / "a", factors))
    for name, (rank, scaling) in names.items():
        update = adapter.updates[f"{name}.weight"]
        assert isinstance(update, LowRank)
        assert (update.rank, update.scaling) == (rank, scaling), name
    assert config(tmp_path / "a")["rank_pattern"] == {"^q": 2}


def test_a_name_with_the_signs_of_expressions_is_taken_as_it_is(tmp_path: Path) -> None:
    factors = {
        "a.q": linear(pair((2, 8), (8, 2))),
        "a.q+1": linear(pair((3, 8), (8, 3))),
        "b.q": linear(pair((2, 8), (8, 2))),
    }
    assert read_adapter(written(tmp_path / "a", factors)).ranks == {"a.q": 2, "a.q+1": 3, "b.q": 2}


def test_only_whole_tensors(tmp_path: Path) -> None:
    tensor = torch.randn(16, 8)
    adapter = read_adapter(written(tmp_path / "a", {}, [whole("lm_head.weight", tensor)]))
    assert list(adapter.updates) == ["lm_head.weight"]
    assert adapter.ranks == {}


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    from safetensors import safe_open

    made = pair((2, 8), (8, 2))
    path = written(tmp_path / "a", {Q: linear(made)}, origins=Origins(base_digest=DIGEST)) / WEIGHTS
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == [f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"]
        assert torch.equal(file.get_tensor(f"base_model.model.{Q}.lora_B.weight"), made[1])
        assert file.metadata() == {"format": "pt", "base_digest": DIGEST}
    assert read_header(path).data_start % 8 == 0


def test_factors_are_made_one_module_at_a_time_in_order(tmp_path: Path) -> None:
    made: list[str] = []

    def factors(name: str) -> WrittenFactors:
        def make() -> Pair:
            made.append(name)
            return pair((2, 8), (8, 2))

        return WrittenFactors("linear", (2, 8), (8, 2), "F32", make)

    written(tmp_path / "a", {name: factors(name) for name in (V, Q)})
    assert made == [V, Q]


def test_what_peft_could_not_read_back_is_refused_by_name(tmp_path: Path) -> None:
    made = {Q: linear(pair((2, 8), (8, 2)))}
    with pytest.raises(IncompatibleError, match="nothing to write"):
        written(tmp_path / "a", {})
    with pytest.raises(IncompatibleError, match="scale: PEFT saves parameters of modules only"):
        written(tmp_path / "a", made, [whole("scale", torch.ones(2))])
    with pytest.raises(IncompatibleError, match=r"q_proj\.weight: it cannot be replaced as a whole"):
        written(tmp_path / "a", made, [whole(f"{Q}.weight", torch.ones(8, 8))])
    assert list((tmp_path / "a").iterdir()) == []


def test_factors_that_are_not_what_was_announced_are_an_error_of_ours(tmp_path: Path) -> None:
    wrong = WrittenFactors("linear", (2, 8), (8, 2), "F32", lambda: pair((3, 8), (8, 3)))
    with pytest.raises(ValueError, match=r"lora_A\.weight was made as"):
        written(tmp_path / "a", {Q: wrong})


@given(scaling=st.floats(1e-6, 1e6), rank=st.integers(1, 4096))
def test_an_alpha_gives_the_scaling_bit_for_bit_or_is_refused(scaling: float, rank: int) -> None:
    try:
        alpha = alpha_of(scaling, rank)
    except IncompatibleError:
        near = scaling * rank
        for _ in range(4):
            near = math.nextafter(near, -math.inf)
        for _ in range(9):
            assert near / rank != scaling
            near = math.nextafter(near, math.inf)
    else:
        assert alpha / rank == scaling
