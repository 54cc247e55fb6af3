"""What transformers' model classes know and a model folder does not say: which names are one tensor.

The tables follow `_tied_weights_keys` and the configuration classes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CONV1D_MODULES",
    "CONV1D_TYPES",
    "TASKS_WITHOUT_VOCABULARY_HEAD",
    "TieGroup",
    "can_untie",
    "is_input_embedding",
    "is_known_type",
    "is_output_head",
    "is_vocabulary",
    "tied_groups",
    "tied_suffixes",
]

CONV1D_TYPES = frozenset({"gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer"})
# as PEFT spells them: the model's class for the task leaves the head over the vocabulary out
TASKS_WITHOUT_VOCABULARY_HEAD = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


@dataclass(frozen=True, slots=True)
class TieGroup:
    """Names that are one tensor: `source` is in the file; `tied` usually are not, and take its bytes.

    `known` is False when only a guess connects them: an adapter that touches `source` must then be refused.
    """

    source: str
    tied: tuple[str, ...]
    known: bool = True


@dataclass(frozen=True, slots=True)
class _Family:
    """Model types with the same ties: pairs (tied name, its source); `|` ends the prefix of the model without a head.

    `tied` and `untied` are the model types, by what `tie_word_embeddings` is where the configuration leaves it out;
    `always` families (T5) tie whatever it says, as long as the file has no head of its own.
    """

    pairs: tuple[tuple[str, str], ...]
    tied: str = ""
    untied: str = ""
    always: bool = False


_WORDS = "embeddings.word_embeddings.weight"


def _bert_like(prefix: str, tied: str, untied: str = "") -> _Family:
    pairs = (
        ("cls.predictions.decoder.weight", f"{prefix}|{_WORDS}"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    )
    return _Family(pairs, tied, untied)


_FAMILIES = (
    _Family(
        (("lm_head.weight", "model|embed_tokens.weight"),),
        tied="cohere cohere2 cohere2_moe ernie4_5 ernie4_5_moe gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text "
        "gemma4 gemma4_text jetmoe lfm2 lfm2_moe mistral3 paligemma recurrent_gemma smollm3 starcoder2 vaultgemma xglm",
        untied="apertus arcee bamba bitnet chameleon deepseek_v2 deepseek_v3 exaone4 falcon_h1 flex_olmo fuyu glm glm4 "
        "glm4_moe gpt_oss granite granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense jamba llama "
        "llama4 llama4_text llava llava_next llava_onevision minimax ministral mistral mistral4 mixtral nemotron olmo "
        "olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe "
        "qwen3_5_text qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe seed_oss stablelm",
    ),
    _Family(
        (("lm_head.weight", "transformer|wte.weight"),),
        tied="gpt-sw3 gpt2 gpt_bigcode gpt_neo mpt",
        untied="codegen dbrx gptj imagegpt",
    ),
    _Family((("lm_head.weight", "transformer|word_embeddings.weight"),), tied="bloom falcon"),
    _Family((("lm_head.weight", "transformer|tokens_embed.weight"),), tied="openai-gpt"),
    _Family((("lm_head.weight", "transformer|w.weight"),), tied="ctrl"),
    _Family((("lm_head.weight", "gpt_neox|embed_in.weight"),), untied="gpt_neox"),
    _Family((("embed_out.weight", "gpt_neox_japanese|embed_in.weight"),), tied="gpt_neox_japanese"),
    _Family((("lm_head.weight", "backbone|embeddings.weight"),), tied="falcon_mamba mamba", untied="mamba2"),
    _Family((("head.weight", "rwkv|embeddings.weight"),), untied="rwkv"),
    _Family((("output_projection.weight", "biogpt|embed_tokens.weight"),), tied="biogpt"),
    _Family((("lm_loss.weight", "transformer|word_embedding.weight"),), tied="xlnet"),
    _Family((("pred_layer.proj.weight", "transformer|embeddings.weight"),), tied="flaubert xlm"),
    _bert_like("bert", "bert big_bird megatron-bert"),
    _bert_like("deberta", "deberta deberta-v2"),
    _bert_like("transformer", "squeezebert"),
    _bert_like("model", "ernie fnet layoutlm lxmert mobilebert mra nomic_bert nystromformer roformer tapas yoso"),
    _Family(
        (("predictions.decoder.weight", f"albert|{_WORDS}"), ("predictions.decoder.bias", "predictions.bias")),
        tied="albert",
    ),
    _Family(
        (("lm_head.decoder.weight", f"roberta|{_WORDS}"), ("lm_head.decoder.bias", "lm_head.bias")),
        tied="bert-generation camembert data2vec-text ibert jina_embeddings_v3 longformer mpnet roberta "
        "roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod",
    ),
    _Family((("lm_head.decoder.weight", f"esm|{_WORDS}"),), tied="esm gte"),
    _Family((("lm_head.weight", f"funnel|{_WORDS}"),), tied="funnel"),
    _Family((("vocab_projector.weight", f"distilbert|{_WORDS}"),), tied="distilbert"),
    _Family((("generator_lm_head.weight", f"electra|{_WORDS}"),), tied="convbert electra"),
    _Family((("decoder.weight", "model|embeddings.tok_embeddings.weight"),), tied="modernbert modernbert-decoder"),
    _Family(
        (
            ("|encoder.embed_tokens.weight", "|shared.weight"),
            ("|decoder.embed_tokens.weight", "|shared.weight"),
            ("lm_head.weight", "|shared.weight"),
        ),
        tied="longt5 mt5 switch_transformers t5 umt5",
        always=True,
    ),
    _Family(
        (
            ("|encoder.embed_tokens.weight", "model|shared.weight"),
            ("|decoder.embed_tokens.weight", "model|shared.weight"),
            ("lm_head.weight", "model|shared.weight"),
            ("lm_head.weight", "model|decoder.embed_tokens.weight"),
        ),
        tied="bart bigbird_pegasus blenderbot blenderbot-small led m2m_100 marian mbart mvp nllb-moe opt pegasus "
        "pegasus_x plbart speech_to_text",
    ),
    _Family((("proj_out.weight", "model|decoder.embed_tokens.weight"),), tied="moonshine whisper"),
)
_BY_TYPE = {name: family for family in _FAMILIES for name in f"{family.tied} {family.untied}".split()}
_HEAD_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration",
                 "DoubleHeadsModel", "BertGenerationDecoder", "MTModel")  # fmt: skip
_SIDE_EMBEDDINGS = frozenset({"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"})
_EXTRA_SUFFIXES = ("decoder.output_projection.weight", "text_decoder_postnet.lm_head.weight", "output.weight",
                   "encoder.word_embeddings.weight", "decoder.word_embeddings.weight")  # fmt: skip


def _leaf(name: str) -> str:
    return name.partition("|")[2] or name


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


_HEADS = frozenset(_leaf(tied) for f in _FAMILIES for tied, _ in f.pairs if "|" not in tied)
_EMBEDDINGS = frozenset(_leaf(source) for f in _FAMILIES for _, source in f.pairs if "|" in source)


def is_known_type(model_type: object) -> bool:
    """Say whether the tables describe the model type; None, for a base without a configuration, is unknown."""
    return isinstance(model_type, str) and (model_type in _BY_TYPE or model_type in CONV1D_TYPES)


def can_untie(model_type: object) -> bool:
    """Say whether `tie_word_embeddings: false` only unties; in T5's classes it changes how the head is scaled."""
    family = _BY_TYPE.get(str(model_type))
    return family is None or not family.always


