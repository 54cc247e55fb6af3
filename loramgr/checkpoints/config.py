"""The config.json of a merged model: what an adapter changes of it, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loramgr.checkpoints.families import can_untie
from loramgr.errors import IncompatibleError

__all__ = ["ConfigChange", "adapted_config", "encode_config"]

_TASK_ENDINGS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_ENDINGS = (
    *_TASK_ENDINGS.values(), "ForMaskedLM", "ForCausalLM", "ForPreTraining", "ForConditionalGeneration",
    "ForMultipleChoice", "ForNextSentencePrediction", "WithLMHeadModel", "LMHeadModel", "DoubleHeadsModel", "Model",
)  # fmt: skip
_CLASS_NAMES = {
    "albert": "Albert", "bart": "Bart", "bert": "Bert", "bloom": "Bloom", "camembert": "Camembert",
    "convbert": "ConvBert", "deberta": "Deberta", "deberta-v2": "DebertaV2", "distilbert": "DistilBert",
    "electra": "Electra", "ernie": "Ernie", "esm": "Esm", "falcon": "Falcon", "flaubert": "Flaubert",
    "funnel": "Funnel", "gemma": "Gemma", "gemma2": "Gemma2", "gpt2": "GPT2", "gpt_bigcode": "GPTBigCode",
    "gpt_neo": "GPTNeo", "gpt_neox": "GPTNeoX", "gptj": "GPTJ", "llama": "Llama", "longformer": "Longformer",
    "mbart": "MBart", "mistral": "Mistral", "mixtral": "Mixtral", "mobilebert": "MobileBert",
    "modernbert": "ModernBert", "mpnet": "MPNet", "opt": "OPT", "phi": "Phi", "phi3": "Phi3", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "roberta": "Roberta", "roformer": "RoFormer", "squeezebert": "SqueezeBert",
    "stablelm": "StableLm", "starcoder2": "Starcoder2", "t5": "T5", "xlm": "XLM", "xlm-roberta": "XLMRoberta",
    "xlnet": "XLNet",
}  # fmt: skip
_LABEL_HEADS = ("classifier.out_proj.weight", "classifier.weight", "score.weight", "qa_outputs.weight")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """What a merge does to a model, as far as its configuration must say so.

    `task_type` as PEFT spells it; `heads` maps the tensors that were replaced or added whole to their shapes;
    `vocab_size` and `dtype` (as safetensors spells it) are None where they stay; `untied` says that names which the
    base ties are now tensors of their own.
    """

    task_type: str | None = None
    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    vocab_size: int | None = None
    dtype: str | None = None
    untied: bool = False


def adapted_config(config: Mapping[str, Any], change: ConfigChange) -> dict[str, Any]:
    """Return the configuration of the merged model: the base's, in its order, with what the change requires.

    Equal to the base's when nothing has to be said. Raises IncompatibleError where untying would change the model.
    """
    adapted = copy.deepcopy(dict(config))
    labels = _label_count(change.heads)
    if labels is not None:
        _set_architecture(adapted, change.task_type)
        _set_labels(adapted, labels)
    for level in _levels(adapted):
        _set_sizes(level, change)
    if change.vocab_size is not None and not any("vocab_size" in level for level in _levels(adapted)):
        adapted["vocab_size"] = change.vocab_size
    if change.dtype is not None and not any({"dtype", "torch_dtype"} & level.keys() for level in _levels(adapted)):
        adapted["torch_dtype"] = _DTYPES[change.dtype]
    if change.untied:
        _untie(adapted)
    return adapted


def encode_config(config: Mapping[str, Any]) -> bytes:
    """Return the bytes of config.json as transformers lays it out, in the given order of keys."""
    return json.dumps(config, indent=2).encode() + b"\n"


def _levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the configuration and, where it has one, that of its text model."""
    text_config = config.get("text_config")
    return [config, text_config] if isinstance(text_config, dict) else [config]


def _label_count(heads: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the number of labels that a head among the tensors has, None without one."""
    for ending in _LABEL_HEADS:
        for name, shape in sorted(heads.items()):
            if (name == ending or name.endswith(f".{ending}")) and shape:
                return shape[0]
    return None


def _set_architecture(config: dict[str, Any], task_type: str | None) -> None:
    """Name the class that has the task's head; a model type without a known class is left to transformers."""
    ending = _TASK_ENDINGS.get(task_type or "")
    if ending is None:
        return
    architectures = config.get("architectures")
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else None
    stem = _CLASS_NAMES.get(str(config.get("model_type"))) if named is None else _stem(named)
    if stem is not None:
        config["architectures"] = [stem + ending]


def _stem(architecture: str) -> str | None:
    """Return the class name without its task, None for a class named otherwise."""
    stems = (architecture.removesuffix(ending) for ending in _ENDINGS if architecture.endswith(ending))
    return next(stems, None)


def _set_labels(config: dict[str, Any], count: int) -> None:
    """Give the labels numbers for names, unless the base names that many."""
    labels = config.get("id2label")
    if not (isinstance(labels, dict) and len(labels) == count):
        config["id2label"] = {str(index): f"LABEL_{index}" for index in range(count)}
        config["label2id"] = {f"LABEL_{index}": index for index in range(count)}
    if "num_labels" in config:
        config["num_labels"] = count


def _set_sizes(level: dict[str, Any], change: ConfigChange) -> None:
    if change.vocab_size is not None and "vocab_size" in level:
        level["vocab_size"] = change.vocab_size
    for key in ("dtype", "torch_dtype"):
        if change.dtype is not None and key in level:
            level[key] = _DTYPES[change.dtype]


def _untie(config: dict[str, Any]) -> None:
    if not can_untie(config.get("model_type")):
        raise IncompatibleError(
            f"a {config['model_type']} model cannot be untied: its configuration would scale the output head otherwise",
            "use an adapter that leaves the embeddings alone",
        )
    config["tie_word_embeddings"] = False
    for level in _levels(config):
        if "tie_word_embeddings" in level:
            level["tie_word_embeddings"] = False
