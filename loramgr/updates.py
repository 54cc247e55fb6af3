"""The closed set of updates that an adapter makes of a model's parameters, as views of tensors and numbers.

Each class says its formula; who applies it goes by the class. Nothing here reads data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from loramgr.tensorfile import TensorView

__all__ = [
    "Butterfly",
    "Decomposed",
    "Delta",
    "Experts",
    "Hadamard",
    "Kronecker",
    "LowRank",
    "LowRankKind",
    "Opaque",
    "Orthogonal",
    "Patch",
    "Reflected",
    "Replacement",
    "Rows",
    "Scale",
    "Shift",
    "Update",
    "rank_of",
    "whole_tensor",
]

LowRankKind = Literal["linear", "embedding", "conv"]


def _given(*views: TensorView | None) -> Iterator[TensorView]:
    yield from (view for view in views if view is not None)


@dataclass(frozen=True, slots=True)
class LowRank:
    """W becomes W + scaling · lora_B lora_A (Hu et al. 2021, arXiv 2106.09685), or its decomposition by DoRA.

    `lora_A` is (r, in), `lora_B` (out, r); for a convolution they carry the kernel, (r, in, k…) and (out, r, 1…), for
    an embedding W is (vocabulary, dim), `lora_A` (r, vocabulary) and `lora_B` (dim, r), and the product is transposed.
    `fan_in_fan_out` is what the configuration says of the layer (W stored as (in, out)); shapes have the last word.
    With `magnitude` (DoRA, arXiv 2402.09353) W becomes magnitude · V / ‖V‖ with V = W + scaling · lora_B lora_A, the
    norm taken per output. `table` takes W's place first, when the adapter carries the whole tensor too; else None.
    `shared` factors are of all layers: of lora_A the first inputs count, as many as the layer has (VeRA).
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
    shared: bool = False

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        return _given(self.lora_A, self.lora_B, self.magnitude, self.table)


@dataclass(frozen=True, slots=True)
class Shift:
    """b becomes b + scaling · vector (`lora_bias`); `table` takes b's place first, None when it does not."""

    vector: TensorView
    scaling: float
    table: TensorView | None = None

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        return _given(self.vector, self.table)


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
        return _given(self.rows, self.table)


@dataclass(frozen=True, slots=True)
class Hadamard:
    """W becomes W + scaling · (w1_a w1_b) ⊙ (w2_a w2_b), reshaped to W (LoHa; FedPara, arXiv 2108.06098).

    `w1_a`, `w2_a` are (out, r) and `w1_b`, `w2_b` (r, in·k…). With the cores `t1`, `t2` (r, r, k…), both or neither,
    `w1_a` and `w2_a` are (r, out), `w1_b` and `w2_b` (r, in), and either factor is Σ t[i, j, k…] a[i, out] b[j, in].
    """

    w1_a: TensorView
    w1_b: TensorView
    w2_a: TensorView
    w2_b: TensorView
    rank: int
    alpha: float
    scaling: float
    t1: TensorView | None = None
    t2: TensorView | None = None

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        return _given(self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.t1, self.t2)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """W becomes W + scaling · (w1 ⊗ w2), reshaped to W (LoKr; KronA, arXiv 2212.10650).

    `w1` is (a, c), or a pair (a, r), (r, c) that multiplies to it; `w2` is (b, d, k…), or a pair (b, r), (r, d·k…), or
    with the core `t2` (r, r, k…) a pair (r, b), (r, d) as in `Hadamard`; W is (a·b, c·d, k…). `rank` is None where both
    are whole.
    """

    w1: tuple[TensorView, ...]
    w2: tuple[TensorView, ...]
    rank: int | None
    alpha: float | None
    scaling: float
    t2: TensorView | None = None

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        return _given(*self.w1, *self.w2, self.t2)


@dataclass(frozen=True, slots=True)
class Scale:
    """Every output or every input of W is multiplied by its factor (IA3, arXiv 2205.05638); also of a bias.

    `vector` has one value an output or an input, in any shape; `side` says which; a factor is offset + value.
    `fan_in_fan_out` as in `LowRank`.
    An `optional` one is left out where the base has no such tensor (the bias of a layer that may have none).
    """

    vector: TensorView
    side: Literal["output", "input"]
    fan_in_fan_out: bool = False
    optional: bool = False
    offset: float = 0.0

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield self.vector


