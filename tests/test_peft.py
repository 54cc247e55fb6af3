from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from peft_files import PLAIN, save_with_peft, tiny_gpt2, tiny_llama, write_adapter

from loramgr.adapter import Decomposed, LowRank, Replacement, Rows, Shift
from loramgr.errors import IncompatibleError, LoramgrError
from loramgr.formats import read_adapter

MINILM_MODULE = "bert.encoder.layer.0.attention.self.query.weight"

TRAINED = {
    "albert-rxn/rxn-r4-qv": ("lora", {4}, 2.0, 2),
    "minilm/lic-r16-qv": ("lora", {16}, 2.0, 14),
    "minilm/lic-r8-all-linear": ("lora", {8}, 2.0, 39),
    "minilm/lic-r8-dora": ("dora", {8}, 2.0, 14),
    "minilm/lic-r8-pooler-saved": ("lora", {8}, 2.0, 16),
    "minilm/lic-r8-qv": ("lora", {8}, 2.0, 14),
    "minilm/lic-r8-qv/checkpoint-25": ("lora", {8}, 2.0, 14),
    "minilm/lic-r8-qv/checkpoint-50": ("lora", {8}, 2.0, 14),
    "minilm/lic-r8-qv-bf16": ("lora", {8}, 2.0, 14),
    "minilm/py-r8-biaslora": ("lora", {8}, 2.0, 26),
    "minilm/py-r8-qv": ("lora", {8}, 2.0, 14),
    "smollm2/lic-r8-qv": ("lora", {8}, 2.0, 60),
    "smollm2/py-r4-dora": ("dora", {4}, 2.0, 60),
    "smollm2/py-r8-qv": ("lora", {8}, 2.0, 60),
    "tinygpt2-char/lic-emb": ("lora", {4}, 2.0, 5),
    "tinygpt2-char/lic-r4-all": ("lora", {4}, 2.0, 16),
    "tinygpt2-char/lic-r8-dora": ("dora", {8}, 2.0, 4),
    "tinygpt2-char/lic-r8-qv": ("lora", {8}, 2.0, 4),
    "tinygpt2-char/py-r4-biasall-layers02": ("lora", {4}, 2.0, 27),
    "tinygpt2-char/py-r8-lnf-saved": ("lora", {8}, 2.0, 6),
    "tinygpt2-char/py-r8-qv": ("lora", {8}, 2.0, 4),
    "tinyllama-char/lic-emb": ("lora", {4}, 2.0, 9),
    "tinyllama-char/lic-r4-all": ("lora", {4}, 2.0, 28),
    "tinyllama-char/lic-r8-dora": ("dora", {8}, 2.0, 8),
    "tinyllama-char/lic-r8-qv": ("lora", {8}, 2.0, 8),
    "tinyllama-char/lic-rankpattern": ("lora", {2, 8, 16}, 2.0, 8),
    "tinyllama-char/py-r16-all-rslora": ("lora", {16}, 4.0, 28),
    "tinyllama-char/py-r8-lmhead-saved": ("lora", {8}, 2.0, 9),
    "tinyllama-char/py-r8-qv": ("lora", {8}, 2.0, 8),
}


@pytest.mark.parametrize("name", TRAINED)
def test_every_trained_adapter_is_read(shared_data: Path, name: str) -> None:
    adapter = read_adapter(shared_data / "trained" / name)
    method, ranks, scaling, updates = TRAINED[name]
    assert (adapter.method, set(adapter.ranks.values()), adapter.scaling) == (method, ranks, scaling)
    assert len(adapter.updates) == updates
    assert adapter.warnings == ()
    assert adapter.format == "peft"
    used = {view.spec.name for update in adapter.updates.values() for view in update.views()}
    assert used == set(adapter.tensors)


def test_the_table_of_trained_adapters_is_complete(shared_data: Path) -> None:
    there = {path.parent for path in (shared_data / "trained").rglob("adapter_config.json")}
    tried = {shared_data / "trained" / name for name in TRAINED}
    checkpoints = {path for path in there if path.name.startswith("checkpoint-")}
    assert there - tried - checkpoints == {shared_data / "trained" / "tinyllama-char" / "lic-pissa"}
    for path in checkpoints - {path for path in checkpoints if path.parent.name == "lic-pissa"}:
        assert read_adapter(path).ranks == read_adapter(path.parent).ranks


