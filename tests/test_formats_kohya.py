"""kohya's files: names, alphas, metadata, the hash of the base's file, and what is refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from kohya_files import Network, save_base
from safetensors.torch import load_file, save_file

from loramgr import AddOptions, IncompatibleError, IntegrityError, Workspace
from loramgr.adapter import LowRank
from loramgr.formats import read_adapter
from loramgr.formats.foreign_names import ForeignNames
from loramgr.tensorfile import TensorSpec

PAIR = {"lora_unet_a_b.lora_down.weight": (2, 3), "lora_unet_a_b.lora_up.weight": (4, 2)}


def _save(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, path, metadata)
    return path


def _specs(*modules: str) -> dict[str, TensorSpec]:
    return {f"{module}.weight": TensorSpec(f"{module}.weight", "F32", (4, 3)) for module in modules}


def test_alpha_is_per_module_and_means_the_rank_where_it_is_missing(tmp_path: Path) -> None:
    shapes = PAIR | {name.replace("a_b", "c"): shape for name, shape in PAIR.items()}
    path = tmp_path / "two.safetensors"
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors | {"lora_unet_c.alpha": torch.tensor(1, dtype=torch.bfloat16)}, path)
    adapter = read_adapter(path)
    assert (adapter.format, adapter.method) == ("kohya", "lora")
    scalings = {name: each.scaling for name, each in adapter.updates.items() if isinstance(each, LowRank)}
    assert scalings == {"lora_unet_a_b.weight": 1.0, "lora_unet_c.weight": 0.5}
    assert any("lora_unet_a_b" in said and "rank" in said for said in adapter.warnings)


def test_the_header_is_read_without_torch(tmp_path: Path, root: Path) -> None:
    path = _save(tmp_path / "a.safetensors", PAIR | {"lora_unet_a_b.alpha": ()})
    probe = "import sys; from pathlib import Path; from loramgr.formats import read_adapter\n"
    probe += "read_adapter(Path(sys.argv[1])); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe, path], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"


WRONG = {
    "no up": ({"lora_unet_a.lora_down.weight": (2, 3)}, "no up"),
    "swapped": (
        {"lora_unet_a.lora_down.weight": (4, 2), "lora_unet_a.lora_up.weight": (2, 3)},
        "ranks do not fit",
    ),
    "swapped and square": (
        {"lora_unet_a.lora_down.weight": (8, 2), "lora_unet_a.lora_up.weight": (2, 8)},
        "look exchanged",
    ),
    "ranks": (PAIR | {"lora_unet_a_b.lora_up.weight": (4, 3)}, "ranks do not fit"),
    "core": (PAIR | {"lora_unet_a_b.lora_mid.weight": (2, 3, 3, 3)}, "mid is"),
    "kernel in up": (
        {"lora_unet_a.lora_down.weight": (2, 3, 1, 1), "lora_unet_a.lora_up.weight": (4, 2, 3, 3)},
        "no layer has such factors",
    ),
    "flattened": ({"lora_unet_a.lora_down.weight": (6,), "lora_unet_a.lora_up.weight": (4, 2)}, "empty or flattened"),
    "alpha": (PAIR | {"lora_unet_a_b.alpha": (3,)}, "single number"),
    "stray": (PAIR | {"lora_unet_a_b.reshape_weight": (2,)}, "lora_unet_a_b.reshape_weight"),
    "magnitude": (PAIR | {"lora_unet_a_b.dora_scale": (9,)}, "magnitude"),
}


@pytest.mark.parametrize(("shapes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_tensors_are_named(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        read_adapter(_save(tmp_path / "wrong.safetensors", shapes))


def test_what_the_metadata_says_and_no_tensor_bears_out_is_told(tmp_path: Path) -> None:
    said = {"ss_network_alpha": "1", "ss_network_args": '{"dora_wd": "True"}'}
    warnings = read_adapter(_save(tmp_path / "a.safetensors", PAIR, said)).warnings
    assert [any(word in each for each in warnings) for word in ("ss_network_alpha '1'", "no dora_scale")] == [
        True,
        True,
    ]
    whole = PAIR | {"lora_unet_a_b.alpha": (), "lora_unet_a_b.dora_scale": (4, 1)}
    warnings = read_adapter(_save(tmp_path / "b.safetensors", whole, said)).warnings
    assert not any("ss_network" in each for each in warnings)


def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path) -> None:
    tensors = {name: torch.ones(shape) for name, shape in PAIR.items()}
    save_file(tensors | {"lora_unet_a_b.alpha": torch.tensor(float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(IncompatibleError, match="finite"):
        read_adapter(tmp_path / "nan.safetensors")


def test_half_a_character_in_a_name_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.safetensors", PAIR | {"lora_unet_ab12.alpha": ()})
    path.write_bytes(path.read_bytes().replace(b"unet_ab12.a", b"une\\ud800.a"))
    with pytest.raises(IntegrityError, match="not Unicode"):
        read_adapter(path)


def _resolve(flat: str, *modules: str) -> str:
    names = ForeignNames((flat,), "_")
    path = Path("unused")
    spec = TensorSpec(flat, "F32", (2, 3))
    from loramgr.tensorfile import FileTensor

    update = LowRank("linear", FileTensor(spec, path, 0), FileTensor(spec, path, 0), 2, 2.0, 1.0)
    (name,) = names.resolve({f"{flat}.weight": update}, _specs(*modules), None)
    return name


@pytest.mark.parametrize(
    ("flat", "modules", "expected"),
    [
        ("lora_unet_a_b_to_q", ("a_b.to_q", "a_b.to_k"), "a_b.to_q"),
        ("lora_unet_down_0_to_out_0", ("unet.down.0.to_out.0",), "unet.down.0.to_out.0"),
        ("lora_unet_input_blocks_1_0", ("model.diffusion_model.input_blocks.1.0",), None),
        ("lora_te_text_model_layers_0_q", ("text_model.layers.0.q",), None),
        ("lora_te_text_model_layers_0_q", ("layers.0.q",), None),
        ("lora_te2_layers_0_q", ("text_encoder.layers.0.q", "text_encoder_2.layers.0.q"), "text_encoder_2.layers.0.q"),
        ("lora_transformer_blocks_0_q", ("blocks.0.q",), None),
        ("lycoris_model_layers_0_self_attn_q_proj", ("model.layers.0.self_attn.q_proj",), None),
        ("lora_unet_q", ("q", "x.q"), "q"),
    ],
)
def test_names_are_resolved_against_the_base(flat: str, modules: tuple[str, ...], expected: str | None) -> None:
    assert _resolve(flat, *modules, "other.norm") == f"{expected or modules[0]}.weight"


@pytest.mark.parametrize(
    ("flat", "modules", "message"),
    [
        ("lora_unet_a_b_c", ("a.b_c", "a_b.c"), "a.b_c or a_b.c"),
        ("lora_unet_layers_1_q", ("layers.0.q",), "no module for lora_unet_layers_1_q.*layers.0.q"),
        ("lora_unet_down_blocks_0_q", ("blocks.0.q",), "no module for lora_unet_down_blocks_0_q"),
        ("lora_te1_layers_0_q", ("left.layers.0.q", "right.layers.0.q"), "ambiguous"),
    ],
)
def test_names_that_are_not_clear_are_refused(flat: str, modules: tuple[str, ...], message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        _resolve(flat, *modules)


def test_a_base_that_is_one_model_of_several_is_told(tmp_path: Path) -> None:
    names = ForeignNames(("lora_unet_a_q", "lora_te_b_q"), "_")
    with pytest.raises(IncompatibleError, match="modules of lora_unet_ and not those of lora_te_") as caught:
        names.resolve({}, _specs("a.q"), None)
    assert "one .safetensors file" in str(caught.value.hint)
    with pytest.raises(IncompatibleError, match=r"no module for lora_te_b_q$"):
        names.resolve({}, _specs("c"), None)
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    with pytest.raises(IncompatibleError, match="a pipeline of diffusers") as caught:
        Workspace(tmp_path / "home").base_add(pipeline, "pipeline")
    assert "unet, transformer, text_encoder" in str(caught.value.hint)


@pytest.mark.parametrize("as_convolution", [True, False])
def test_a_one_by_one_convolution_is_a_linear_layer(tmp_path: Path, as_convolution: bool) -> None:
    before = save_base(tmp_path / "base.safetensors", Network())
    generator = torch.Generator().manual_seed(2)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 8), (8, 2)))
    linear_down, linear_up = (torch.randn(shape, generator=generator) for shape in ((2, 12), (16, 2)))
    ones = (1, 1) if as_convolution else ()
    tensors = {
        "lora_unet_conv_out.lora_down.weight": down.reshape(2, 8, *ones),
        "lora_unet_conv_out.lora_up.weight": up.reshape(8, 2, *ones),
        "lora_unet_blocks_0_to_q.lora_down.weight": linear_down.reshape(2, 12, *ones),
        "lora_unet_blocks_0_to_q.lora_up.weight": linear_up.reshape(16, 2, *ones),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(tmp_path / "base.safetensors", "base")
    workspace.add(tmp_path / "a.safetensors", AddOptions(name="a", base="base"))
    workspace.merge("base", ["a"], tmp_path / "merged")
    (path,) = (tmp_path / "merged").glob("*.safetensors")
    merged = load_file(path)
    for name, delta in (
        ("conv_out", up.double() @ down.double()),
        ("blocks.0.to_q", linear_up.double() @ linear_down.double()),
    ):
        weight = before[f"{name}.weight"]
        assert (merged[f"{name}.weight"] - weight - delta.reshape(weight.shape)).abs().max() <= 1e-12


def test_the_base_is_found_by_the_hash_of_its_file(tmp_path: Path) -> None:
    save_base(tmp_path / "sd.safetensors", Network())
    other = Network()
    with torch.no_grad():
        other.conv_in.weight.add_(1)
    save_base(tmp_path / "other.safetensors", other)
    data = (tmp_path / "sd.safetensors").read_bytes()
    metadata = {
        "ss_new_sd_model_hash": hashlib.sha256(data).hexdigest(),
        "ss_sd_model_hash": hashlib.sha256(data[1 << 20 : (1 << 20) + (1 << 16)]).hexdigest()[:8],
        "ss_sd_model_name": "whatever.safetensors",
        "ss_network_dim": "2",
    }
    shapes = {"lora_unet_blocks_0_to_q.lora_down.weight": (2, 12), "lora_unet_blocks_0_to_q.lora_up.weight": (16, 2)}
    path = _save(tmp_path / "a.safetensors", shapes, metadata)
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(tmp_path / "other.safetensors", "other")
    workspace.base_add(tmp_path / "sd.safetensors", "sd")
    added = workspace.add(path)
    assert added.base is not None
    assert added.base.name == "sd"
    assert workspace.inspect(added.name).training["ss_network_dim"] == "2"
    elsewhere = workspace.add(path, AddOptions(name="b", base="other"))
    assert any("not that file" in said for said in elsewhere.warnings)
