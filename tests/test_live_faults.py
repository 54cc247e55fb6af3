"""Whatever fails in the middle of a merge, a switch or an unmerge: every weight can still be given back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from live_toys import Toy, bits, toy_adapters
from torch.utils._python_dispatch import TorchDispatchMode

import loramgr
from loramgr import ConflictError
from loramgr.workspace.live_signals import held_back


class Breaking(TorchDispatchMode):
    """Breaks one operation on tensors, or every one from there on, or sends the process a signal after it."""

    def __init__(self, at: int, how: str) -> None:
        super().__init__()
        self.at = at
        self.how = how
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at or (self.how == "for good" and self.count > self.at):
            if self.how == "signal":
                result = func(*args, **(kwargs or {}))
                signal.raise_signal(signal.SIGINT)
                return result
            raise MemoryError("no memory left")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return toy_adapters(tmp_path_factory.mktemp("toys"))


class Stage:
    """A toy model with something merged or nothing, and something to go on to."""

    def __init__(self, adapters: dict[str, Path], before: str | None, after: str | None, numerics: str) -> None:
        self.model = Toy()
        self.base = bits(self.model)
        self.live = loramgr.attach(self.model, numerics=numerics)
        ready = {name: self.live.prepare(adapters[name]) for name in (before, after) if name is not None}
        self.reset: Callable[[], Any] = self.live.unmerge if before is None else lambda: self.live.switch(ready[before])
        self.act: Callable[[], Any] = self.live.unmerge if after is None else lambda: self.live.switch(ready[after])
        self.act()
        self.after = bits(self.model)
        self.reset()
        self.before, self.merged = bits(self.model), self.live.merged

    def places(self) -> Iterator[int]:
        """Yield numbers of operations to break, from the first to the last: twelve of them, or in a soak all."""
        with Breaking(0, "once") as counted:
            self.act()
        self.reset()
        yield from spread(counted.count)


def spread(count: int, some: int = 11) -> list[int]:
    """Return about `some` numbers from 1 to `count`, both included, or in a soak all."""
    step = 1 if os.environ.get("LORAMGR_SOAK") else max(1, count // some)
    return [*range(1, count, step), count]


CHANGES = [
    (None, "plain"),
    (None, "head"),
    ("plain", "other"),
    ("plain", "dora"),
    ("dora", "head"),
    ("bias", "dora"),
    ("plain", None),
    ("dora", None),
    ("head", None),
]


@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
def test_a_change_that_fails_is_taken_back(
    before: str | None, after: str | None, numerics: str, adapters: dict[str, Path]
) -> None:
    stage = Stage(adapters, before, after, numerics)
    for place in stage.places():
        with pytest.raises(MemoryError), Breaking(place, "once"):
            stage.act()
        assert bits(stage.model) == stage.before, place
        assert stage.live.merged == stage.merged
        assert stage.live.verify().ok
    stage.act()
    assert bits(stage.model) == stage.after
    stage.live.unmerge()
    assert bits(stage.model) == stage.base


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
def test_what_cannot_be_taken_back_can_be_unmerged(
    before: str | None, after: str | None, adapters: dict[str, Path]
) -> None:
    stage = Stage(adapters, before, after, "fast")
    torn = 0
    for place in stage.places():
        with pytest.raises(MemoryError), Breaking(place, "for good"):
            stage.act()
        with suppress(ConflictError):
            assert stage.live.merged == stage.merged
            assert bits(stage.model) == stage.before
            continue
        torn += 1
        assert "unmerge() it" in repr(stage.live)
        with pytest.raises(ConflictError, match="between two states"):
            stage.live.switch(adapters["plain"])
        stage.live.unmerge()
        assert bits(stage.model) == stage.base, place
        assert stage.live.merged == ()
        stage.reset()
        assert bits(stage.model) == stage.before
    assert torn


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
def test_an_interrupt_waits_for_the_tensor_at_work(
    before: str | None, after: str | None, adapters: dict[str, Path]
) -> None:
    stage = Stage(adapters, before, after, "fast")
    for place in stage.places():
        with pytest.raises(KeyboardInterrupt), Breaking(place, "signal"):
            stage.act()
        changed = stage.live.merged != stage.merged
        assert bits(stage.model) == (stage.after if changed else stage.before), place
        assert stage.live.verify().ok
        stage.reset()
    stage.live.unmerge()
    assert bits(stage.model) == stage.base


def test_a_failure_while_preparing_changes_nothing(adapters: dict[str, Path]) -> None:
    model = Toy()
    live = loramgr.attach(model)
    with Breaking(0, "once") as counted:
        live.prepare(adapters["head"])
    for place in spread(counted.count):
        fresh = loramgr.attach(model)
        with pytest.raises(MemoryError), Breaking(place, "once"):
            fresh.merge(adapters["head"])
        assert bits(model) == bits(Toy())
        assert fresh.merged == ()


def test_a_signal_is_delivered_when_it_is_asked_for_or_at_the_end() -> None:
    came: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: came.append("handled"))
    try:
        with held_back() as deliver:
            signal.raise_signal(signal.SIGUSR1)
            came.append("held back")
            deliver()
            signal.raise_signal(signal.SIGUSR1)
            came.append("held back again")
        assert came == ["held back", "handled", "held back again", "handled"]
        signal.raise_signal(signal.SIGUSR1)
        assert len(came) == 5
    finally:
        signal.signal(signal.SIGUSR1, before)
