import json
from pathlib import Path
from typing import Any

import pytest

from loramgr.checkpoints.config import ConfigChange, adapted_config, encode_config
from loramgr.errors import IncompatibleError

BERT = {"architectures": ["BertModel"], "hidden_size": 4, "model_type": "bert", "vocab_size": 9}
FOUR = {"classifier.weight": (4, 8), "classifier.bias": (4,)}


def classified(config: dict[str, Any], **change: Any) -> dict[str, Any]:
    return adapted_config(config, ConfigChange("SEQ_CLS", FOUR, **change))


def test_nothing_to_say_changes_nothing() -> None:
    for change in (ConfigChange(), ConfigChange("SEQ_CLS"), ConfigChange("CAUSAL_LM", {"lm_head.weight": (9, 4)})):
        assert adapted_config(BERT, change) == BERT


def test_the_base_is_left_alone() -> None:
    before = json.dumps(BERT)
    classified(BERT, vocab_size=10)
    assert json.dumps(BERT) == before


def test_a_head_on_minilm(minilm_base: Path) -> None:
    config = json.loads((minilm_base / "config.json").read_text())
    adapted = classified(config)
    assert adapted["architectures"] == ["BertForSequenceClassification"]
    assert adapted["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2", "3": "LABEL_3"}
    assert adapted["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2, "LABEL_3": 3}
    assert [key for key in adapted if key in config] == list(config)
    assert {key: adapted[key] for key in config if key != "architectures"} == {
        key: config[key] for key in config if key != "architectures"
    }


@pytest.mark.parametrize(
    ("base", "task", "architecture"),
    [
        ("BertModel", "SEQ_CLS", "BertForSequenceClassification"),
        ("BertForMaskedLM", "TOKEN_CLS", "BertForTokenClassification"),
        ("BertForPreTraining", "QUESTION_ANS", "BertForQuestionAnswering"),
        ("GPT2LMHeadModel", "SEQ_CLS", "GPT2ForSequenceClassification"),
        ("GPT2DoubleHeadsModel", "SEQ_CLS", "GPT2ForSequenceClassification"),
        ("XLMWithLMHeadModel", "SEQ_CLS", "XLMForSequenceClassification"),
        ("LlamaForCausalLM", "SEQ_CLS", "LlamaForSequenceClassification"),
        ("T5ForConditionalGeneration", "SEQ_CLS", "T5ForSequenceClassification"),
        ("BertForSequenceClassification", "SEQ_CLS", "BertForSequenceClassification"),
        ("LlamaForCausalLM", "CAUSAL_LM", "LlamaForCausalLM"),
        ("LlamaForCausalLM", None, "LlamaForCausalLM"),
        ("Mystery", "SEQ_CLS", "Mystery"),
    ],
)
def test_architectures(base: str, task: str | None, architecture: str) -> None:
    adapted = adapted_config({**BERT, "architectures": [base]}, ConfigChange(task, {"score.weight": (2, 4)}))
    assert adapted["architectures"] == [architecture]


def test_architectures_by_model_type() -> None:
    for model_type, name in (("bert", "Bert"), ("gpt2", "GPT2"), ("xlm-roberta", "XLMRoberta")):
        assert classified({"model_type": model_type})["architectures"] == [f"{name}ForSequenceClassification"]
    assert "architectures" not in classified({"model_type": "mystery"})


def test_every_class_of_the_table_exists() -> None:
    pytest.importorskip("transformers")
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from loramgr.checkpoints.config import _CLASS_NAMES

    for model_type, name in _CLASS_NAMES.items():
        found = MODEL_MAPPING_NAMES[model_type]
        assert f"{name}Model" in ([found] if isinstance(found, str) else found)


@pytest.mark.parametrize(
    "head", ["classifier.weight", "score.weight", "classifier.out_proj.weight", "model.qa_outputs.weight"]
)
def test_labels_follow_the_head(head: str) -> None:
    heads = {"classifier.dense.weight": (8, 8), head: (3, 8)}
    adapted = adapted_config(BERT, ConfigChange("SEQ_CLS", heads))
    assert len(adapted["id2label"]) == len(adapted["label2id"]) == 3
    assert "num_labels" not in adapted


def test_labels_that_fit_are_kept() -> None:
    named = {"id2label": {str(number): name for number, name in enumerate("abcd")}, "label2id": {}, "num_labels": 2}
    adapted = classified({**BERT, **named})
    assert adapted["id2label"] == named["id2label"]
    assert adapted["num_labels"] == 4


def test_vocabulary() -> None:
    assert adapted_config(BERT, ConfigChange(vocab_size=12))["vocab_size"] == 12
    nested = {"model_type": "gemma3", "text_config": {"vocab_size": 9}}
    expected = {"model_type": "gemma3", "text_config": {"vocab_size": 12}}
    assert adapted_config(nested, ConfigChange(vocab_size=12)) == expected
    assert adapted_config({}, ConfigChange(vocab_size=12)) == {"vocab_size": 12}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype(key: str) -> None:
    config = {key: "float32", "text_config": {key: "float32"}}
    adapted = adapted_config(config, ConfigChange(dtype="BF16"))
    assert adapted == {key: "bfloat16", "text_config": {key: "bfloat16"}}
    assert adapted_config({}, ConfigChange(dtype="F16")) == {"torch_dtype": "float16"}


def test_untied() -> None:
    assert adapted_config(BERT, ConfigChange(untied=True))["tie_word_embeddings"] is False
    nested = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}
    adapted = adapted_config(nested, ConfigChange(untied=True))
    assert adapted == {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}
    with pytest.raises(IncompatibleError, match="t5 model cannot be untied"):
        adapted_config({"model_type": "t5"}, ConfigChange(untied=True))


def test_bytes_are_those_of_transformers(tinyllama_base: Path) -> None:
    data = (tinyllama_base / "config.json").read_bytes()
    assert encode_config(json.loads(data)) == data
