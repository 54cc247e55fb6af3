"""Trained adapters merged into loaded models: the bits of the merge on disk, and no weight changed in the end."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from live_toys import bits
from safetensors.torch import load_file

from loramgr import Workspace

os.environ["HF_HUB_OFFLINE"] = "1"

TASKS = [
    "lic-r8-qv", "py-r8-qv", "lic-r4-all", "py-r16-all-rslora", "lic-r8-dora", "py-r8-lmhead-saved", "lic-emb",
    "lic-rankpattern",
]  # fmt: skip
CASES = [
    *(("tinyllama-char", name, dtype) for name in TASKS for dtype in ("float32", "bfloat16", "float16")),
    *(("tinygpt2-char", name, "float32") for name in ("lic-r4-all", "lic-r8-dora", "py-r8-lnf-saved",
                                                      "py-r4-biasall-layers02")),
    *(("minilm", name, "float32") for name in ("lic-r8-qv", "lic-r8-pooler-saved", "py-r8-biaslora")),
    ("smollm2", "lic-r8-qv", "bfloat16"),
    ("albert-rxn", "rxn-r4-qv", "float32"),
]  # fmt: skip
Load = Callable[[str, str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Load:
    """Return a function from family and dtype to a freshly loaded model and its folder."""
    import transformers

    classes = {"minilm": "AutoModelForSequenceClassification", "albert-rxn": "AutoModelForMaskedLM"}
    fixtures = {"tinyllama-char": "tinyllama_base", "tinygpt2-char": "tinygpt2_base", "albert-rxn": "albert_base"}
    cast: dict[tuple[str, str], Path] = {}

    def load(family: str, dtype: str) -> tuple[Any, Path]:
        own = "bfloat16" if family == "smollm2" else "float32"
        options = {"num_labels": 4} if family == "minilm" else {}
        model_class = getattr(transformers, classes.get(family, "AutoModelForCausalLM"))
        folder = request.getfixturevalue(fixtures.get(family, f"{family}_base"))
        if dtype != own:
            if (family, dtype) not in cast:
                cast[family, dtype] = tmp_path_factory.mktemp(f"{family}-{dtype}")
                model_class.from_pretrained(folder, dtype=dtype).save_pretrained(cast[family, dtype])
            folder = cast[family, dtype]
        return model_class.from_pretrained(folder, dtype=dtype, **options), folder

    return load


@pytest.mark.parametrize(("family", "name", "dtype"), CASES)
def test_exact_numerics_make_the_bits_of_the_merge_on_disk(
    family: str, name: str, dtype: str, load: Load, shared_data: Path, tmp_path: Path
) -> None:
    adapter = shared_data / "trained" / family / name
    model, folder = load(family, dtype)
    before = bits(model)
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(folder, "base")
    workspace.merge("base", [str(adapter)], tmp_path / "merged")
    live = workspace.attach(model, base="base", numerics="exact")
    live.merge(adapter)
    found, compared = model.state_dict(), 0
    for key, tensor in load_file(next((tmp_path / "merged").glob("*.safetensors"))).items():
        same = key if key in found else next((other for other in found if other.endswith(f".{key}")), None)
        if same is not None:  # ALBERT's file has a pooler that its class lacks
            assert bits({key: found[same]}) == bits({key: tensor}), key
            compared += 1
    assert compared >= len(live.prepare(adapter).contents)
    live.unmerge()
    assert bits(model) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fast_numerics_stay_within_their_bound(dtype: str, load: Load, shared_data: Path, tmp_path: Path) -> None:
    adapter = shared_data / "trained/tinyllama-char/lic-r4-all"
    model, folder = load("tinyllama-char", dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Workspace(tmp_path / "home").attach(model, base=str(folder)).merge(adapter)
    after = model.state_dict()
    for delta in oracle.deltas(adapter):
        name, scaling = f"{delta.module}.weight", float(delta.scaling)
        factors = delta.lora_B.double(), delta.lora_A.double()
        exact = before[name].double() + scaling * factors[0] @ factors[1]
        reach = abs(scaling) * factors[0].abs() @ factors[1].abs()
        merged = after[name].double()
        ulp = torch.exp2(torch.frexp(merged.float()).exponent.double()) * torch.finfo(after[name].dtype).eps / 2
        half = ulp.clamp(min=torch.finfo(after[name].dtype).smallest_normal * torch.finfo(after[name].dtype).eps) / 2
        bound = half + 2.0**-24 * (merged.abs() + (factors[1].shape[0] + 2) * reach)
        assert bool(((merged - exact).abs() <= bound * (1 + 1e-9)).all()), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_no_weight_has_changed_after_many_switches(
    dtype: str, numerics: str, load: Load, shared_data: Path, tmp_path: Path
) -> None:
    model, _ = load("tinyllama-char", dtype)
    before = bits(model)
    live = Workspace(tmp_path / "home").attach(model, numerics=numerics)
    tasks = [live.prepare(shared_data / "trained/tinyllama-char" / name) for name in TASKS]
    first: dict[int, dict[str, bytes]] = {}
    draw = random.Random(4)
    for _ in range(1000 if os.environ.get("LORAMGR_SOAK") else 40):
        number = draw.randrange(len(tasks))
        live.switch(tasks[number])
        assert bits(model) == first.setdefault(number, bits(model))
    assert len(first) == len(TASKS)
    assert live.verify().ok
    live.unmerge()
    assert bits(model) == before
