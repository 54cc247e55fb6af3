"""How much of a matrix an approximation of low rank has to keep."""

from __future__ import annotations

from dataclasses import dataclass

from loramgr.errors import UsageError

__all__ = ["Goal"]


@dataclass(frozen=True, slots=True)
class Goal:
    """One of three: a rank, a share of the squared Frobenius norm to keep, or a relative Frobenius error not to pass.

    Exactly one of them is not None.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None

    def check(self) -> None:
        """Raise UsageError unless there is one goal and it can be one: rank ≥ 1, 0 < energy ≤ 1, 0 < error < 1."""
        given = [name for name in ("rank", "energy", "max_error") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError("a rank, an energy or a largest error has to be given, and only one of them", "--rank 16")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank {self.rank} keeps nothing: it has to be 1 or more", "--rank 16")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"the energy {self.energy} has to be above 0 and at most 1", "--energy 0.9")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise UsageError(f"the error {self.max_error} has to lie between 0 and 1", "--max-error 0.1")

    @property
    def lost(self) -> float | None:
        """The share of the squared norm that may be lost, None where a rank is given."""
        if self.energy is not None:
            return 1.0 - self.energy
        return None if self.max_error is None else self.max_error**2
