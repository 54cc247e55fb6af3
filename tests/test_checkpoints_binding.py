from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from memory_adapters import adapter, embedding, low_rank, rows, saved, shift, specs, tensor

from loramgr.adapter import LowRank, Replacement, Update
from loramgr.checkpoints.binding import Binding, BoundUpdate, bind
from loramgr.checkpoints.families import TieGroup, tied_groups
from loramgr.checkpoints.source import open_checkpoint
from loramgr.errors import IncompatibleError
from loramgr.formats import read_adapter

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
TIED = {**LLAMA, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
Q = "model.layers.0.self_attn.q_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE = {EMBED: (10, 4), Q: (6, 4), "model.norm.weight": (4,), "model.layers.0.self_attn.q_proj.bias": (6,)}


def bound(
    updates: Mapping[str, Update],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None = LLAMA,
    **changes: Any,
) -> Binding:
    return bind(adapter(updates, **changes), specs(shapes), tied_groups(config, shapes), config)


def only(binding: Binding) -> BoundUpdate:
    (update,) = binding.updates
    return update


def bind_real(base: Path, path: Path) -> Binding:
    checkpoint = open_checkpoint(base)
    found = {name: view.spec for name, view in checkpoint.tensors.items()}
    ties = tied_groups(checkpoint.config, checkpoint.tensors, checkpoint.aliases)
    return bind(read_adapter(path), found, ties, checkpoint.config)


MINILM = [("lic-r8-qv", 12), ("lic-r16-qv", 12), ("lic-r8-dora", 12), ("lic-r8-qv-bf16", 12), ("py-r8-qv", 12),
          ("lic-r8-all-linear", 37), ("lic-r8-pooler-saved", 12), ("py-r8-biaslora", 12)]  # fmt: skip


@pytest.mark.parametrize(("name", "modules"), MINILM)
def test_minilm(shared_data: Path, minilm_base: Path, name: str, modules: int) -> None:
    binding = bind_real(minilm_base, shared_data / "trained" / "minilm" / name)
    assert Counter(update.kind for update in binding.updates)["linear"] == modules
    assert binding.added == ("classifier.bias", "classifier.weight")
    lora = next(update for update in binding.updates if update.kind == "linear")
    assert lora.name == f"bert.{lora.target}"
    pooler = {update.target for update in binding.updates if "pooler" in update.target and update.kind == "saved"}
    assert pooler == ({"pooler.dense.bias", "pooler.dense.weight"} if name == "lic-r8-pooler-saved" else set())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("lic-r8-qv", {"linear": 8}),
        ("lic-r4-all", {"linear": 28}),
        ("py-r16-all-rslora", {"linear": 28}),
        ("lic-r8-dora", {"linear": 8}),
        ("lic-rankpattern", {"linear": 8}),
        ("py-r8-lmhead-saved", {"linear": 8, "saved": 1}),
        ("lic-emb", {"linear": 8, "embedding": 1}),
    ],
)
def test_tinyllama(shared_data: Path, tinyllama_base: Path, name: str, kinds: dict[str, int]) -> None:
    binding = bind_real(tinyllama_base, shared_data / "trained" / "tinyllama-char" / name)
    assert Counter(update.kind for update in binding.updates) == kinds
    assert binding.added == ()
    assert binding.vocab_size is None


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("lic-r8-qv", {"conv1d": 4}),
        ("lic-r4-all", {"conv1d": 16}),
        ("lic-r8-dora", {"conv1d": 4}),
        ("py-r8-lnf-saved", {"conv1d": 4, "saved": 2}),
        ("py-r4-biasall-layers02", {"conv1d": 2, "bias": 25}),
        ("lic-emb", {"conv1d": 4, "embedding": 1}),
    ],
)
def test_tinygpt2(shared_data: Path, tinygpt2_base: Path, name: str, kinds: dict[str, int]) -> None:
    binding = bind_real(tinygpt2_base, shared_data / "trained" / "tinygpt2-char" / name)
    found = Counter(update.kind for update in binding.updates)
    if "bias" in kinds:
        assert found["conv1d"] == kinds["conv1d"]
        assert found["bias"] > 0
        assert not binding.added
        return
    assert found == kinds
    assert all(update.transposed == (update.kind in ("conv1d", "embedding")) for update in binding.updates)


