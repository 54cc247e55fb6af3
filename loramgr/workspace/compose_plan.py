"""How adapters are to be combined: a method of the table and its parameters, checked, recorded and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from loramgr.errors import UsageError
from loramgr.workspace.combining import Part
from loramgr.workspace.options import ComposeOptions
from loramgr.workspace.planning import parse_dtype

if TYPE_CHECKING:
    from loramgr.algebra.composing.composed import Parameters

__all__ = ["ComposePlan"]

_DENSITY, _EPSILON, _SEED = 0.5, 0.1, 0
_SPACES = ("dense", "core")


@dataclass(frozen=True, slots=True)
class ComposePlan:
    """How adapters are combined: the method and its parameters, and the dtype of the factors.

    `dtype` None stores float32, and leaves an adapter that is given back as it is in its own.
    """

    parameters: Parameters
    dtype: str | None

    @classmethod
    def chosen(cls, options: ComposeOptions) -> ComposePlan:
        """Fill in what was not given; UsageError for what is out of range, or means nothing to the method."""
        from loramgr.algebra.composing.composed import Parameters, method_named

        method = method_named(options.method)
        for name in ("density", "epsilon", "seed", "space"):
            if getattr(options, name) is not None and name not in method.takes:
                raise UsageError(f"{method.name} takes no --{name}", f"leave out --{name}")
        _check_ranges(options)
        default = _DENSITY if "density" in method.takes else 1.0
        parameters = Parameters(
            method.name,
            options.rank,
            default if options.density is None else float(options.density),
            _EPSILON if options.epsilon is None else float(options.epsilon),
            _SEED if options.seed is None else options.seed,
            options.space or _SPACES[0],
        )
        return cls(parameters, parse_dtype(options.dtype))

    def recorded(self) -> dict[str, Any]:
        """Return the parameters as a recipe has them: those that mean something to the method."""
        from loramgr.algebra.composing.composed import method_named

        takes = method_named(self.parameters.method).takes | {"method", "rank"}
        return {**{key: value for key, value in asdict(self.parameters).items() if key in takes}, "dtype": self.dtype}

    @classmethod
    def replayed(cls, recipe: Mapping[str, Any]) -> ComposePlan:
        """Return the plan that a recipe describes."""
        from loramgr.algebra.composing.composed import Parameters

        known = {field.name for field in fields(Parameters)}
        return cls(Parameters(**{key: value for key, value in recipe.items() if key in known}), recipe["dtype"])

    def gives_back(self, parts: Sequence[Part]) -> bool:
        """Say whether the result is the one adapter itself: alone, with weight 1, nothing left out or converted."""
        if len(parts) != 1 or parts[0].weight != 1 or self.dtype is not None or self.parameters.density != 1:
            return False
        return self.parameters.rank is None or self.parameters.rank >= max(parts[0].adapter.ranks.values(), default=0)


def _check_ranges(options: ComposeOptions) -> None:
    if options.rank is not None and options.rank < 1:
        raise UsageError(f"a result of rank {options.rank} is none", "--rank 1, or more")
    if options.density is not None and not 0 < options.density <= 1:
        raise UsageError(f"the density {options.density} is not above 0 and at most 1", "--density 0.5")
    if options.epsilon is not None and not 0 <= options.epsilon < 1:
        raise UsageError(f"the width {options.epsilon} of the probabilities is not from 0 to 1", "--epsilon 0.1")
    if options.seed is not None and not 0 <= options.seed < 1 << 53:
        raise UsageError(f"the seed {options.seed} is not from 0 to 2^53", "--seed 0")
    if options.space not in (None, *_SPACES):
        raise UsageError(f"there is no space {options.space!r}", "--space dense, or core")
