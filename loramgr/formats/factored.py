"""A down and an up projection with their alpha, put together as a low-rank update: kohya's, LyCORIS' and diffusers'.

Formula: W + alpha / r · up down (sd-scripts `networks/lora.py`); with a core between them (`lora_mid`, Tucker) the core
is multiplied into the down projection, W + alpha / r · up (mid ×₂ downᵀ) (LyCORIS `modules/locon.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from loramgr.adapter import Decomposed, Hadamard, Kronecker, LowRank
from loramgr.formats.factor_views import core_applied, reshaped
from loramgr.formats.scalars import scalar
from loramgr.formats.suffixed_keys import Module
from loramgr.tensorfile import TensorView

__all__ = ["MAX_DIMENSIONS", "Scaling", "decomposed", "low_rank", "scaling_of"]

MAX_DIMENSIONS = 5  # (out, in, depth, height, width)


@dataclass(frozen=True, slots=True)
class Scaling:
    """alpha and what it is divided by; `assumed` says that the file has no alpha and the format means the rank."""

    alpha: float
    rank: int
    assumed: bool = False

    @property
    def value(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.alpha / self.rank


def scaling_of(module: Module, rank: int) -> Scaling:
    """Return the module's scaling; an alpha that is missing or 0 means the rank. IncompatibleError for no number."""
    if "alpha" not in module.tensors:
        return Scaling(float(rank), rank, assumed=True)
    alpha = scalar(module.tensors["alpha"])
    return Scaling(float(rank), rank, assumed=True) if alpha == 0 else Scaling(alpha, rank)


def low_rank(module: Module) -> tuple[LowRank, Scaling]:
    """Return the update of a module with `down` and `up`, linear or a convolution, without a magnitude; its scaling.

    `down` is (r, in, k…) and `up` (out, r, 1…), either of them without its kernel of ones. Raises IncompatibleError,
    naming the module, for half a pair, shapes that do not multiply, and a kernel in the up projection.
    """
    module.need("down", "up")
    down, up = module.tensors["down"], module.tensors["up"]
    if min(len(module.shape("down")), len(module.shape("up"))) < 2 or 0 in (*down.spec.shape, *up.spec.shape):
        raise module.refused(f"down is {down.spec.shape} and up is {up.spec.shape}: empty or flattened")
    rank = down.spec.shape[0]
    if "mid" in module.tensors:
        down = _with_core(module, down, up.spec.shape[1])
    elif rank != up.spec.shape[1]:
        raise module.refused(f"down is {down.spec.shape} and up is {up.spec.shape}: the ranks do not fit each other")
    dims = max(len(down.spec.shape), len(up.spec.shape))
    if dims > MAX_DIMENSIONS or set(up.spec.shape[2:]) - {1} or len(down.spec.shape) not in (2, dims):
        raise module.refused(f"down is {down.spec.shape} and up is {up.spec.shape}: no layer has such factors")
    scaling = scaling_of(module, rank)
    ones = (1,) * (dims - 2)
    update = LowRank(
        kind="linear" if dims == 2 else "conv",
        lora_A=reshaped(down, (*down.spec.shape, *ones)[:dims]),
        lora_B=reshaped(up, (*up.spec.shape[:2], *ones)),
        rank=down.spec.shape[0],
        alpha=scaling.alpha,
        scaling=scaling.value,
    )
    return update, scaling


def _with_core(module: Module, down: TensorView, rank: int) -> TensorView:
    core = module.tensors["mid"]
    shape = core.spec.shape
    if not 2 < len(shape) <= MAX_DIMENSIONS or shape[:2] != (rank, down.spec.shape[0]) or 0 in shape:
        raise module.refused(f"mid is {shape}, between a down of rank {down.spec.shape[0]} and an up of rank {rank}")
    if set(down.spec.shape[2:]) - {1}:
        raise module.refused(f"down is {down.spec.shape}: beside a mid it has no kernel of its own")
    return core_applied(core, reshaped(down, down.spec.shape[:2]))


def decomposed(
    module: Module, update: LowRank | Hadamard | Kronecker, layer: tuple[int, int]
) -> LowRank | Hadamard | Kronecker | Decomposed:
    """Return the update with the module's magnitude (DoRA), itself where the file has none.

    `layer` is (out, in), or (out, in·k…) where the factors of a convolution are flattened. The magnitude's shape tells
    what it counts: (out, 1…) or a vector the outputs, (1, in, 1…) the inputs (LyCORIS' `wd_on_output=False`), and
    in PEFT's tensors (1, out, 1…) the outputs of a convolution. Raises IncompatibleError for another shape.
    """
    if "magnitude" not in module.tensors:
        return update
    tensor, (outputs, inputs) = module.tensors["magnitude"], layer
    is_pefts = "lora_magnitude_vector" in tensor.spec.name
    counted = _counted(tensor.spec.shape, outputs, inputs, is_pefts=is_pefts)
    if counted is None:
        raise module.refused(f"the magnitude is {tensor.spec.shape}, it must be ({outputs}, 1) or (1, {inputs})")
    magnitude = reshaped(tensor, (tensor.spec.elements,))
    if counted == "outputs" and isinstance(update, LowRank) and update.kind == "linear":
        return replace(update, magnitude=magnitude)
    return Decomposed(update, magnitude, by_input=counted == "inputs")


def _counted(
    shape: tuple[int, ...], outputs: int, inputs: int, *, is_pefts: bool
) -> Literal["outputs", "inputs"] | None:
    """Return what a magnitude of the shape counts, None where it fits neither."""
    ones = (1,) * (len(shape) - 2)
    if shape in ((outputs,), (outputs, 1, *ones)):
        return "outputs"
    if len(shape) < 2 or shape[0] != 1 or shape[2:] != ones:
        return None
    if is_pefts:
        return "outputs" if ones and shape[1] == outputs else None
    fits = shape[1] == inputs or (ones and shape[1] and inputs % shape[1] == 0)
    return "inputs" if fits else None
