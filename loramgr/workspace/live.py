"""Merging into a model in memory: adapters in, another one in one pass, and the base back bit for bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loramgr.errors import ConflictError, IntegrityError, UsageError
from loramgr.records import LiveReport, MergeCheck, MergedAdapter
from loramgr.workspace.home import Home
from loramgr.workspace.live_base import KnownBase
from loramgr.workspace.live_layout import Layout, named_tensors, read_layout
from loramgr.workspace.live_peft import refuse_active, refuse_changed_base, refuse_merged
from loramgr.workspace.live_plan import Asked, Request, plan_live
from loramgr.workspace.live_state import Composition, LiveState
from loramgr.workspace.options import NUMERICS
from loramgr.workspace.workspace import Workspace

if TYPE_CHECKING:
    import torch

__all__ = ["Composition", "LiveModel", "attach"]


def attach(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    *,
    home: Path | str | None = None,
    base: str | None = None,
    numerics: str = "fast",
    prove: bool = True,
    keep_tied: bool = False,
) -> LiveModel:
    """Take a model in memory in hand, to merge adapters into it in place; no weight changes yet.

    ```python
    live = loramgr.attach(model)
    live.merge("sql@prod")
    live.switch("chat=0.7", "style=0.3")
    with live.task("sql@v2"):
        model.generate(...)
    live.unmerge()  # the bits that were there before
    ```

    `home` is as for `Workspace`; see `Workspace.attach` for the rest.
    """
    return Workspace(home).attach(model, base=base, numerics=numerics, prove=prove, keep_tied=keep_tied)


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """How a model in memory is merged into; `base` None for the one that adapters record."""

    base: KnownBase | None
    numerics: str
    prove: bool
    keep_tied: bool


class LiveModel:
    """A model in memory and what is merged into it; made by `loramgr.attach`.

    Parameters keep their storage, so that compiled models and CUDA graphs stay valid; gradients are not recorded.
    Threads take turns. Whatever fails in the middle, signals included, leaves every tensor as it was before the call,
    or if that fails too, in a state that `unmerge` undoes. Work is queued in the caller's CUDA stream: whoever reads
    the weights in another stream has to wait for it.
    """

    def __init__(self, home: Home, model: torch.nn.Module | Mapping[str, torch.Tensor], options: LiveOptions) -> None:
        if options.numerics not in NUMERICS:
            raise UsageError(f"there are no {options.numerics!r} numerics", 'numerics="fast" or numerics="exact"')
        self._home = home
        self._model = model
        self._options = options
        self._state = LiveState()
        self._lock = threading.RLock()
        self._layout()

    @property
    def merged(self) -> tuple[MergedAdapter, ...]:
        """What is merged now: references, digests and weights; empty for the base.

        Raises ConflictError when a failure that could not be taken back left the model between two states.
        """
        return self._settled().adapters

    @property
    def residual_bytes(self) -> int:
        """Bytes of memory that the way back to the base takes: residuals, and originals of rewritten tensors."""
        return self._state.kept_bytes

    def prepare(self, *refs: Asked, force: bool = False, replacements_of: str | None = None) -> Composition:
        """Load adapters and check everything that can be known before a weight changes; no weight does.

        A reference is `NAME@TAG`, `NAME=WEIGHT`, (reference, weight), or the path of an adapter's folder. What is
        returned stands for the references in `merge`, `switch` and `task`, as often as wanted, without reading again.
        `force` accepts another base than the recorded one and results that are not finite; `replacements_of` is the
        adapter whose replaced tensors count where several replace one. Raises NotFoundError and IncompatibleError as a
        merge on disk does, and IncompatibleError for what cannot be done in place or for a model that is not the base.
        """
        with self._working():
            self._check_peft(force=force)
            layout = self._layout()
            options = self._options
            digests = self._state.digest_function(layout)
            request = Request(options.numerics, options.keep_tied, force, replacements_of, options.base, digests)
            plan = plan_live(self._home, layout, refs, request)
            self._state.take(layout, plan, prove=options.prove, strict=options.base is not None)
            return Composition(plan.adapters, plan.contents, self._state)

    def merge(self, *refs: Asked | Composition, force: bool = False, replacements_of: str | None = None) -> LiveReport:
        """Merge adapters into the base's weights; see `prepare` for the references and errors.

        Raises ConflictError when something is merged already, and when PEFT's own adapters are merged or active: then
        the model would be the sum of both.
        """
        with self._working():
            if self._settled().adapters:
                raise ConflictError(
                    f"{_named(self.merged)} is merged already", "switch() to others, or unmerge() first"
                )
            refuse_active(self._model)
            return self._go(self._composed(refs, force, replacements_of))

    def switch(self, *refs: Asked | Composition, force: bool = False, replacements_of: str | None = None) -> LiveReport:
        """Put adapters in the place of those that are merged, in one pass over the weights; see `prepare`.

        The result is the bits of merging them into the base. Raises ConflictError as `merge` for PEFT's own adapters.
        """
        with self._working():
            self._settled()
            refuse_active(self._model)
            return self._go(self._composed(refs, force, replacements_of))

    def unmerge(self) -> LiveReport:
        """Give every weight the bits of the base again; nothing happens where nothing is merged.

        With proofs, IntegrityError names a tensor that would not come back as it was first seen, since something else
        wrote to it; then nothing is changed.
        """
        with self._working():
            refuse_merged(self._model, self._state.names)
            wrong = self._state.unprovable() if self._options.prove else []
            if wrong:
                raise IntegrityError(
                    f"{wrong[0]} would not come back as it was: something else wrote to the model's weights",
                    "load the model's weights again, and attach to them",
                )
            return self._go(Composition())

    def verify(self) -> MergeCheck:
        """Compare every tensor that was ever merged into: without the merge with its digest, with it with the merge.

        The tensors in `mismatched` were written to by something else; no weight changes. Raises UsageError for a model
        attached without proofs.
        """
        with self._working():
            if not self._options.prove:
                raise UsageError("there are no digests to compare with", "attach(model, prove=True)")
            self._settled()
            wrong = sorted({*self._state.unprovable(), *self._state.unlike_merged()})
            return MergeCheck(not wrong, len(self._state), wrong)

    @contextmanager
    def task(
        self, *refs: Asked | Composition, force: bool = False, replacements_of: str | None = None
    ) -> Iterator[LiveModel]:
        """Have adapters merged for the block, and after it, however it ends, what was merged before; see `prepare`.

        Other threads' calls wait for the end of the block.
        """
        with self._lock:
            before = self._settled()
            self.switch(*refs, force=force, replacements_of=replacements_of)
            try:
                yield self
            finally:
                self._return_to(before)

    def __repr__(self) -> str:
        state = f"{_named(self._state.current.adapters) or 'nothing'} merged"
        if self._state.torn:
            state = "left between two states, unmerge() it"
        return f"<LiveModel of a {type(self._model).__name__}: {state}, {self.residual_bytes} bytes kept>"

    @contextmanager
    def _working(self) -> Iterator[None]:
        import torch

        with self._lock, torch.no_grad():
            yield

    def _layout(self) -> Layout:
        base = self._options.base
        return read_layout(self._model, None if base is None else base.config, keep_tied=self._options.keep_tied)

    def _settled(self) -> Composition:
        if self._state.torn:
            raise ConflictError("a failure left the model between two states", "unmerge() gives the base back")
        return self._state.current

    def _composed(self, refs: Sequence[Asked | Composition], force: bool, replacements_of: str | None) -> Composition:
        ready = [each for each in refs if isinstance(each, Composition)]
        if not ready:
            asked = [each for each in refs if not isinstance(each, Composition)]
            return self.prepare(*asked, force=force, replacements_of=replacements_of)
        self._check_peft(force=True)
        if len(refs) > 1 or ready[0].owner is not self._state:
            raise UsageError("what was prepared is for one model, and stands alone", "prepare(first, second, …)")
        return ready[0]

    def _return_to(self, before: Composition) -> None:
        if not before.adapters:
            self.unmerge()
            return
        with self._working():
            self._go(before)

    def _check_peft(self, *, force: bool) -> None:
        """Raise LoramgrError where PEFT has changed the weights that are to be merged into."""
        refuse_merged(self._model)
        if not force:
            refuse_changed_base(self._model)

    def _go(self, wanted: Composition) -> LiveReport:
        started = time.monotonic()
        tensors, kernels = self._state.become(wanted, named_tensors(self._model))
        seconds = round(time.monotonic() - started, 6)
        return LiveReport(list(wanted.adapters), tensors, kernels, self._state.kept_bytes, seconds)


def _named(adapters: Sequence[MergedAdapter]) -> str:
    return " + ".join(each.ref if each.weight == 1 else f"{each.ref}={each.weight:g}" for each in adapters)
