"""MiSS (arXiv 2409.15371; PEFT 0.21.2 `tuners/miss/layer.py`): one block of rows that is repeated along the inputs.

The delta's value at output o and input i is block[i mod r, o], in the variant mini block[i mod r, o mod mini_r]: a
low-rank product, the block's transpose times r rows of an identity that is repeated, in a size that only the base says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loramgr.adapter import LowRank, Opaque, Update
from loramgr.formats.configuration import Fields
from loramgr.formats.peft_tuners import TunerModule
from loramgr.formats.resolving import known_name
from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.views import ComputedTensor

if TYPE_CHECKING:
    import torch

__all__ = ["RepeatedBlocks", "read_miss"]

_SIZELESS = "its blocks are repeated along the inputs, and only the base says how many there are"


@dataclass(frozen=True, slots=True)
class RepeatedBlocks:
    """Gives MiSS' layers their factors by the sizes of a base."""

    modules: Mapping[str, TunerModule]
    is_mini: bool

    @property
    def described(self) -> str:
        """What the updates are until then."""
        return "blocks that are repeated in a size that the file does not say"

    @property
    def is_needed(self) -> bool:
        """Whether the updates mean nothing before, which they do."""
        return True

    def resolve(
        self, updates: Mapping[str, Update], specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> dict[str, Update]:
        """Return the updates with the factors of every layer, under the names that they have.

        Raises IncompatibleError, naming the module, for a layer that the base lacks or has in another size.
        """
        others: dict[str, Update] = {
            name: each for name, each in updates.items() if not isinstance(each, LowRank | Opaque)
        }
        return others | {f"{name}.weight": self._update(module, specs) for name, module in self.modules.items()}

    def _update(self, module: TunerModule, specs: Mapping[str, TensorSpec]) -> LowRank:
        block = module.tensors["miss_block"]
        rank, columns = block.spec.shape
        name = known_name(f"{module.name}.weight", specs)
        shape = () if name is None else specs[name].shape
        fits = len(shape) == 2 and (shape[0] % columns == 0 if self.is_mini else shape[0] == columns)
        if not fits:
            there = "no such layer" if name is None else f"it as {shape}"
            raise module.refused(f"miss_block is {block.spec.shape}, and the base has {there}")
        return LowRank("linear", _identities(block, shape[1]), _repeated(block, shape[0]), rank, float(rank), 1.0)


def read_miss(fields: Fields, modules: Mapping[str, TunerModule]) -> tuple[dict[str, Update], RepeatedBlocks]:
    """Return the updates as far as they are known without a base, and what completes them.

    Raises IncompatibleError, naming the module, for blocks of another rank than the configuration's.
    """
    rank = fields.rank("r")
    is_mini = fields.content.get("init_weights") == "mini"
    for module in modules.values():
        block = module.take("miss_block", (2,))
        expected = fields.rank("mini_r") if is_mini else block.spec.shape[1]
        if block.spec.shape != (rank, expected):
            raise module.refused(f"miss_block is {block.spec.shape}, the configuration says ({rank}, {expected})")
    kept = [view for module in modules.values() for view in module.tensors.values()]
    updates: dict[str, Update] = {view.spec.name: Opaque(view, "miss", _SIZELESS, rank) for view in kept}
    return updates, RepeatedBlocks(modules, is_mini)


def _identities(block: TensorView, inputs: int) -> ComputedTensor:
    rank = block.spec.shape[0]

    def make() -> torch.Tensor:
        import torch

        from loramgr.tensors import torch_dtype

        rows = torch.arange(rank)[:, None] == torch.arange(inputs)[None] % rank
        return rows.to(torch_dtype(block.spec.dtype))

    return ComputedTensor(TensorSpec(block.spec.name, block.spec.dtype, (rank, inputs)), make)


def _repeated(block: TensorView, outputs: int) -> ComputedTensor:
    rank, columns = block.spec.shape
    spec = TensorSpec(block.spec.name, block.spec.dtype, (outputs, rank))
    return ComputedTensor(spec, lambda: block.load().T.repeat(outputs // columns, 1))
