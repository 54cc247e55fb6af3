"""All tensors of a model that were ever merged into, and how they go from one state to another, together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loramgr.errors import ConflictError
from loramgr.records import MergedAdapter
from loramgr.workspace.live_digests import sha256_of, sha256s
from loramgr.workspace.live_layout import Layout
from loramgr.workspace.live_plan import LivePlan
from loramgr.workspace.live_room import check_room
from loramgr.workspace.live_signals import held_back
from loramgr.workspace.live_tensor import Content, LiveTensor, settle

if TYPE_CHECKING:
    import torch

__all__ = ["Composition", "LiveState"]


@dataclass(frozen=True, slots=True)
class Composition:
    """Adapters with their weights, loaded and ready to be merged into the model they were prepared for.

    `contents` says what each tensor becomes; empty for the base. `owner` is the state of the model, None for the base.
    """

    adapters: tuple[MergedAdapter, ...] = ()
    contents: Mapping[str, Content] = field(default_factory=dict, repr=False)
    owner: LiveState | None = field(default=None, repr=False, compare=False)


class LiveState:
    """The tensors in hand, and what is merged into them.

    `current` is what the last change that succeeded led to; `torn` says that one failed half way since and could not be
    taken back.
    """

    def __init__(self) -> None:
        self.current = Composition()
        self.torn = False
        self._tensors: dict[str, LiveTensor] = {}

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def names(self) -> list[str]:
        """The tensors that something is merged into now."""
        return [each.name for each in self._tensors.values() if each.content is not None]

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory that undoing everything takes."""
        return sum(each.kept_bytes for each in self._tensors.values())

    def digest_function(self, layout: Layout) -> Callable[[str], str]:
        """Return the function from a tensor's name to the sha256 of its bytes without anything merged into it."""

        def sha256(name: str) -> str:
            known = self._tensors.get(name)
            return sha256_of(layout.tensors[name] if known is None else known.recovered())

        return sha256

    def take(self, layout: Layout, plan: LivePlan, *, prove: bool, strict: bool) -> None:
        """Take what a plan will change in hand: with `prove`, its digests are taken, and compared with the plan's base.

        `strict` refuses other dtypes than the base's, too, whose bytes cannot be compared. Raises IncompatibleError for
        a model that is not the base, ConflictError for a tensor that was replaced while something was merged into it.
        """
        self._check_held([each for each in self._tensors.values() if each.content is not None], layout.tensors)
        fresh = {
            name: LiveTensor(name, layout.tensors[name])
            for name in plan.contents
            if name not in self._tensors or self._tensors[name].tensor is not layout.tensors[name]
        }
        if prove:
            taken = sha256s(each.tensor for each in fresh.values())
            for each, digest in zip(fresh.values(), taken, strict=True):
                each.sha256 = digest
        in_hand = {**self._tensors, **fresh}
        if plan.base is not None:
            digests = {name: in_hand[name].sha256 for name in plan.base_names}
            plan.base.check(plan.base_names, layout.specs, digests, strict=strict)
        self._tensors = in_hand

    def become(self, wanted: Composition, present: Mapping[str, torch.Tensor]) -> tuple[int, list[str]]:
        """Bring every tensor to what the composition makes of it; return how many changed and which kernels ran.

        `present` are the model's tensors. When one fails, those before it are taken back; signals wait for the tensor
        at work. Raises LoramgrError, with nothing changed, where a GPU has no room for the way back.
        """
        contents = wanted.contents
        changing = [each for each in self._tensors.values() if each.content is not contents.get(each.name)]
        self._check_held(changing, present)
        new = [each for each in changing if not each.kept_bytes]
        check_room((each.tensor, contents[each.name]) for each in new if each.name in contents)
        kernels = set()
        begun: list[tuple[LiveTensor, Content | None]] = []
        with held_back() as deliver:
            try:
                for each in changing:
                    deliver()
                    begun.append((each, each.content))
                    kernels.add(each.become(contents.get(each.name)))
                settle(changing)
            except BaseException as error:
                self._take_back(begun, error)
                raise
            self.current, self.torn = wanted, False
        return len(changing), sorted(kernels)

    def unprovable(self) -> list[str]:
        """Return the tensors that would not be those of the base without what is merged, by their digests."""
        in_hand = list(self._tensors.values())
        digests = sha256s(each.recovered() for each in in_hand)
        return [each.name for each, digest in zip(in_hand, digests, strict=True) if digest != each.sha256]

    def unlike_merged(self) -> list[str]:
        """Return the tensors whose bytes are not those that merging into the base's makes."""
        merged = (each for each in self._tensors.values() if each.content is not None)
        return [each.name for each in merged if not each.is_as_merged(each.recovered())]

    def _take_back(self, begun: Sequence[tuple[LiveTensor, Content | None]], error: BaseException) -> None:
        try:
            for each, content in reversed(begun):
                each.become(content)
            settle([each for each, _ in begun])
        except BaseException as second:
            self.torn = True
            error.add_note(f"taking it back failed as well ({second}): unmerge() gives the base back")
        else:
            error.add_note("every weight is as it was before the call")

    def _check_held(self, tensors: Sequence[LiveTensor], present: Mapping[str, torch.Tensor]) -> None:
        for each in tensors:
            if present.get(each.name) is not each.tensor:
                raise ConflictError(
                    f"{each.name} of the model was replaced by another tensor since it was merged into",
                    "load the model again, and attach to it",
                )