def test_albert_and_smollm2(shared_data: Path, albert_base: Path) -> None:
    binding = bind_real(albert_base, shared_data / "trained" / "albert-rxn" / "rxn-r4-qv")
    assert len({update.target for update in binding.updates}) == len(binding.updates) == 2


@pytest.mark.parametrize(
    ("toy", "name", "kinds"),
    [
        ("mlp", "lora_mlp", {"linear": 1}),
        ("mlp", "lora_mlp_modules_to_save", {"linear": 1, "saved": 2}),
        ("emb_conv1d", "lora_emb_conv1d", {"embedding": 1, "conv1d": 1}),
        ("conv2d", "lora_conv2d", {"conv2d": 1}),
    ],
)
def test_toy_models_without_a_configuration(shared_data: Path, toy: str, name: str, kinds: dict[str, int]) -> None:
    found = shared_data / "found"
    binding = bind_real(found / f"toy-base-{toy}.safetensors", found / f"peft-regression-{name}")
    assert Counter(update.kind for update in binding.updates) == kinds


@pytest.mark.parametrize("name", ["lic-r8-qv", "lic-r8-all-linear"])
def test_wrong_bases(shared_data: Path, tinyllama_base: Path, rxnfp_bases: Path, name: str) -> None:
    for base in (tinyllama_base, rxnfp_bases / "bert_pretrained"):
        with pytest.raises(IncompatibleError):
            bind_real(base, shared_data / "trained" / "minilm" / name)


def test_one_change_of_prefix_for_all() -> None:
    shapes = {"encoder.0.q.weight": (6, 4), "encoder.0.k.weight": (6, 4)}
    updates: dict[str, Update] = {f"bert.{name}": low_rank(*shape) for name, shape in shapes.items()}
    updates["classifier.weight"] = saved(2, 6)
    binding = bound(updates, shapes)
    assert [update.target for update in binding.updates] == ["classifier.weight", *sorted(shapes)]
    assert binding.added == ("classifier.weight",)


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_a_new_tensor_takes_the_prefix_where_it_applies(prefix: str) -> None:
    shapes = {f"{prefix}{Q}": (6, 4)}
    binding = bound({Q: low_rank(6, 4), HEAD: saved(10, 4)}, shapes)
    assert binding.added == (f"{prefix}{HEAD}",)


def test_a_saved_module_alone_is_found_under_its_prefix() -> None:
    shapes = {"pooler.dense.weight": (4, 4), "pooler.dense.bias": (4,), "encoder.q.weight": (4, 4)}
    updates: dict[str, Update] = {"bert.pooler.dense.weight": saved(4, 4), "bert.pooler.dense.bias": saved(4)}
    binding = bound({**updates, "classifier.weight": saved(2, 4)}, shapes, {"model_type": "bert"})
    assert [update.target for update in binding.updates if not update.new] == [
        "pooler.dense.bias",
        "pooler.dense.weight",
    ]
    assert bound({"classifier.weight": saved(2, 4)}, shapes, {"model_type": "bert"}).added == ("classifier.weight",)


@pytest.mark.parametrize(
    ("config", "module", "flag", "kind"),
    [
        ({"model_type": "llama"}, "q_proj", False, "linear"),
        ({"model_type": "llama"}, "c_attn", True, "linear"),
        ({"model_type": "gpt_bigcode"}, "c_attn", True, "linear"),
        ({"model_type": "gpt2"}, "c_proj", False, "conv1d"),
        ({"model_type": "gpt2"}, "score", True, "linear"),
        ({"model_type": "mystery"}, "q_proj", False, "linear"),
        (None, "c_attn", True, "conv1d"),
    ],
)
def test_layout_of_square_matrices(config: dict[str, Any] | None, module: str, flag: bool, kind: str) -> None:
    shapes = {f"h.0.{module}.weight": (4, 4)}
    update = only(bound({f"h.0.{module}.weight": low_rank(4, 4, fan_in_fan_out=flag)}, shapes, config))
    assert (update.kind, update.transposed) == (kind, kind == "conv1d")


