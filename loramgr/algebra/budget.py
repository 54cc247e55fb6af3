"""How many singular values of each of several matrices to keep, when all factors together may have so many entries."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence

__all__ = ["Spectra", "kept_energy", "ranks_within"]

# a matrix's singular values, largest first, and the entries that one rank of it costs: rows + columns
Spectra = Mapping[str, tuple[Sequence[float], int]]


def ranks_within(spectra: Spectra, budget: int, needed: Collection[str] = ()) -> dict[str, int]:
    """Return the rank of every matrix, 0 for none, with which the factors have at most `budget` entries.

    The `needed` ones have rank 1 at least, for which the budget has to suffice.

    Each value σ brings σ² of the squared norm. The one that brings the most for each entry it costs is taken first, as
    long as it fits: the best choice there is where all costs are equal, and else short of it by less than one value.
    So that a large matrix at the end of the queue is not left out for the sake of small ones, the same is also begun
    from the largest rank that all matrices can have alike; the better of the two counts.
    """
    spectra = _scaled(spectra)
    least = {name: int(name in needed) for name in spectra}
    greedy = _filled(spectra, dict(least), budget)
    uniform = _filled(spectra, _uniform(spectra, least, budget), budget)
    return max((greedy, uniform), key=lambda ranks: kept_energy(spectra, ranks))


def kept_energy(spectra: Spectra, ranks: Mapping[str, int]) -> float:
    """Return the sum of the squares of the values that are kept."""
    return sum(value**2 for name, (values, _) in spectra.items() for value in values[: ranks[name]])


def _scaled(spectra: Spectra) -> Spectra:
    """Return the values times one power of two, with which the largest square lies between 1/4 and 1."""
    _, exponent = math.frexp(max((value for values, _ in spectra.values() for value in values), default=0.0))
    return {
        name: ([math.ldexp(value, -exponent) for value in values], cost) for name, (values, cost) in spectra.items()
    }


def _uniform(spectra: Spectra, least: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return the largest rank that all can have alike within the budget, less where a matrix has fewer values."""
    ranks = dict(least)
    for rank in range(1, 1 + max((len(values) for values, _ in spectra.values()), default=0)):
        more = {name: max(least[name], min(rank, len(values))) for name, (values, _) in spectra.items()}
        if _cost(spectra, more) > budget:
            break
        ranks = more
    return ranks


def _cost(spectra: Spectra, ranks: Mapping[str, int]) -> int:
    return sum(ranks[name] * cost for name, (_, cost) in spectra.items())


def _filled(spectra: Spectra, ranks: dict[str, int], budget: int) -> dict[str, int]:
    """Return the ranks with further values, the ones that bring most per entry first, until none fits any more."""
    left = budget - _cost(spectra, ranks)
    heap: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        values, cost = spectra[name]
        if ranks[name] < len(values) and values[ranks[name]] > 0:
            heapq.heappush(heap, (-(values[ranks[name]] ** 2) / cost, name))

    for name in spectra:
        offer(name)
    while heap:
        _, name = heapq.heappop(heap)
        cost = spectra[name][1]
        if cost <= left:
            left -= cost
            ranks[name] += 1
            offer(name)
    return ranks
