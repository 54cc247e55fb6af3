import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramgr.checkpoints.families import (
    TieGroup,
    can_untie,
    is_input_embedding,
    is_known_type,
    is_output_head,
    is_vocabulary,
    tied_groups,
    tied_suffixes,
)
from loramgr.checkpoints.fingerprint import fingerprint
from loramgr.checkpoints.source import open_checkpoint
from loramgr.digests import tensors_digest

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}

TINY = {
    "vocab_size": 40, "hidden_size": 16, "d_model": 16, "n_embd": 16, "dim": 16, "emb_dim": 16, "embedding_size": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_attention_heads": 2, "n_head": 2,
    "n_heads": 2, "num_heads": 2, "intermediate_size": 24, "d_ff": 24, "hidden_dim": 24, "ffn_dim": 24, "d_kv": 8,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_key_value_heads": 2, "head_dim": 8, "n_positions": 32,
    "max_position_embeddings": 32, "word_embed_proj_dim": 16, "n_inner": 24, "state_size": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "num_mel_bins": 8, "max_source_positions": 32,
    "max_target_positions": 32, "attention_types": [[["global"], 2]],
}  # fmt: skip
CLASSES = [
    "AlbertForMaskedLM", "BartForCausalLM", "BartForConditionalGeneration", "BartModel", "BertForMaskedLM",
    "BertForSequenceClassification", "BertModel", "BlenderbotForConditionalGeneration", "BloomForCausalLM",
    "ConvBertForMaskedLM", "DebertaForMaskedLM", "DistilBertForMaskedLM", "ElectraForMaskedLM", "ElectraForPreTraining",
    "GPT2ForSequenceClassification", "GPT2LMHeadModel", "GPTNeoForCausalLM", "Gemma2ForCausalLM", "LlamaForCausalLM",
    "LlamaForSequenceClassification", "MBartForConditionalGeneration", "MPNetForMaskedLM", "MT5EncoderModel",
    "MambaForCausalLM", "MistralForCausalLM", "LayoutLMForMaskedLM", "ModernBertForMaskedLM", "OPTForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM", "RobertaForMaskedLM", "T5ForConditionalGeneration", "T5Model",
    "WhisperForConditionalGeneration", "XLMRobertaForMaskedLM", "XLMWithLMHeadModel",
]  # fmt: skip


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def models(transformers: Any, name: str) -> Iterator[tuple[bool | None, Any]]:
    """Yield a tiny model of the class as its configuration ties it, and with the tie said."""
    model_class = getattr(transformers, name)
    defaults = model_class.config_class()
    options = {key: value for key, value in TINY.items() if hasattr(defaults, key)}
    forced = model_class.config_class.model_type in ("t5", "mt5")
    for tie in (None,) if forced else (None, True, False):
        extra = {} if tie is None else {"tie_word_embeddings": tie}
        yield tie, model_class(model_class.config_class(**options, **extra))


@pytest.mark.parametrize("name", CLASSES)
def test_tables_and_digests_are_those_of_transformers(transformers: Any, tmp_path: Path, name: str) -> None:
    for number, (tie, model) in enumerate(models(transformers, name)):
        saved, pickled = tmp_path / f"{number}-saved", tmp_path / f"{number}-pickled"
        model.save_pretrained(saved)
        pickled.mkdir()
        torch.save(model.state_dict(), pickled / "pytorch_model.bin")
        config = json.loads((saved / "config.json").read_text())
        if tie is None:
            config.pop("tie_word_embeddings")
        ours, theirs = open_checkpoint(saved), open_checkpoint(pickled)
        for opened in (ours, theirs):
            groups = tied_groups(config, opened.tensors, opened.aliases)
            found = {tied: group.source for group in groups for tied in group.tied}
            assert found == model.all_tied_weights_keys
            assert all(group.known for group in groups)
        assert set(theirs.aliases) == set(model.all_tied_weights_keys)
        digests = [tensors_digest(fingerprint(opened, 1, False).values()) for opened in (ours, theirs)]
        assert digests[0] == digests[1]


def test_defaults_are_those_of_transformers(transformers: Any) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from loramgr.checkpoints import families

    wrong = [
        model_type
        for family, tied in itertools.product(families._FAMILIES, (True, False))
        for model_type in (family.tied if tied else family.untied).split()
        if getattr(CONFIG_MAPPING[model_type](), "tie_word_embeddings", False) is not tied
    ]
    assert wrong == []


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_names_with_and_without_the_prefix(prefix: str) -> None:
    names = [f"{prefix}wte.weight", f"{prefix}h.0.attn.c_attn.weight"]
    assert tied_groups(GPT2, names) == [TieGroup(f"{prefix}wte.weight", ("lm_head.weight",))]


