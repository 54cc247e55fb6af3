from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields
from loramgr.formats.peft_variants import peft_type, refuse_variants

UNSET = [None, False, {}, [], ""]


def _check(**content: object) -> None:
    fields = Fields(Path("adapter_config.json"), {"peft_type": "LORA", **content})
    refuse_variants(fields, peft_type(fields))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("alora_invocation_tokens", [1], "aLoRA"),
        ("layer_replication", [[0, 2]], "layer_replication"),
        ("target_parameters", ["mlp.experts.down_proj"], "target_parameters"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("use_qalora", True, "QALoRA"),
        ("arrow_config", {"top_k": 3}, "Arrow"),
        ("velora_config", {"scale": 1.0}, "VeLoRA"),
        ("monteclora_config", {"num_samples": 8}, "MonteCLoRA"),
        ("enable_lora", [True, False, True], "enable_lora"),
        ("megatron_config", {"x": 1}, "Megatron"),
        ("loftq_config", {"loftq_bits": 4}, "LoftQ"),
        ("use_something_new", True, "'use_something_new' with the value True is not known"),
        ("new_number", 0, "is not known"),
    ],
)
def test_variants_are_refused_only_when_set(key: str, value: object, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        _check(**{key: value})
    for unset in UNSET:
        _check(**{key: unset})


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("pissa", "PiSSA"),
        ("pissa_niter_16", "PiSSA"),
        ("PiSSA", "PiSSA"),
        ("olora", "OLoRA"),
        ("OLoRA", "OLoRA"),
        ("corda", "CorDA"),
        ("loftq", "LoftQ"),
        ("lora_ga", "LoRA-GA"),
        ("EVA", "is not known"),
        ("svd", "is not known"),
        (1, "init_lora_weights is 1"),
    ],
)
def test_initialisations_that_change_the_base(init: object, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        _check(init_lora_weights=init)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica", "MiCA"])
def test_initialisations_that_leave_the_base(init: object) -> None:
    _check(init_lora_weights=init)


@given(st.text(min_size=1).filter(lambda text: text.upper() not in ("LORA", "TRAINABLE_TOKENS")))
def test_no_other_method_passes(name: str) -> None:
    with pytest.raises(IncompatibleError, match="peft_type"):
        _check(peft_type=name)


def test_every_key_of_peft_is_known_or_refused() -> None:
    from peft import LoraConfig, TrainableTokensConfig
    from peft.utils import PeftType

    for config in (LoraConfig(), TrainableTokensConfig()):
        fields = Fields(Path("c"), config.to_dict() | {"peft_type": config.peft_type.value})
        refuse_variants(fields, peft_type(fields))
    unknown = "is not known"
    for field in dataclasses.fields(LoraConfig):
        if field.name != "peft_type":
            try:
                _check(**{field.name: 7})
            except IncompatibleError as error:
                assert unknown not in error.message, field.name  # noqa: PT017
    for method in PeftType:
        if method.value not in ("LORA", "TRAINABLE_TOKENS"):
            with pytest.raises(IncompatibleError, match=f"peft_type {method.value} "):
                _check(peft_type=method.value)