def is_output_head(name: str) -> bool:
    """Say whether the name is that of a matrix from hidden states to vocabulary."""
    return name.endswith(".weight") and any(_ends_with(name, head) for head in _HEADS)


def is_vocabulary(name: str) -> bool:
    """Say whether the tensor has one row for each entry of the vocabulary: embedding, head, or the head's bias."""
    return is_input_embedding(name) or is_output_head(name) or name.endswith(("predictions.bias", "lm_head.bias"))


def is_input_embedding(name: str) -> bool:
    """Say whether the name is that of a table of token embeddings."""
    return not is_output_head(name) and any(_ends_with(name, ending) for ending in _EMBEDDINGS)


def tied_suffixes(names: Collection[str]) -> tuple[str, ...]:
    """Return the endings of names that `save_pretrained` leaves out where they share storage with another name.

    The embeddings of an encoder and a decoder yield only to a `shared.weight`, without which they are the ones kept.
    """
    endings = _HEADS | set(_EXTRA_SUFFIXES)
    if any(_ends_with(name, "shared.weight") for name in names):
        endings |= _SIDE_EMBEDDINGS
    return tuple(sorted(endings))


def tied_groups(
    config: Mapping[str, Any] | None, names: Collection[str], aliases: Mapping[str, str] | None = None
) -> list[TieGroup]:
    """Say which names are one tensor when transformers opens the checkpoint, in the names of this checkpoint.

    `config` is config.json, None without one; `names` are the tensors of the files; `aliases` maps left-out name →
    kept name where the files themselves (`.bin`) share storage. Names may lack the prefix of the head's class
    (`wte.weight` for `transformer.wte.weight`); a model without a head has no tied head.
    """
    names = frozenset(names)
    groups: dict[str, list[str]] = {}
    for left_out, kept in (aliases or {}).items():
        groups.setdefault(kept, []).append(left_out)
    for tied, source in _config_pairs(config or {}, names):
        if tied != source and tied not in {name for group in groups.values() for name in group}:
            groups.setdefault(source, []).append(tied)
    known = [TieGroup(source, tuple(tied)) for source, tied in groups.items()]
    return known or _guesses(config, names)


