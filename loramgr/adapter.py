"""The one in-memory form of an adapter: per parameter one update out of a closed set.

Every file format reads into it; merge, inspect and export know only it. Building one reads headers, not data: tensors
are `TensorView`s, loaded when an update is applied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from loramgr.tensorfile import TensorSpec, TensorView

__all__ = ["Adapter", "LowRank", "Replacement", "Rows", "Shift", "Update"]

LowRankKind = Literal["linear", "embedding", "conv"]


@dataclass(frozen=True, slots=True)
class LowRank:
    """W becomes W + scaling · lora_B lora_A (Hu et al. 2021, arXiv 2106.09685), or its decomposition by DoRA.

    `lora_A` is (r, in), `lora_B` (out, r); for a convolution they carry the kernel, (r, in, k…) and (out, r, 1…), for
    an embedding W is (vocabulary, dim), `lora_A` (r, vocabulary) and `lora_B` (dim, r), and the product is transposed.
    `fan_in_fan_out` is what the configuration says of the layer (W stored as (in, out)); shapes have the last word.
    With `magnitude` (DoRA, arXiv 2402.09353) W becomes magnitude · V / ‖V‖ with V = W + scaling · lora_B lora_A, the
    norm taken per output. `table` takes W's place first, when the adapter carries the whole tensor too; else None.
    """

    kind: LowRankKind
    lora_A: TensorView
    lora_B: TensorView
    rank: int
    alpha: float
    scaling: float
    fan_in_fan_out: bool = False
    magnitude: TensorView | None = None
    table: TensorView | None = None

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield from (view for view in (self.lora_A, self.lora_B, self.magnitude, self.table) if view is not None)


@dataclass(frozen=True, slots=True)
class Shift:
    """b becomes b + scaling · vector (`lora_bias`); `table` takes b's place first, None when it does not."""

    vector: TensorView
    scaling: float
    table: TensorView | None = None

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield from (view for view in (self.vector, self.table) if view is not None)


@dataclass(frozen=True, slots=True)
class Replacement:
    """The tensor takes the parameter's place, or is a new parameter that the base lacks (a trained head)."""

    tensor: TensorView

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield self.tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """The given rows of W are replaced (trainable tokens); `rows` is (len(indices), dim), absolute values.

    `table` takes W's place first, None when it does not.
    """

    indices: tuple[int, ...]
    rows: TensorView
    table: TensorView | None = None

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield from (view for view in (self.rows, self.table) if view is not None)


Update = LowRank | Shift | Replacement | Rows


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as read from files.

    `updates` maps the parameter's full name in the model that was trained (`bert.encoder.layer.0….query.weight`) to
    its update; `config` is the parsed configuration; `alpha` and `scaling` are its general ones, None where it has
    none; `target_modules` as the configuration lists them; `task_type` as PEFT spells it, None when it says nothing;
    `base_name` is what the configuration calls its base; `base_digest` the recorded digest of it, None when there is
    none; `keeps_ties` says that tied names are to stay tied; `warnings` are sentences for the person.
    """

    format: str
    method: str
    config: dict[str, Any]
    updates: dict[str, Update]
    tensors: dict[str, TensorView]
    alpha: float | None
    scaling: float | None
    target_modules: tuple[str, ...]
    task_type: str | None = None
    base_name: str | None = None
    base_digest: str | None = None
    keeps_ties: bool = False
    warnings: tuple[str, ...] = field(default=())

    @property
    def ranks(self) -> dict[str, int]:
        """Module → rank of its low-rank update."""
        return {
            name.removesuffix(".weight"): update.rank
            for name, update in sorted(self.updates.items())
            if isinstance(update, LowRank)
        }

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors of the file, by name."""
        return [self.tensors[name].spec for name in sorted(self.tensors)]

    @property
    def parameters(self) -> int:
        """Number of values in the adapter's tensors."""
        return sum(spec.elements for spec in self.specs)

    @property
    def dtype(self) -> str:
        """The dtype that most of the values have, as safetensors spells it."""
        counts: Counter[str] = Counter()
        for spec in self.specs:
            counts[spec.dtype] += spec.elements
        return counts.most_common(1)[0][0] if counts else "F32"
