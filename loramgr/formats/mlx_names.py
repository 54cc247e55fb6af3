"""mlx-lm's names of the experts of a mixture, which stand in one tensor there, and transformers' names of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loramgr.adapter import Experts, LowRank, Naming, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.resolving import known_name
from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.views import ComputedTensor

__all__ = ["SWITCH", "SwitchNames"]

SWITCH = ".switch_mlp."
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True, slots=True)
class SwitchNames(Naming):
    """How `mlp.switch_mlp.gate_proj` becomes the experts of a base, each a tensor or all of them one."""

    @property
    def described(self) -> str:
        """Whose names they are, for a person."""
        return "the names of mlx-lm's switch layers"

    @property
    def is_needed(self) -> bool:
        """Whether the updates mean nothing before."""
        return True

    def resolve(
        self, updates: Mapping[str, Update], specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> dict[str, Update]:
        """Return the updates with the experts by the base's names; see `Naming`."""
        resolved: dict[str, Update] = {}
        for name, update in updates.items():
            if isinstance(update, Experts) and name not in specs:
                resolved.update(_resolved(name, update, specs))
            else:
                resolved[name] = update
        return resolved


def _resolved(name: str, update: Experts, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Update]]:
    block, _, leaf = name.removesuffix(".weight").partition(SWITCH)
    whole = known_name(f"{block}.experts.{leaf}", specs)
    if whole is not None:
        yield whole, update
        return
    for index in range(update.lora_A.spec.shape[0]):
        names = (f"{block}.experts.{index}.{each}.weight" for each in (leaf, _MIXTRAL.get(leaf, leaf)))
        found = next((known for each in names if (known := known_name(each, specs)) is not None), None)
        if found is None:
            raise IncompatibleError(
                f"the base has no expert {index} of {block} with a {leaf} of its own",
                "name the base that the adapter was trained on",
            )
        pair = _expert(update.lora_A, index), _expert(update.lora_B, index)
        yield found, LowRank("linear", *pair, update.rank, update.alpha, update.scaling)


def _expert(view: TensorView, index: int) -> TensorView:
    spec = TensorSpec(view.spec.name, view.spec.dtype, view.spec.shape[1:])
    return ComputedTensor(spec, lambda: view.load()[index])