@dataclass(frozen=True, slots=True)
class Orthogonal:
    """W becomes W Rᵀ with R block-diagonal, each block orthogonal (OFT, arXiv 2306.07280; PEFT from 0.16).

    `vectors` is (blocks, b(b-1)/2): the strict upper triangles, row by row, of skew-symmetric matrices Q. R is (I -
    Q)(I + Q)⁻¹, or with `terms` the first of its Neumann series I + 2Q + 2Q² + …. The inputs of W are its second
    dimension with the kernel behind it; a `repeated` block is every one along them. `fan_in_fan_out` as in `LowRank`.
    `is_embedding` says that the file keeps it as that of an embedding, of which W is (vocabulary, dim).
    """

    vectors: TensorView
    block_size: int
    terms: int | None = None
    fan_in_fan_out: bool = False
    repeated: bool = False
    is_embedding: bool = False

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield self.vectors


@dataclass(frozen=True, slots=True)
class Butterfly:
    """W becomes scale ⊙ (W Mᵀ) with M a product of orthogonal butterfly factors (BOFT, arXiv 2311.06243).

    `blocks` is (factors, blocks, b, b) and `scale` has one value an output; every block R gives
    (I - Q)(I + Q)⁻¹ with Q = (R - Rᵀ)/2. Inputs and `fan_in_fan_out` as in `Orthogonal`.
    """

    blocks: TensorView
    scale: TensorView
    fan_in_fan_out: bool = False

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield from (self.blocks, self.scale)


@dataclass(frozen=True, slots=True)
class Reflected:
    """W becomes W (I - 2 u₁u₁ᵀ) (I - 2 u₂u₂ᵀ) … with unit vectors u (Householder reflections; HRA, arXiv 2405.17484).

    `vectors` is (inputs, r), a column each, of any length; inputs as in `Orthogonal`. With `orthonormal` they are made
    orthogonal to those before them first (Gram and Schmidt).
    """

    vectors: TensorView
    orthonormal: bool = False

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield self.vectors


@dataclass(frozen=True, slots=True)
class Delta:
    """W becomes W + scaling · tensor, reshaped to W; with `indices` tensor and indices are (n,), places in flat W."""

    tensor: TensorView
    scaling: float = 1.0
    indices: TensorView | None = None

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        return _given(self.tensor, self.indices)


@dataclass(frozen=True, slots=True)
class Patch:
    """The values (n,) take the places `indices` (n,) in W, flat and row-major: a fine-tune kept as what differs."""

    indices: TensorView
    values: TensorView

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield from (self.values, self.indices)


@dataclass(frozen=True, slots=True)
class Experts:
    """Every expert's matrix W[e] becomes W[e] + scaling · lora_B[e] lora_A[e]; or its transpose, by the shapes.

    `lora_A` is (experts, r, in) and `lora_B` (experts, out, r); W is (experts, out, in), or (experts, in, out) with
    `transposed`; None where only the shapes of W, or those of its siblings, tell.
    """

    lora_A: TensorView
    lora_B: TensorView
    rank: int
    alpha: float
    scaling: float
    transposed: bool | None = None

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield from (self.lora_A, self.lora_B)


@dataclass(frozen=True, slots=True)
class Decomposed:
    """W becomes magnitude · V / (‖V‖ + epsilon), V what the inner update makes of W (DoRA, arXiv 2402.09353).

    The norm is taken per output over everything else, or per input (dimension 1) with `by_input`; `magnitude` has one
    value for each. `LowRank` has a magnitude of its own, for layers and embeddings; this is for every other update.
    """

    inner: LowRank | Hadamard | Kronecker | Delta
    magnitude: TensorView
    by_input: bool = False
    epsilon: float = 0.0

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield from (*self.inner.views(), self.magnitude)


@dataclass(frozen=True, slots=True)
class Opaque:
    """A tensor that is kept as it came and never applied; `reason` says why, in a clause for a person.

    `rank` is what the configuration says of the method, None where it says nothing.
    """

    tensor: TensorView
    method: str
    reason: str
    rank: int | None = None

    def views(self) -> Iterator[TensorView]:
        """Yield the tensors that the update is made of."""
        yield self.tensor


Update = (
    LowRank
    | Shift
    | Replacement
    | Rows
    | Hadamard
    | Kronecker
    | Scale
    | Orthogonal
    | Butterfly
    | Reflected
    | Delta
    | Patch
    | Experts
    | Decomposed
    | Opaque
)


def whole_tensor(update: Update) -> TensorView | None:
    """Return the tensor that takes the parameter's place under the update, None when none does."""
    match update:
        case Replacement():
            return update.tensor
        case LowRank() | Shift() | Rows():
            return update.table
    return None


def rank_of(update: Update) -> int | None:
    """Return the rank of an update that has one, else None."""
    match update:
        case LowRank() | Hadamard() | Kronecker() | Experts() | Opaque():
            return update.rank
        case Decomposed():
            return rank_of(update.inner)
    return None