@pytest.mark.parametrize(
    ("other_shape", "flag", "kind"), [((6, 4), False, "linear"), ((4, 6), True, "conv1d"), ((4, 6), False, None)]
)
def test_other_matrices_vouch_for_square_ones(other_shape: tuple[int, int], flag: bool, kind: str | None) -> None:
    shapes = {"h.0.a.weight": (4, 4), "h.0.b.weight": other_shape}
    updates: dict[str, Update] = {
        "h.0.a.weight": low_rank(4, 4, fan_in_fan_out=flag),
        "h.0.b.weight": low_rank(6, 4, fan_in_fan_out=flag),
    }
    if kind is None:
        with pytest.raises(IncompatibleError, match=r"h\.0\.a\.weight: ambiguous layout"):
            bound(updates, shapes, {"model_type": "mystery"})
    else:
        assert {update.kind for update in bound(updates, shapes, None).updates} == {kind}


@pytest.mark.parametrize(("module", "flag"), [("q_proj", True), ("c_attn", False)])
def test_ambiguous_layout(module: str, flag: bool) -> None:
    name = f"h.0.{module}.weight"
    with pytest.raises(IncompatibleError, match="ambiguous layout"):
        bound({name: low_rank(4, 4, fan_in_fan_out=flag)}, {name: (4, 4)}, {"model_type": "mystery"})


def test_conv1d_layers_do_not_vouch_for_a_square_linear_layer_beside_them() -> None:
    shapes = {"encoder.0.query.weight": (4, 4), "decoder.h.0.c_attn.weight": (4, 12)}
    updates: dict[str, Update] = {
        "encoder.0.query.weight": low_rank(4, 4, fan_in_fan_out=True),
        "decoder.h.0.c_attn.weight": low_rank(12, 4, fan_in_fan_out=True),
    }
    with pytest.raises(IncompatibleError, match=r"query\.weight: ambiguous layout"):
        bound(updates, shapes, {"model_type": "vision-encoder-decoder"})


def test_shapes_have_the_last_word_on_layout() -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    for flag in (True, False):
        assert only(bound({name: low_rank(12, 4, fan_in_fan_out=flag)}, {name: (4, 12)}, GPT2)).kind == "conv1d"


def test_tied_head_of_which_the_file_knows_nothing() -> None:
    binding = bound({HEAD: low_rank(10, 4)}, BASE, TIED)
    assert (only(binding).target, only(binding).tied_source, binding.added) == (HEAD, EMBED, ())
    assert only(bound({EMBED: embedding(10, 4)}, BASE, TIED)).tied_source is None


def test_a_head_says_nothing_about_the_prefix() -> None:
    shapes = {"wte.weight": (10, 4), "h.0.attn.c_attn.weight": (4, 12)}
    updates: dict[str, Update] = {"transformer.h.0.attn.c_attn.weight": low_rank(12, 4), HEAD: low_rank(10, 4)}
    head, attention = sorted(bound(updates, shapes, GPT2).updates, key=lambda update: update.kind, reverse=True)
    assert (head.target, head.tied_source) == (HEAD, "wte.weight")
    assert attention.target == "h.0.attn.c_attn.weight"
    assert only(bound({HEAD: low_rank(10, 4)}, shapes, GPT2)).tied_source == "wte.weight"


def test_tied_names_that_nobody_knows() -> None:
    with pytest.raises(IncompatibleError, match="may tie its output head"):
        bound({EMBED: embedding(10, 4)}, BASE, {"model_type": "mystery"})
    with pytest.raises(IncompatibleError, match="may tie its output head"):
        bound({HEAD: saved(10, 4)}, BASE, {"model_type": "mystery"})
    assert only(bound({Q: low_rank(6, 4)}, BASE, {"model_type": "mystery"})).target == Q


def test_a_trained_bias_must_be_there() -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    binding = bound({Q: low_rank(6, 4), bias: saved(6)}, BASE)
    assert [update.kind for update in binding.updates] == ["bias", "linear"]
    with pytest.raises(IncompatibleError, match=r"no module model\.norm"):
        bound({Q: low_rank(6, 4), "model.norm.bias": saved(4)}, BASE)
    assert bound({bias: shift(6)}, BASE).updates[0].kind == "bias"


