"""The records of what is measured of adapters' modules; `loramgr.records` has them with all others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["DiffReport", "DiffSummary", "FileReport", "ModuleDifference", "ModuleError", "ModuleRecord"]


@dataclass(frozen=True)
class ModuleRecord:
    """One module an adapter updates.

    `kind` is linear, conv1d, embedding, conv2d, bias, saved or tokens; rank, alpha and scaling are None where the
    update has none. `delta_norm` is the Frobenius norm of scaling·B·A, `effective_rank` the exponential of the
    entropy of its normalised singular values (Roy & Vetterli 2007), `spectrum` those values, when asked for.
    With the spectrum also: `rank_used`, how many of them stand out of rounding; `dead_ranks`, the directions of which
    one factor is zero, counted from 0; `share_of_weight`, the norm over that of the base's weight, None without the
    base; `norm_to_median`, the norm over the median of all modules of the same last name, None below three of them; and
    `outlier`, whether that is above 3 or below 1/3.
    """

    name: str
    kind: str
    rank: int | None
    alpha: float | None
    scaling: float | None
    in_features: int | None
    out_features: int | None
    dtype: str
    delta_norm: float | None
    effective_rank: float | None
    spectrum: list[float] | None = None
    rank_used: int | None = None
    dead_ranks: list[int] | None = None
    share_of_weight: float | None = None
    norm_to_median: float | None = None
    outlier: bool | None = None


@dataclass(frozen=True)
class ModuleError:
    """How good one module's factors are: `norm` is the Frobenius norm of what they stand for, 0 for nothing.

    `relative_error` is the norm of the difference over `norm`, 0 where that is 0.
    """

    name: str
    rank: int
    norm: float
    relative_error: float


@dataclass(frozen=True)
class ModuleDifference:
    """What two adapters do to one module, or two models have in one tensor.

    `status` is same, changed, added (only b has it) or removed (only a does). `kind` is as in ModuleRecord, and tensor
    between models. `norm_a` and `norm_b` are the Frobenius norms of the deltas (between models of the tensors),
    `distance` that of their difference, `relative_distance` it over `norm_a` (0 for no distance, None from zero),
    `cosine` that of the angle between them, None where a norm is zero. The ranks are those of the deltas in float64,
    the effective ranks as in ModuleRecord, `subspace_similarity` is φ of the spaces that the deltas read from (0
    orthogonal, 1 one holds the other), `output_similarity` of those that they write to. Figures that cannot be known,
    or have no meaning for the kind, are None. When asked for: singular values of both deltas and of the difference,
    principal angles in radians, and `similarities`, φ of the first i and j singular directions that are read from.
    """

    name: str
    status: str
    kind: str
    norm_a: float | None = None
    norm_b: float | None = None
    distance: float | None = None
    relative_distance: float | None = None
    cosine: float | None = None
    rank_a: int | None = None
    rank_b: int | None = None
    effective_rank_a: float | None = None
    effective_rank_b: float | None = None
    subspace_similarity: float | None = None
    output_similarity: float | None = None
    spectrum_a: list[float] | None = None
    spectrum_b: list[float] | None = None
    spectrum_difference: list[float] | None = None
    input_angles: list[float] | None = None
    output_angles: list[float] | None = None
    similarities: list[list[float]] | None = None


@dataclass(frozen=True)
class DiffSummary:
    """How many modules are same, changed, added and removed, and the distances over all of them as one vector.

    `unknown` of them lack a norm or the distance and are left out of the sums, which are None where nothing is left.
    """

    same: int
    changed: int
    added: int
    removed: int
    unknown: int
    distance: float | None
    relative_distance: float | None
    cosine: float | None


@dataclass(frozen=True)
class DiffReport:
    """Two adapters, or two models, beside each other.

    `a` and `b` are references as `name@vN`, names of bases, or paths; `kind` is adapters or models; the digests are
    those of versions or bases, None for what lies on disk and was not hashed. `config` maps what differs in the
    configurations to both values.
    """

    a: str
    b: str
    kind: str
    digest_a: str | None
    digest_b: str | None
    config: dict[str, list[Any]]
    modules: list[ModuleDifference]
    summary: DiffSummary
    plot: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FileReport:
    """What a path is that is no adapter: a short `kind` (base-model, git-lfs-pointer, …) and `what` in words.

    `evidence` is what was seen, `unexplained` the tensors that no format claims, `hint` the next command, None where
    there is nothing to do; `format` is None, and `mergeable` False, for no adapter was recognised.
    """

    path: str
    kind: str
    what: str
    evidence: list[str]
    unexplained: list[str]
    hint: str | None = None
    format: str | None = None
    method: str | None = None
    mergeable: bool = False