def test_pissa_is_refused(shared_data: Path) -> None:
    with pytest.raises(IncompatibleError, match="PiSSA changes the base") as caught:
        read_adapter(shared_data / "trained" / "tinyllama-char" / "lic-pissa")
    assert "path_initial_model_for_weight_conversion" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-tigrinya", 36),
        ("peft-monteclora-mrpc-460", 28),
        ("peft-regression-lora_conv2d", 1),
        ("peft-regression-lora_emb_conv1d", 2),
        ("peft-regression-lora_mlp", 1),
        ("peft-regression-lora_mlp_modules_to_save", 3),
        ("peft-ia3-mt0-large", 384),
        ("peft-regression-ia3_mlp", 1),
        ("peft-regression-ia3_no_ff_mlp", 2),
        ("peft-regression-ia3_conv2d", 1),
        ("peft-regression-adalora_mlp", 1),
        ("peft-unilora-glue", 1),
    ],
)
def test_adapters_of_public_repositories(shared_data: Path, name: str, expected: int) -> None:
    adapter = read_adapter(shared_data / "found" / name)
    assert len(adapter.updates) == expected
    known = {"ia3", "adalora", "unilora"}
    assert adapter.method == next((method for method in known if f"-{method}" in name), "lora")
    ranks = {"ia3": set(), "adalora": {12}, "unilora": {4}}
    assert set(adapter.ranks.values()) == ranks.get(adapter.method, {8})
    assert (adapter.obstacle is None) == (adapter.method != "unilora")


def test_a_plain_adapter(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path, base_model_name_or_path="org/base", task_type="CAUSAL_LM"))
    assert list(adapter.updates) == ["m.q.weight"]
    update = adapter.updates["m.q.weight"]
    assert isinstance(update, LowRank)
    assert (update.kind, update.rank, update.alpha, update.scaling) == ("linear", 2, 4.0, 2.0)
    assert (update.lora_A.spec.shape, update.lora_B.spec.shape) == ((2, 4), (6, 2))
    assert (update.magnitude, update.table, update.fan_in_fan_out) == (None, None, False)
    assert (adapter.base_name, adapter.base_digest, adapter.task_type) == ("org/base", None, "CAUSAL_LM")
    assert (adapter.target_modules, adapter.keeps_ties, adapter.parameters) == (("q",), False, 20)


def test_trained_heads_and_biases_replace_parameters(shared_data: Path) -> None:
    adapter = read_adapter(shared_data / "trained" / "minilm" / "py-r8-biaslora")
    bias = adapter.updates["bert.encoder.layer.0.attention.self.query.bias"]
    assert isinstance(bias, Replacement)
    assert bias.tensor.spec.name.endswith("query.base_layer.bias")
    assert isinstance(adapter.updates["classifier.weight"], Replacement)
    assert isinstance(adapter.updates[MINILM_MODULE], LowRank)


def test_an_embedding_with_its_table(shared_data: Path) -> None:
    update = read_adapter(shared_data / "trained" / "tinyllama-char" / "lic-emb").updates["model.embed_tokens.weight"]
    assert isinstance(update, LowRank)
    assert (update.kind, update.lora_A.spec.shape, update.lora_B.spec.shape) == ("embedding", (4, 128), (64, 4))
    assert update.table is not None
    assert update.table.spec.shape == (128, 64)