def test_a_language_model_inside_another() -> None:
    names = ["vision_tower.x.weight", "language_model.model.embed_tokens.weight"]
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    assert tied_groups(config, names) == [TieGroup(names[1], ("language_model.lm_head.weight",))]
    names = ["model.vision_tower.x.weight", "model.language_model.embed_tokens.weight"]
    assert tied_groups(config, names) == [TieGroup(names[1], ("lm_head.weight",))]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({**BERT, "architectures": ["BertModel"]}, ["embeddings.word_embeddings.weight"]),
        ({**BERT, "architectures": ["BertForSequenceClassification"]}, ["bert.embeddings.word_embeddings.weight"]),
        ({"model_type": "bert"}, ["embeddings.word_embeddings.weight"]),
        ({**GPT2, "architectures": ["GPT2ForSequenceClassification"]}, ["transformer.wte.weight"]),
        ({**GPT2, "tie_word_embeddings": False}, ["transformer.wte.weight", "lm_head.weight"]),
        (LLAMA, ["model.embed_tokens.weight", "lm_head.weight"]),
        ({**LLAMA, "model_type": "mystery", "tie_word_embeddings": False}, ["model.embed_tokens.weight"]),
        ({"model_type": "mystery", "architectures": ["MysteryModel"]}, ["model.embed_tokens.weight"]),
        (None, ["model.embed_tokens.weight", "lm_head.weight"]),
        (None, ["fc1.weight"]),
    ],
)
def test_nothing_is_tied(config: dict[str, Any] | None, names: list[str]) -> None:
    assert tied_groups(config, names) == []


def test_without_architectures_the_names_tell() -> None:
    names = ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"]
    assert tied_groups({"model_type": "bert"}, names) == [
        TieGroup(names[0], ("cls.predictions.decoder.weight",)),
        TieGroup(names[1], ("cls.predictions.decoder.bias",)),
    ]
    assert tied_groups({"model_type": "gpt2"}, ["wte.weight"]) == [TieGroup("wte.weight", ("lm_head.weight",))]


@pytest.mark.parametrize("config", [None, {}, {"model_type": "mystery"}, {"architectures": ["MysteryForCausalLM"]}])
def test_what_nobody_can_know_is_a_guess(config: dict[str, Any] | None) -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    assert tied_groups(config, names) == [TieGroup(names[0], ("lm_head.weight",), known=False)]
    aliases = {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied_groups(config, names, aliases) == [TieGroup(names[0], ("lm_head.weight",))]


def test_the_text_configuration_says_it_too() -> None:
    config = {**LLAMA, "text_config": {"tie_word_embeddings": True}}
    assert tied_groups(config, ["model.embed_tokens.weight"])[0].tied == ("lm_head.weight",)
    assert tied_groups({**config, "tie_word_embeddings": False}, ["model.embed_tokens.weight"]) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["llama", "gpt2", "t5"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = ["model_type", "architectures", "tie_word_embeddings", "text_config"]


@given(st.dictionaries(st.sampled_from(KEYS), JSON), st.sets(st.sampled_from(["wte.weight", "lm_head.weight", "x"])))
def test_no_configuration_is_too_odd(config: dict[str, Any], names: set[str]) -> None:
    for group in tied_groups(config, names):
        assert group.source in names
        assert group.source not in group.tied


def test_t5_with_a_head_of_its_own() -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False}
    separate = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    assert tied_groups(config, ["shared.weight", "lm_head.weight"]) == [TieGroup("shared.weight", separate)]
    assert not can_untie("t5")
    assert can_untie("gpt2")
    assert can_untie(None)


def test_encoder_embeddings_yield_only_to_a_shared_one() -> None:
    assert "decoder.embed_tokens.weight" in tied_suffixes(["model.shared.weight"])
    assert "decoder.embed_tokens.weight" not in tied_suffixes(["model.decoder.embed_tokens.weight"])


def test_what_names_mean() -> None:
    assert is_known_type("llama")
    assert not is_known_type("mystery")
    assert not is_known_type(None)
    assert is_output_head("lm_head.weight")
    assert is_output_head("language_model.lm_head.weight")
    assert not is_output_head("model.norm.weight")
    assert is_input_embedding("bert.embeddings.word_embeddings.weight")
    assert not is_input_embedding("bert.embeddings.position_embeddings.weight")
    assert is_vocabulary("cls.predictions.bias")
    assert not is_vocabulary("model.layers.0.mlp.up_proj.weight")
