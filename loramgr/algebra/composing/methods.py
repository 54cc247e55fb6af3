"""The table of methods: what each is called, whose it is, what it computes, and the function that does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from loramgr.algebra.composing import consensus, sparsity, subspaces
from loramgr.algebra.composing.consensus import Consensus
from loramgr.algebra.composing.sparsity import Sparsifier
from loramgr.algebra.lowrank import Product

__all__ = ["METHODS", "Elementwise", "LowRankMethod", "Method", "Paper"]

LowRankMethod = Callable[[Sequence[Product], Sequence[float], float], Product]


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method comes from; `arxiv` is its number, None for what is older or was not put there."""

    authors: str
    year: int
    arxiv: str | None


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A method that thins every delta out and then combines the deltas entry by entry."""

    sparsify: Sparsifier
    combine: Consensus


@dataclass(frozen=True, slots=True)
class Method:
    """An entry of the table: `definition` in the terms of `docs/composing.md`, xᵢ being the entries of the deltas.

    `takes` are the options that mean something to it: density, seed, epsilon, space. `truncates` says that without a
    rank of its own the result is cut to the largest rank of the inputs; `sums` that it is the weighted sum, so that
    whole tensors can be combined in the same way.
    """

    name: str
    paper: Paper
    definition: str
    compute: LowRankMethod | Elementwise
    takes: frozenset[str] = frozenset()
    truncates: bool = False
    sums: bool = False


_THINNED = frozenset({"density", "space"})
_RANDOM = _THINNED | {"seed"}
_LORA = Paper("Hu et al.", 2021, "2106.09685")
_TIES = Paper("Yadav et al.", 2023, "2306.01708")
_DARE = Paper("Yu et al.", 2023, "2311.03099")
_TRIM_AND_ELECT = Elementwise(sparsity.by_magnitude, consensus.agreeing_mean)
_TIES_PEFT = "largest |xᵢ|; Σ wᵢ·xᵢ / n over the n entries with the sign of Σ xᵢ"

_ENTRIES = (
    Method("linear", _LORA, "Σ wᵢ·Δᵢ", subspaces.linear, sums=True),
    Method(
        "task_arithmetic",
        Paper("Ilharco et al.", 2022, "2212.04089"),
        "Σ wᵢ·Δᵢ; a negative weight takes a task away",
        subspaces.linear,
        sums=True,
    ),
    Method(
        "svd",
        Paper("Eckart & Young", 1936, None),
        "the best approximation of Σ wᵢ·Δᵢ of the rank, by default the largest of the inputs'",
        subspaces.linear,
        truncates=True,
        sums=True,
    ),
    Method("ties", _TIES, f"{_TIES_PEFT} (as ties_peft)", _TRIM_AND_ELECT, _THINNED),
    Method("ties_peft", _TIES, f"{_TIES_PEFT}, as in PEFT's ties_svd", _TRIM_AND_ELECT, _THINNED),
    Method(
        "ties_mergekit",
        _TIES,
        "largest |xᵢ|; Σ wᵢ·xᵢ / Σ wᵢ over the entries with the sign of Σ wᵢ·xᵢ, as in mergekit",
        Elementwise(sparsity.by_magnitude, consensus.agreeing_weighted_mean),
        _THINNED,
    ),
    Method(
        "dare_linear",
        _DARE,
        "random xᵢ / density; Σ wᵢ·xᵢ",
        Elementwise(sparsity.randomly, consensus.weighted_sum),
        _RANDOM,
    ),
    Method(
        "dare_linear_mergekit",
        _DARE,
        "random xᵢ scaled to the Σ |xᵢ| of before; Σ wᵢ·xᵢ, as in mergekit",
        Elementwise(sparsity.randomly_keeping_l1, consensus.weighted_sum),
        _RANDOM,
    ),
    Method(
        "dare_ties",
        _DARE,
        "random xᵢ / density; Σ wᵢ·xᵢ / n over the n entries with the sign of Σ xᵢ",
        Elementwise(sparsity.randomly, consensus.agreeing_mean),
        _RANDOM,
    ),
    Method(
        "dare_ties_mergekit",
        _DARE,
        "random xᵢ scaled to the Σ |xᵢ| of before; Σ wᵢ·xᵢ over the terms with the sign of Σ wᵢ·xᵢ, as in mergekit",
        Elementwise(sparsity.randomly_keeping_l1, consensus.agreeing_sum),
        _RANDOM,
    ),
    Method(
        "della",
        Paper("Deep et al.", 2024, "2406.11617"),
        "random xᵢ, likelier the larger in their row, over their probability; "
        "Σ wᵢ·xᵢ / n over the n entries with the sign of Σ xᵢ",
        Elementwise(sparsity.magprune, consensus.agreeing_mean),
        _RANDOM | {"epsilon"},
    ),
    Method(
        "magnitude_prune",
        Paper("Han et al.", 2015, "1506.02626"),
        "largest |xᵢ|; Σ wᵢ·xᵢ",
        Elementwise(sparsity.by_magnitude, consensus.weighted_sum),
        _THINNED,
    ),
    Method("slerp", Paper("Shoemake", 1985, None), "the arc from Δ₁ to Δ₂, per module", subspaces.slerp),
    Method(
        "knots",
        Paper("Stoica et al.", 2024, "2410.19735"),
        "[Δ₁ … Δₙ] = U Σ [V₁ … Vₙ]; U Σ V with V by ties from the Vᵢ",
        subspaces.knots,
        frozenset({"density"}),
    ),
    Method(
        "tsv",
        Paper("Gargiulo et al.", 2024, "2412.00081"),
        "all tasks' singular vectors, orthogonalised, with their weighted singular values",
        subspaces.tsv,
    ),
    Method(
        "iso",
        Paper("Marczak et al.", 2025, "2502.04959"),
        "Σ wᵢ·Δᵢ with every singular value replaced by their mean",
        subspaces.iso,
    ),
)
METHODS: Mapping[str, Method] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