def test_convolutions_and_conv1d(shared_data: Path) -> None:
    conv = read_adapter(shared_data / "found" / "peft-regression-lora_conv2d").updates["conv2d.weight"]
    assert isinstance(conv, LowRank)
    assert (conv.kind, conv.lora_A.spec.shape) == ("conv", (8, 5, 3, 3))
    gpt2 = read_adapter(shared_data / "trained" / "tinygpt2-char" / "lic-r8-dora")
    dora = gpt2.updates["transformer.h.0.attn.c_attn.weight"]
    assert isinstance(dora, LowRank)
    assert dora.fan_in_fan_out
    assert dora.magnitude is not None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.q_proj": 3}},
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 5, "q_proj": 7}},
        {"rank_pattern": {r"layers\.[01]\.self_attn\..*": 2}, "alpha_pattern": {"proj": 3}},
        {"rank_pattern": {"1.self_attn.q_proj": 5}, "alpha_pattern": {".*q_proj": 1}, "use_rslora": True},
        {"rank_pattern": {"model.layers.0.mlp.up_proj": 1, "k|q_proj": 6}, "alpha_pattern": {"q_proj|v_proj": 9}},
    ],
)
def test_ranks_and_scalings_are_those_of_the_live_layers(tmp_path: Path, options: dict[str, object]) -> None:
    from peft import LoraConfig

    targets = ["q_proj", "v_proj", "up_proj", "embed_tokens"]
    live = save_with_peft(tmp_path, tiny_llama(), LoraConfig(r=4, lora_alpha=10, target_modules=targets, **options))
    adapter = read_adapter(tmp_path)
    layers = {name: module for name, module in live.base_model.model.named_modules() if hasattr(module, "lora_alpha")}
    assert set(layers) == set(adapter.ranks)
    for name, layer in layers.items():
        update = adapter.updates[f"{name}.weight"]
        assert isinstance(update, LowRank)
        assert (update.rank, update.scaling) == (layer.r["default"], layer.scaling["default"])
        assert update.alpha == layer.lora_alpha["default"]


def _llama(config: dict[str, object], tied: bool = False, grown: int = 0, **options: object) -> tuple[object, ...]:
    return (config, tied, grown, options)