def _config_pairs(config: Mapping[str, Any], names: Collection[str]) -> list[tuple[str, str]]:
    """Return pairs (tied name, source in the file) by the configuration's model type."""
    family = _BY_TYPE.get(str(config.get("model_type")))
    if family is None:
        return []
    declared = _declared(config)
    if declared is False and not family.always:
        return []
    if declared is None and config.get("model_type") not in family.tied.split():
        return []
    pairs = []
    for tied, source in family.pairs:
        found = _find_source(source, names) if _has_part(tied, _architecture(config), names) else None
        if found is not None and not (declared is False and tied in names):
            pairs.append((_tied_name(tied, source, found), found))
    return pairs


def _declared(config: Mapping[str, Any]) -> bool | None:
    """Return what the configuration says of tying, None when it leaves it to the model class."""
    text_config = config.get("text_config")
    for level in (config, text_config if isinstance(text_config, dict) else {}):
        if isinstance(level.get("tie_word_embeddings"), bool):
            return bool(level["tie_word_embeddings"])
    return None


def _has_part(tied: str, architecture: str, names: Collection[str]) -> bool:
    """Say whether a model of the architecture has the tied name; without an architecture the file's names tell."""
    if tied.startswith("|"):
        return not (architecture.endswith("EncoderModel") and "decoder" in tied)
    if architecture:
        return _has_head(architecture)
    siblings = tied.rpartition(".")[0].rpartition(".")[0]
    return not siblings or any(name.startswith(f"{siblings}.") for name in names)


def _has_head(architecture: str) -> bool:
    """Say whether the class has a matrix from hidden states to vocabulary; Electra's pretraining has none."""
    return architecture.endswith(_HEAD_ENDINGS) and architecture != "ElectraForPreTraining"


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def _find_source(source: str, names: Collection[str]) -> str | None:
    """Find the name in the file: as the class spells it, below a further prefix, or without the class's own one."""
    prefix, bar, leaf = source.rpartition("|")
    full = f"{prefix}.{leaf}" if prefix else leaf
    if full in names:
        return full
    endings = (full, leaf) if bar else ()
    for ending in endings:
        found = [name for name in names if _ends_with(name, ending)]
        if found:
            return min(found, key=lambda name: (name.count("."), name))
    return None


def _tied_name(tied: str, source: str, found: str) -> str:
    """Return the tied name beside the source that was found: both carry the same further prefix."""
    if tied.startswith("|"):
        return found.removesuffix(_leaf(source)) + _leaf(tied)
    full = source.replace("|", ".").removeprefix(".")
    return (found.removesuffix(full) if _ends_with(found, full) else "") + tied


def _guesses(config: Mapping[str, Any] | None, names: Collection[str]) -> list[TieGroup]:
    """Return groups for a model type that the tables lack: nobody can say whether, and under which name, it is tied."""
    config = config or {}
    architecture = _architecture(config)
    settled = (
        is_known_type(config.get("model_type"))
        or config.get("tie_word_embeddings") is False
        or (architecture and not _has_head(architecture))
        or any(is_output_head(name) for name in names)
    )
    embeddings = [] if settled else [name for name in names if is_input_embedding(name)]
    return [TieGroup(name, ("lm_head.weight",), known=False) for name in embeddings]