def test_resized_vocabulary() -> None:
    both: dict[str, Update] = {EMBED: saved(12, 4), HEAD: saved(12, 4), Q: low_rank(6, 4)}
    assert bound(both, {**BASE, HEAD: (10, 4)}).vocab_size == 12
    assert bound(both, BASE, TIED).vocab_size == 12
    table = embedding(12, 4, table=tensor(12, 4))
    assert bound({EMBED: table, HEAD: saved(12, 4)}, {**BASE, HEAD: (10, 4)}).vocab_size == 12
    assert bound({EMBED: saved(10, 4)}, {**BASE, HEAD: (10, 4)}).vocab_size is None
    assert bound({EMBED: saved(12, 4)}, BASE, TIED, keeps_ties=True).vocab_size == 12
    assert bound({EMBED: saved(12, 4)}, {**BASE, HEAD: (10, 4)}, task_type="SEQ_CLS").vocab_size == 12


@pytest.mark.parametrize(
    ("updates", "config"),
    [
        ({EMBED: saved(12, 4)}, LLAMA),
        ({HEAD: saved(12, 4)}, LLAMA),
        ({EMBED: saved(12, 4), HEAD: saved(11, 4)}, LLAMA),
        ({EMBED: saved(12, 4), HEAD: low_rank(10, 4)}, LLAMA),
        ({EMBED: saved(12, 4)}, TIED),
    ],
)
def test_a_vocabulary_that_is_resized_by_halves(updates: dict[str, Update], config: dict[str, Any]) -> None:
    shapes = {**BASE, HEAD: (10, 4)} if config is LLAMA else BASE
    with pytest.raises(IncompatibleError, match="rows while the adapter brings a vocabulary"):
        bound(updates, shapes, config)


def test_heads_may_have_another_number_of_labels() -> None:
    shapes = {"bert.q.weight": (6, 4), "classifier.weight": (2, 6), "classifier.bias": (2,)}
    updates: dict[str, Update] = {"bert.q.weight": low_rank(6, 4), "classifier.weight": saved(5, 6)}
    assert bound({**updates, "classifier.bias": saved(5)}, shapes).added == ()