Q = ["q_proj"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WRITTEN_BY_PEFT = {
    "rows": (_llama({"trainable_token_indices": [1, 5]}), {EMBED: "rows"}, True),
    "rows of a tied model": (_llama({"trainable_token_indices": [1, 5]}, tied=True), {EMBED: "rows"}, True),
    "rows of two modules": (
        _llama({"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [3]}}),
        {EMBED: "rows", HEAD: "rows"},
        False,
    ),
    "rows that are tied": (
        _llama({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}}, tied=True),
        {EMBED: "rows"},
        True,
    ),
    "rows of a grown tied vocabulary": (
        _llama({"trainable_token_indices": {"embed_tokens": [17]}}, tied=True, grown=20, save_embedding_layers=True),
        {EMBED: "rows+table", HEAD: "rows+table"},
        True,
    ),
    "a grown vocabulary": (
        _llama({}, grown=20, save_embedding_layers=True),
        {EMBED: "saved", HEAD: "saved"},
        False,
    ),
    "tied targets": (
        _llama({"target_modules": [*Q, "embed_tokens", "lm_head"], "ensure_weight_tying": True}, tied=True),
        {EMBED: "embedding+table", HEAD: "linear+table"},
        True,
    ),
    "tied saved modules": (
        _llama({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, tied=True),
        {EMBED: "saved", HEAD: "saved"},
        True,
    ),
    "DoRA": (
        _llama({"target_modules": [*Q, "embed_tokens"], "use_dora": True}, save_embedding_layers=False),
        {EMBED: "embedding+magnitude"},
        False,
    ),
    "saved modules with their embeddings": (
        _llama({"modules_to_save": ["embed_tokens", "lm_head"]}, save_embedding_layers=True),
        {EMBED: "saved", HEAD: "saved"},
        False,
    ),
}


def _describe(update: object) -> str:
    names = {Rows: "rows", Replacement: "saved", Shift: "shift"}
    kind = update.kind if isinstance(update, LowRank) else names[type(update)]
    extras = [name for name in ("magnitude", "table") if getattr(update, name, None) is not None]
    return "+".join([kind, *extras])


@pytest.mark.parametrize("case", WRITTEN_BY_PEFT)
def test_what_peft_writes_on_a_llama(tmp_path: Path, case: str) -> None:
    from peft import LoraConfig

    (config, tied, grown, options), expected, keeps_ties = WRITTEN_BY_PEFT[case]
    model = tiny_llama(tied)
    if grown:
        model.resize_token_embeddings(grown, mean_resizing=False)
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    save_with_peft(tmp_path, model, LoraConfig(**{"target_modules": Q, **config}), **options)
    adapter = read_adapter(tmp_path)
    assert {name: _describe(adapter.updates[name]) for name in expected} == expected
    assert {name for name in adapter.updates if "q_proj" not in name} == set(expected)
    assert adapter.keeps_ties is keeps_ties
    assert set(adapter.updates) <= set(parameters)
    assert adapter.warnings == ()


@pytest.mark.parametrize("targets", [None, ["embed_tokens", "lm_head"]])
def test_trainable_tokens_as_a_method(tmp_path: Path, targets: list[str] | None) -> None:
    from peft import TrainableTokensConfig

    save_with_peft(tmp_path, tiny_llama(), TrainableTokensConfig(token_indices=[3, 1], target_modules=targets))
    adapter = read_adapter(tmp_path)
    assert (adapter.method, adapter.alpha, adapter.scaling, adapter.ranks) == ("trainable_tokens", None, None, {})
    assert len(adapter.updates) == len(targets or ["embed_tokens"])
    rows = adapter.updates[EMBED]
    assert isinstance(rows, Rows)
    assert rows.indices == (3, 1)
    assert rows.rows.spec.shape == (2, 8)


def test_lora_bias_shifts_the_bias_that_bias_all_replaced(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(target_modules=["c_attn"], lora_bias=True, bias="all", fan_in_fan_out=True, lora_alpha=24)
    save_with_peft(tmp_path, tiny_gpt2(), config)
    adapter = read_adapter(tmp_path)
    shift = adapter.updates["transformer.h.0.attn.c_attn.bias"]
    assert isinstance(shift, Shift)
    assert (shift.scaling, shift.vector.spec.shape) == (3.0, (24,))
    assert shift.table is not None
    assert isinstance(adapter.updates["transformer.ln_f.bias"], Replacement)
    weight = adapter.updates["transformer.h.0.attn.c_attn.weight"]
    assert isinstance(weight, LowRank)
    assert weight.fan_in_fan_out
    assert weight.table is None


def test_bias_all_beside_saved_modules_repeats_the_head(tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import BertConfig, BertForSequenceClassification

    bert = BertConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    config = LoraConfig(target_modules=["query"], bias="all", task_type="SEQ_CLS")
    save_with_peft(tmp_path, BertForSequenceClassification(bert), config)
    adapter = read_adapter(tmp_path)
    assert any("original_module" in name for name in adapter.tensors)
    head = adapter.updates["classifier.bias"]
    assert isinstance(head, Replacement)
    assert head.tensor.spec.name == "base_model.model.classifier.bias"
    nested = LoraConfig(target_modules=["query"], modules_to_save=["embeddings"], task_type="SEQ_CLS")
    save_with_peft(tmp_path / "nested", BertForSequenceClassification(bert), nested)
    with pytest.raises(IncompatibleError, match="a saved module inside a saved module"):
        read_adapter(tmp_path / "nested")


def test_further_layers_that_peft_can_adapt(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Conv1d(2, 4, 3)
            self.three = torch.nn.Conv3d(4, 6, (1, 2, 3))
            self.grouped = torch.nn.Conv2d(4, 6, 3, groups=2)
            self.attention = torch.nn.MultiheadAttention(8, 2)

    def saved(name: str, **options: object) -> Path:
        save_with_peft(tmp_path / name, Layers(), LoraConfig(r=2, **options))
        return tmp_path / name

    plain = read_adapter(saved("plain", target_modules=["one", "three"]))
    assert {name: _describe(update) for name, update in plain.updates.items()} == {
        "one.weight": "conv",
        "three.weight": "conv",
    }
    grouped = read_adapter(saved("grouped", target_modules=["grouped"]))
    assert "grouped convolution (2 groups)" in (grouped.obstacle or "")
    attention = read_adapter(saved("attention", target_modules=["attention"]))
    assert set(attention.updates) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    dora = read_adapter(saved("dora", target_modules=["one"], use_dora=True))
    assert (dora.method, isinstance(dora.updates["one.weight"], Decomposed)) == ("dora", True)


@pytest.mark.parametrize(
    ("message", "option"),
    [
        ("OLoRA", lambda peft: {"init_lora_weights": "olora"}),
        ("PiSSA", lambda peft: {"init_lora_weights": "pissa_niter_2"}),
    ],
)
def test_variants_that_peft_writes_are_refused_by_name(tmp_path: Path, message: str, option: object) -> None:
    import peft

    save_with_peft(tmp_path, tiny_llama(), peft.LoraConfig(r=4, target_modules=Q, **option(peft)))  # type: ignore[operator]
    with pytest.raises(IncompatibleError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("message", "option"),
    [
        ("aLoRA", lambda peft: {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}),
        ("layer_replication", lambda peft: {"layer_replication": [(0, 1), (0, 1)]}),
        ("KaSA", lambda peft: {"kasa_config": peft.KasaConfig()}),
    ],
)
def test_variants_that_peft_writes_are_kept_with_the_reason(tmp_path: Path, message: str, option: object) -> None:
    import peft

    save_with_peft(tmp_path, tiny_llama(), peft.LoraConfig(r=4, target_modules=Q, **option(peft)))  # type: ignore[operator]
    adapter = read_adapter(tmp_path)
    assert message in (adapter.obstacle or "")
    assert set(adapter.ranks.values()) == {4}


def test_old_files_are_read(tmp_path: Path) -> None:
    import torch

    config = {
        "base_model_name_or_path": "b", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False,
        "modules_to_save": None, "peft_type": "LORA", "r": 8, "target_modules": ["q"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"lora_A": torch.zeros(8, 4, dtype=torch.float16), "lora_B": torch.zeros(6, 8, dtype=torch.float16)}
    named = {f"base_model.model.m.q.{name}.weight": tensor for name, tensor in tensors.items()}
    torch.save(named, tmp_path / "adapter_model.bin")
    adapter = read_adapter(tmp_path)
    assert (adapter.ranks, adapter.scaling, adapter.dtype) == ({"m.q": 8}, 2.0, "F16")


def test_names_of_the_adapter_left_in_the_keys(tmp_path: Path) -> None:
    shapes = {
        "m.q.lora_A.sql.weight": (2, 4),
        "m.q.lora_B.sql.weight": (6, 2),
        "m.q.lora_magnitude_vector.sql.weight": (6,),
        "m.e.lora_embedding_A.sql": (2, 9),
        "m.e.lora_embedding_B.sql": (5, 2),
        "m.e.lora_magnitude_vector.sql": (5,),
        "head.modules_to_save.sql.dense.weight": (2, 2),
        "head.original_module.dense.weight": (2, 2),
    }
    adapter = read_adapter(write_adapter(tmp_path, shapes, use_dora=True, modules_to_save=["head"]))
    assert list(adapter.updates) == ["head.dense.weight", "m.e.weight", "m.q.weight"]
    assert adapter.updates["head.dense.weight"].tensor.spec.name.endswith("modules_to_save.sql.dense.weight")  # type: ignore[union-attr]


def test_the_recorded_base(tmp_path: Path) -> None:
    digest, other = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    assert read_adapter(write_adapter(tmp_path, base_digest=digest)).base_digest == digest
    assert read_adapter(write_adapter(tmp_path, metadata={"base_digest": other})).base_digest == other
    for metadata, recorded in (({"base_digest": other}, digest), ({"base_digest": "x"}, ...), (None, "sha256:12")):
        with pytest.raises(IncompatibleError, match="base"):
            read_adapter(write_adapter(tmp_path, metadata=metadata, base_digest=recorded))


DORA = {**PLAIN, "m.q.lora_magnitude_vector": (6,)}
SAVED = {**PLAIN, "m.q.weight": (6, 4)}
TOKENS = {"m.embed_tokens.token_adapter.trainable_tokens_delta": (2, 4)}
BROKEN: dict[str, tuple[dict[str, tuple[int, ...]] | None, dict[str, object], str]] = {
    "no r": (None, {"r": ...}, "r is None"),
    "r 0": (None, {"r": 0}, "r is 0"),
    "r true": (None, {"r": True}, "r is True"),
    "r a float": (None, {"r": 2.0}, "r is 2.0"),
    "no alpha": (None, {"lora_alpha": ...}, "lora_alpha is None"),
    "alpha text": (None, {"lora_alpha": "16"}, "lora_alpha is '16'"),
    "alpha true": (None, {"lora_alpha": True}, "lora_alpha is True"),
    "another rank": (None, {"r": 8}, "lora_A has rank 2, the configuration says 8"),
    "another rank by pattern": (None, {"r": 3, "rank_pattern": {"q": 4, "m.q": 5, "k": 2}}, "says 3 or 4 or 5"),
    "pattern of text": (None, {"rank_pattern": {"q": "2"}}, "rank_pattern"),
    "pattern not an object": (None, {"alpha_pattern": [1]}, "alpha_pattern"),
    "pattern not a regex": (None, {"alpha_pattern": {"(": 1}}, "no regular expression"),
    "flag of text": (None, {"use_rslora": "false"}, "use_rslora is 'false'"),
    "flag of 1": (None, {"fan_in_fan_out": 1}, "fan_in_fan_out is 1"),
    "bias": (None, {"bias": "some"}, "bias is 'some'"),
    "targets": (None, {"target_modules": [1]}, "target_modules"),
    "base name": (None, {"base_model_name_or_path": 7}, "base_model_name_or_path"),
    "no lora_B": ({"m.q.lora_A.weight": (2, 4)}, {}, "holds no lora_B"),
    "no lora_A": ({"m.q.lora_B.weight": (6, 2)}, {}, "holds no lora_A"),
    "half an embedding": ({"m.q.lora_embedding_A": (2, 9)}, {}, "holds no lora_embedding_B"),
    "both kinds": ({**PLAIN, "m.q.lora_embedding_A": (2, 9)}, {}, "neither the factors"),
    "only a magnitude": ({"m.q.lora_magnitude_vector": (6,)}, {"use_dora": True}, "neither the factors"),
    "ranks differ": ({"m.q.lora_A.weight": (2, 4), "m.q.lora_B.weight": (6, 3)}, {}, "do not fit each other"),
    "rank zero": ({"m.q.lora_A.weight": (0, 4), "m.q.lora_B.weight": (6, 0)}, {}, "gather|empty"),
    "flat": ({"m.q.lora_A.weight": (8,), "m.q.lora_B.weight": (6, 2)}, {}, "flattened"),
    "six dimensions": ({"m.q.lora_A.weight": (2, 1, 1, 1, 1, 1), "m.q.lora_B.weight": (6, 2, 1, 1, 1, 1)}, {}, "fit"),
    "kernel in lora_B": ({"m.q.lora_A.weight": (2, 4, 3), "m.q.lora_B.weight": (6, 2, 3)}, {}, "do not fit"),
    "no magnitude": (None, {"use_dora": True}, "holds no lora_magnitude_vector"),
    "magnitude unannounced": (DORA, {}, "use_dora is not set"),
    "magnitude too long": ({**PLAIN, "m.q.lora_magnitude_vector": (7,)}, {"use_dora": True}, r"must be \(6,\)"),
    "magnitude twice": ({**DORA, "m.q.lora_magnitude_vector.weight": (6,)}, {"use_dora": True}, "twice"),
    "lora_bias missing": (None, {"lora_bias": True}, "holds no lora_B.bias"),
    "lora_bias unannounced": ({**PLAIN, "m.q.lora_B.bias": (6,)}, {}, "lora_bias is not set"),
    "lora_bias too long": ({**PLAIN, "m.q.lora_B.bias": (7,)}, {"lora_bias": True}, "must be"),
    "lora_bias and DoRA": (DORA, {"lora_bias": True, "use_dora": True}, "together"),
    "no tensors": ({}, {}, "holds no tensors"),
    "unexplained": ({**PLAIN, "m.k.weight": (4, 4)}, {}, r"no rule explains these tensors: base_model.model.m.k"),
    "unexplained bias": ({**PLAIN, "m.k.bias": (4,)}, {}, "no rule explains"),
    "bias of another module": ({**PLAIN, "m.k.bias": (4,)}, {"bias": "lora_only"}, "no rule explains"),
    "no prefix": ({**PLAIN, "!m.k.lora_A.weight": (2, 4)}, {}, "no rule explains"),
    "AdaLoRA's lora_E": ({**PLAIN, "m.q.lora_E": (2, 1)}, {"modules_to_save": ["q"]}, "no rule explains"),
    "saved and adapted": (SAVED, {"modules_to_save": ["q"]}, "no rule explains"),
    "base layer alone": ({**PLAIN, "m.k.base_layer.weight": (4, 4)}, {}, "no rule explains"),
    "a copy alone": ({**PLAIN, "h.modules_to_save.weight": (4, 4)}, {"modules_to_save": ["h"]}, "no rule explains"),
    "two adapters": ({**PLAIN, "m.k.lora_A.x.weight": (2, 4), "m.k.lora_B.x.weight": (6, 2)}, {}, "do not agree"),
    "nested": (
        {"m.experts.base_layer.lora_A.weight": (2, 4), "m.experts.base_layer.lora_B.weight": (6, 2)},
        {},
        "wrapper inside a wrapper",
    ),
    "two tables": (
        {
            "m.embed_tokens.lora_embedding_A": (2, 9),
            "m.embed_tokens.lora_embedding_B": (4, 2),
            "m.embed_tokens.weight": (9, 4),
            "m.embed_tokens.base_layer.weight": (9, 4),
        },
        {},
        "two tensors of the file take its place",
    ),
    "rows without indices": (TOKENS, {}, "no indices"),
    "rows of two lists": (TOKENS, {"trainable_token_indices": {"a": [1, 2], "b": [1, 3]}}, "does not say which"),
    "too few indices": (TOKENS, {"trainable_token_indices": [1]}, "lists 1 indices"),
    "index twice": (TOKENS, {"trainable_token_indices": [1, 1]}, "twice"),
    "negative index": (TOKENS, {"trainable_token_indices": [1, -1]}, "list of token indices"),
    "index true": (TOKENS, {"trainable_token_indices": [0, True]}, "list of token indices"),
    "rows and factors": (
        {**TOKENS, "m.embed_tokens.lora_embedding_A": (2, 9), "m.embed_tokens.lora_embedding_B": (4, 2)},
        {"trainable_token_indices": [1, 2]},
        "only trained tokens",
    ),
    "factors without LoRA": (None, {"peft_type": "TRAINABLE_TOKENS", "r": ..., "lora_alpha": ...}, "only trained"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    shapes, config, message = BROKEN[case]
    with pytest.raises(LoramgrError, match=message) as caught:
        read_adapter(write_adapter(tmp_path, shapes, **config))
    assert caught.value.exit_code == 6


def test_only_ten_unexplained_tensors_are_listed(tmp_path: Path) -> None:
    shapes = {**PLAIN, **{f"x{number:02}.weight": (1,) for number in range(13)}}
    with pytest.raises(IncompatibleError, match=r"x09.weight and 3 more"):
        read_adapter(write_adapter(tmp_path, shapes))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantized_factors_are_refused(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    write_adapter(tmp_path)
    named = {f"base_model.model.{name}": torch.ones(shape).to(getattr(torch, dtype)) for name, shape in PLAIN.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    with pytest.raises(IncompatibleError, match="not a plain float"):
        read_adapter(tmp_path)


def test_peft_reads_what_these_tests_write(tmp_path: Path) -> None:
    """The files made by hand are PEFT's: PEFT itself finds every tensor of one."""
    from peft import PeftModel

    config = {"bias": "none", "fan_in_fan_out": False, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    shapes = {
        f"model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": shape
        for layer in (0, 1)
        for side, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about PEFT
        live = PeftModel.from_pretrained(tiny_llama(), write_adapter(tmp_path, shapes, **config))
    layer = live.base_model.model.model.layers[1].self_attn.q_proj
    assert bool((layer.lora_B["default"].weight == 0.5).all())
