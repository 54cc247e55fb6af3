from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramgr.errors import IncompatibleError
from loramgr.formats.peft_keys import PREFIX, parse_keys

PARTS = st.sampled_from(["model", "layers", "0", "q_proj", "lora", "weight", "bias", "attn", "base"])
MODULES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
SUFFIXES = {
    "lora_A": ".lora_A{}.weight",
    "lora_B": ".lora_B{}.weight",
    "lora_bias": ".lora_B{}.bias",
    "embedding_A": ".lora_embedding_A{}",
    "embedding_B": ".lora_embedding_B{}",
    "magnitude": ".lora_magnitude_vector{}",
    "rows": ".token_adapter.trainable_tokens_delta{}",
}


@given(module=MODULES, role=st.sampled_from(sorted(SUFFIXES)), adapter=st.sampled_from(["", ".default", ".sql"]))
def test_every_key_comes_apart_again(module: str, role: str, adapter: str) -> None:
    name = PREFIX + module + SUFFIXES[role].format(adapter)
    (key,), unexplained = parse_keys([name])
    assert (key.name, key.module, key.role, unexplained) == (name, module, role, [])
    assert key.target == f"{module}.{'bias' if role == 'lora_bias' else 'weight'}"


@pytest.mark.parametrize(
    ("name", "role", "target"),
    [
        ("m.q.lora_magnitude_vector.weight", "magnitude", "m.q.weight"),
        ("m.q.lora_magnitude_vector.x.weight", "magnitude", "m.q.weight"),
        ("m.e.trainable_tokens_delta", "rows", "m.e.weight"),
        ("m.e.base_layer.weight", "base", "m.e.weight"),
        ("m.e.token_adapter.base_layer.weight", "base", "m.e.weight"),
        ("m.q.base_layer.bias", "base", "m.q.bias"),
        ("head.weight", "saved", "head.weight"),
        ("head.modules_to_save.default.out.weight", "saved", "head.out.weight"),
        ("bias", "saved", "bias"),
    ],
)
def test_the_keys_that_peft_writes(name: str, role: str, target: str) -> None:
    (key,), unexplained = parse_keys([PREFIX + name])
    assert (key.role, key.target, unexplained) == (role, target, [])


@pytest.mark.parametrize(
    "name",
    [
        "m.q.lora_A.weight",
        PREFIX + "m.q.lora_E",
        PREFIX + "m.q.lora_diag",
        PREFIX + "m.q.lora_A.x.y.weight",
        PREFIX + "m.q.lora_A.scale",
        PREFIX + "lora_A.weight",
        PREFIX + "m.e.token_adapter.token_indices",
        PREFIX + "m.e.trainable_tokens_original.default",
        PREFIX + "m.q.base_layer.qweight",
        PREFIX + "head.original_module.weight",
        "prompt_embeddings",
    ],
)
def test_the_keys_that_no_rule_explains(name: str) -> None:
    assert parse_keys([name]) == ([], [name])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.lora_A.weight", "a.lora_B.x.weight"], "do not agree on one adapter's name"),
        (["a.lora_A.x.weight", "a.lora_B.y.weight"], "'base_model.model.a.lora_A.x.weight', 'base_model"),
        (["a.base_layer.out_proj.lora_A.weight"], "wrapper inside a wrapper"),
        (["a.base_layer.lora_A.weight"], "wrapper inside a wrapper"),
        (["a.base_layer.base_layer.weight"], "wrapper inside a wrapper"),
        (["a.b.weight", "a.modules_to_save.default.b.weight"], "saved module inside a saved module"),
    ],
)
def test_wrappers_and_names_that_do_not_fit(names: list[str], message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        parse_keys([PREFIX + name for name in names])