BAD: list[tuple[dict[str, Update], dict[str, tuple[int, ...]], str]] = [
    ({Q: low_rank(6, 5)}, BASE, r"q_proj\.weight \[6, 4\] .* \[2, 5\] and .* \[6, 2\]"),
    ({Q: low_rank(7, 4)}, BASE, "does not fit"),
    ({Q: low_rank(6, 4, lora_B=tensor(6, 3))}, BASE, "does not fit"),
    ({Q: low_rank(6, 4, magnitude=tensor(4))}, BASE, "does not fit"),
    ({Q: low_rank(6, 4, lora_A=tensor(8))}, BASE, "does not fit"),
    ({Q: low_rank(6, 4, kind="conv")}, {Q: (6, 4, 3, 3)}, "does not fit"),
    ({Q: low_rank(6, 4)}, {Q: (6, 4, 2, 1)}, "does not fit"),
    ({Q: low_rank(6, 4)}, {Q: (24,)}, "does not fit"),
    ({Q: embedding(6, 5)}, BASE, "does not fit"),
    ({EMBED: embedding(4, 10)}, BASE, "does not fit"),
    ({Q: low_rank(6, 4), "model.norm.weight": saved(5)}, BASE, r"model\.norm\.weight \[4\]"),
    ({Q: saved(7, 4)}, BASE, "does not fit"),
    ({EMBED: saved(12, 5)}, BASE, "does not fit"),
    ({"model.layers.0.self_attn.q_proj.bias": shift(5)}, BASE, "does not fit"),
    ({EMBED: rows((10,), 4)}, BASE, "has 10 rows, and the adapter replaces row 10"),
    ({EMBED: rows((-1,), 4)}, BASE, "replaces row -1"),
    ({EMBED: rows((1, 1), 4)}, BASE, "one row twice"),
    ({EMBED: rows((1,), 5)}, BASE, "does not fit"),
    ({"model.norm.weight": rows((1,), 4)}, BASE, "does not fit"),
    ({"model.layers.1.self_attn.q_proj.weight": low_rank(6, 4)}, BASE, r"no module model\.layers\.1"),
    ({"h.q.weight": low_rank(6, 4)}, {"a.h.q.weight": (6, 4), "b.h.q.weight": (6, 4)}, "ambiguous"),
    ({"x.q.weight": saved(6, 4)}, {"a.x.q.weight": (6, 4), "b.x.q.weight": (6, 4)}, "ambiguous"),
    ({HEAD: saved(10, 4), "gpt.q.weight": low_rank(6, 4)}, {"gpt.q.weight": (6, 4), "embed_out.weight": (10, 4)},
     "which the base calls embed_out.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("updates", "shapes", "message"), BAD)
def test_what_does_not_fit(updates: dict[str, Update], shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        bound(updates, shapes)


def test_two_updates_of_one_tensor() -> None:
    shapes = {"encoder.q.weight": (6, 4), "encoder.dense.weight": (6, 4)}
    updates: dict[str, Update] = {
        "bert.encoder.q.weight": low_rank(6, 4),
        "bert.encoder.dense.weight": saved(6, 4),
        "encoder.dense.weight": saved(6, 4),
    }
    with pytest.raises(IncompatibleError, match=r"both update encoder\.dense\.weight"):
        bound(updates, shapes)


@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "F8_E4M3", "BOOL"])
def test_dtypes_that_cannot_be_updated(dtype: str) -> None:
    with pytest.raises(IncompatibleError, match=f"stores it as {dtype}"):
        bind(adapter({Q: low_rank(6, 4)}), specs({Q: (6, 4)}, dtype), [], LLAMA)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_dtypes_that_can(dtype: str) -> None:
    assert bind(adapter({Q: low_rank(6, 4)}), specs({Q: (6, 4)}, dtype), [], LLAMA).updates


def test_an_integer_buffer_elsewhere_is_no_quantized_base() -> None:
    found = specs({Q: (6, 4)}) | specs({"embeddings.position_ids": (1, 8)}, "I64")
    assert bind(adapter({Q: low_rank(6, 4)}), found, [], LLAMA).updates


@pytest.mark.parametrize("ending", ["qweight", "weight_scale", "weight_scale_inv", "weight.absmax", "SCB", "scales"])
def test_quantized_bases_by_their_tensors(ending: str) -> None:
    name = Q.removesuffix("weight") + ending
    with pytest.raises(IncompatibleError, match=f"quantized: it has {name}"):
        bound({Q: low_rank(6, 4)}, {**BASE, name: (6,)})


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors"])
def test_quantized_bases_by_their_configuration(method: str) -> None:
    with pytest.raises(IncompatibleError, match=f"quantization_config says {method}"):
        bound({Q: low_rank(6, 4)}, BASE, {**LLAMA, "quantization_config": {"quant_method": method}})
    gguf = {**LLAMA, "quantization_config": {"quant_method": "gguf"}}
    assert bound({Q: low_rank(6, 4)}, BASE, gguf).updates


def test_kept_ties_bind_to_the_one_tensor() -> None:
    head = LowRank("linear", tensor(2, 4), tensor(10, 2), 2, 4.0, 2.0)
    update = only(bound({EMBED: embedding(10, 4), HEAD: head}, BASE, TIED, keeps_ties=True))
    assert (update.target, update.kind, update.tied_source) == (EMBED, "embedding", None)
    apart = bound({EMBED: embedding(10, 4), HEAD: head}, BASE, TIED)
    assert [each.target for each in apart.updates] == [HEAD, EMBED]


def test_an_explicit_tie() -> None:
    ties = [TieGroup("shared.weight", ("encoder.embed_tokens.weight",))]
    binding = bind(
        adapter({"encoder.embed_tokens.weight": Replacement(tensor(10, 4))}),
        specs({"shared.weight": (10, 4)}),
        ties,
        None,
    )
    assert only(binding).tied_source == "shared.weight"
