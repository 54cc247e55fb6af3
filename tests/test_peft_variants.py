from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields
from loramgr.formats.peft_methods import TUNERS, method_name, obstacle_of
from loramgr.formats.peft_variants import kept_whole, obstacle_of_variant, peft_type, refuse_variants

UNSET = [None, False, {}, [], ""]


def _check(**content: object) -> None:
    fields = Fields(Path("adapter_config.json"), {"peft_type": "LORA", **content})
    refuse_variants(fields, peft_type(fields))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("alora_invocation_tokens", [1], "aLoRA"),
        ("layer_replication", [[0, 2]], "layer_replication"),
        ("use_qalora", True, "QALoRA"),
        ("arrow_config", {"top_k": 3}, "Arrow"),
        ("kasa_config", {"beta": 1}, "KaSA"),
    ],
)
def test_variants_that_are_kept_and_not_merged(key: str, value: object, message: str) -> None:
    for each, expected in ((value, message), *((unset, None) for unset in UNSET)):
        fields = Fields(Path("adapter_config.json"), {"peft_type": "LORA", key: each})
        refuse_variants(fields, "LORA")
        kept = kept_whole(fields)
        reason = obstacle_of_variant(fields, "LORA") or (kept and kept[1])
        assert (reason is None) if expected is None else (expected in str(reason))


@given(st.text(min_size=1))
def test_every_method_has_a_name_and_others_an_obstacle(name: str) -> None:
    method = peft_type(Fields(Path("adapter_config.json"), {"peft_type": name}))
    assert method == name.upper()
    assert method_name(method)
    assert obstacle_of(method)


def test_every_key_of_peft_is_known_or_refused() -> None:
    import peft
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
    for method in TUNERS:
        config = getattr(peft, peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)].__name__)
        for key in {field.name for field in dataclasses.fields(config)} - {"peft_type"}:
            try:
                _check(**{"peft_type": method, key: 7})
            except IncompatibleError as error:
                assert unknown not in error.message or method == "ADALORA", (method, key)  # noqa: PT017
