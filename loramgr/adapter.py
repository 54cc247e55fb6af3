"""The one in-memory form of an adapter: per parameter one update out of a closed set.

Every file format reads into it; merge, inspect and export know only it. Building one reads headers, not data: tensors
are `TensorView`s, loaded when an update is applied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from loramgr.tensorfile import FLOAT_DTYPES, TensorSpec, TensorView
from loramgr.updates import (
    Butterfly,
    Decomposed,
    Delta,
    Experts,
    Hadamard,
    Kronecker,
    LowRank,
    LowRankKind,
    Opaque,
    Orthogonal,
    Patch,
    Reflected,
    Replacement,
    Rows,
    Scale,
    Shift,
    Update,
    rank_of,
    whole_tensor,
)

__all__ = [
    "Adapter",
    "Butterfly",
    "Decomposed",
    "Delta",
    "Experts",
    "FileHash",
    "Hadamard",
    "Kronecker",
    "LowRank",
    "LowRankKind",
    "Naming",
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


class Naming(Protocol):
    """How a format's own names and layouts become those of a base."""

    @property
    def described(self) -> str:
        """What the names are until then, in a clause for a person."""

    @property
    def is_needed(self) -> bool:
        """Whether the updates mean nothing without it; else it only settles what a base's shapes show."""

    def resolve(
        self, updates: Mapping[str, Update], specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> dict[str, Update]:
        """Return the updates by their names in the base; IncompatibleError, naming the module, where one has none.

        `specs` are the base's tensors, tied names that its file leaves out among them, `config` its config.json, None
        without one.
        """


@dataclass(frozen=True, slots=True)
class FileHash:
    """What an adapter records of its base's one file, as bare hex: `sha256` of all its bytes.

    `piece` is the first 8 digits of the sha256 of the 64 KiB that begin at 1 MiB, None where only the whole is known.
    """

    sha256: str
    piece: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as read from files.

    `updates` maps the parameter's full name in the model that was trained (`bert.encoder.layer.0….query.weight`) to
    its update; `config` is the parsed configuration; `alpha` and `scaling` are its general ones, None where it has
    none; `target_modules` as the configuration lists them; `task_type` as PEFT spells it, None when it says nothing;
    `base_name` is what the configuration calls its base; `base_digest` the recorded digest of it, None when there is
    none; `keeps_ties` says that tied names are to stay tied; `warnings` are sentences for the person. `naming` turns
    the format's own names and layouts into a base's, None where they are the base's already; `hints` is what a person
    had to say so that it could be read (alpha), as JSON; `dialect` and `evidence` say how the format was recognised;
    `obstacle` is why the adapter cannot be merged, a clause that names the method, None where it can; `base_file` is
    the hash of the base's file, None where the format keeps none; with `is_unscaled` nobody said the scaling, and what
    the updates say of it means nothing (there is an obstacle then).
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
    obstacle: str | None = None
    naming: Naming | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)
    dialect: str | None = None
    evidence: tuple[str, ...] = ()
    base_file: FileHash | None = None
    is_unscaled: bool = False

    def resolved(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> Adapter:
        """Return the adapter with the names and layouts of a base, itself where it has them already.

        `specs` are the base's tensors, tied names that its file leaves out among them, `config` its config.json, None
        without one. Raises IncompatibleError, naming the module, where the base has none of that name.
        """
        if self.naming is None:
            return self
        return replace(
            self, updates=dict(sorted(self.naming.resolve(self.updates, specs, config).items())), naming=None
        )

    @property
    def ranks(self) -> dict[str, int]:
        """Module → rank of its update, where that has one."""
        return {
            name.removesuffix(".weight"): rank
            for name, update in sorted(self.updates.items())
            if (rank := rank_of(update)) is not None
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
        floats = [spec for spec in self.specs if spec.dtype in FLOAT_DTYPES]
        for spec in floats or self.specs:  # places are integers, and no weights
            counts[spec.dtype] += spec.elements
        return counts.most_common(1)[0][0] if counts else "F32"
