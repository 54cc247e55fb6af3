"""Whatever fails around a kernel of a merge, a switch or an unmerge in memory: the base comes back bit for bit.

`test_kernels.py` runs this file in Triton's interpreter, on weights of float32 and float16 (docs/residual.md says why
no others); with LORAMGR_SOAK=1 it breaks every operation there is. What fails is an operation of torch, those with
which the interpreter starts a kernel included: it starts or it does not. A kernel that has run is not made undone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from live_toys import bits
from peft_files import write_adapter
from safetensors.torch import save_file
from test_live_faults import Breaking, spread
from torch.utils._python_dispatch import _disable_current_modes

import loramgr
from loramgr import ConflictError
from loramgr.algebra.kernels import launch
from loramgr.algebra.kernels.tiled import TiledResidual

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="operations are counted where the interpreter runs the kernels"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
SHAPES = {"m.q.weight": (66, 20), "m.k.weight": (20, 12)}
EVERY_CHANGE = [
    *((None, "small"), (None, "large"), ("small", "large"), ("large", "other"), ("large", None), ("other", None)),
]
CHANGES = EVERY_CHANGE if os.environ.get("LORAMGR_SOAK") else [EVERY_CHANGE[1], EVERY_CHANGE[3], EVERY_CHANGE[4]]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = {name: torch.randn(shape, generator=generator) / 50 for name, shape in SHAPES.items()}
    return {**found, "m.k.weight": found["m.k.weight"].half()}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return adapters, of which "large" has tiles that the kernels keep whole, and "other" one tensor only."""
    found = {}
    for seed, (name, size, targets) in enumerate([("small", 0.02, "qk"), ("large", 20.0, "qk"), ("other", 0.1, "q")]):
        generator = torch.Generator().manual_seed(seed)
        folder = found[name] = tmp_path_factory.mktemp(name)
        write_adapter(folder, r=2, lora_alpha=2)
        factors = {}
        for target in targets:
            rows, columns = SHAPES[f"m.{target}.weight"]
            prefix = f"base_model.model.m.{target}.lora_"
            factors[f"{prefix}A.weight"] = torch.randn(2, columns, generator=generator) * size / 50
            factors[f"{prefix}B.weight"] = torch.randn(rows, 2, generator=generator)
        save_file(factors, folder / "adapter_model.safetensors")
    return found


@pytest.fixture(autouse=True)
def _a_kernel_ends_where_it_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter does after a kernel, which copies a CPU's tensors to themselves, is no place to break."""
    from triton.runtime.interpreter import GridExecutor

    restore = GridExecutor._restore_args_dev

    def unbroken(*args: Any) -> None:
        with _disable_current_modes():
            restore(*args)

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", unbroken)


class Stage:
    """Weights with something merged or nothing, and something to go on to, all by kernels."""

    def __init__(self, adapters: dict[str, Path], before: str | None, after: str | None) -> None:
        self.weights = weights()
        self.base = bits(self.weights)
        self.live = loramgr.attach(self.weights)
        self.ready = {name: self.live.prepare(adapters[name]) for name in (before, after) if name is not None}
        self.go(after)
        self.after = bits(self.weights)
        self.go(before)
        self.before, self.merged = bits(self.weights), self.live.merged
        self.target, self.origin = after, before

    def go(self, to: str | None) -> None:
        report = self.live.unmerge() if to is None else self.live.switch(self.ready[to])
        assert report.kernels in (["triton"], [])

    def act(self) -> None:
        self.go(self.target)

    def reset(self) -> None:
        self.go(self.origin)

    def places(self) -> Iterator[int]:
        with Breaking(0, "once") as counted:
            self.act()
        self.reset()
        yield from spread(counted.count, 2)


changing = pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)


def test_the_tiles_of_a_large_change_are_kept_whole(adapters: dict[str, Path]) -> None:
    stage = Stage(adapters, None, "large")
    stage.act()
    held = [each.merged.residual for each in stage.live._state._tensors.values() if each.merged is not None]
    assert all(isinstance(residual, TiledResidual) for residual in held)
    assert sum(residual.whole_tiles.numel() for residual in held if isinstance(residual, TiledResidual)) >= 1


@changing
def test_a_change_that_fails_is_taken_back(before: str | None, after: str | None, adapters: dict[str, Path]) -> None:
    stage = Stage(adapters, before, after)
    for place in stage.places():
        with pytest.raises(MemoryError), Breaking(place, "once"):
            stage.act()
        assert bits(stage.weights) == stage.before, place
        assert stage.live.merged == stage.merged
    assert stage.live.verify().ok
    stage.act()
    assert bits(stage.weights) == stage.after
    stage.live.unmerge()
    assert bits(stage.weights) == stage.base


@changing
def test_what_cannot_be_taken_back_can_be_unmerged(
    before: str | None, after: str | None, adapters: dict[str, Path]
) -> None:
    stage = Stage(adapters, before, after)
    for place in stage.places():
        with pytest.raises(MemoryError), Breaking(place, "for good"):
            stage.act()
        with suppress(ConflictError):
            assert stage.live.merged == stage.merged
            assert bits(stage.weights) == stage.before, place
            continue
        stage.live.unmerge()
        assert bits(stage.weights) == stage.base, place
        stage.reset()
        assert bits(stage.weights) == stage.before


@pytest.mark.parametrize(("before", "after"), EVERY_CHANGE[1:5:2], ids=str)
def test_an_interrupt_waits_for_the_tensor_at_work(
    before: str | None, after: str | None, adapters: dict[str, Path]
) -> None:
    stage = Stage(adapters, before, after)
    for place in stage.places():
        with pytest.raises(KeyboardInterrupt), Breaking(place, "signal"):
            stage.act()
        changed = stage.live.merged != stage.merged
        assert bits(stage.weights) == (stage.after if changed else stage.before), place
        stage.reset()
    stage.live.unmerge()
    assert bits(stage.weights) == stage.base
