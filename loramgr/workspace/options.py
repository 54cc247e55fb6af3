"""What the use cases can be told beyond what they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["NUMERICS", "AddOptions", "MergeOptions", "Retention"]

NUMERICS = ("exact", "fast")


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How to import a checkpoint.

    `name` None: the folder's, or its parent's for `checkpoint-N`; `base` None: the recorded digest's, else the one the
    configuration names; `include` are globs of further files to keep; `parents` empty: the latest version; `force`
    imports what would be refused for NaN or infinite values or for a base that does not fit.
    """

    name: str | None = None
    base: str | None = None
    include: Sequence[str] = ()
    message: str = ""
    tags: Sequence[str] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    parents: Sequence[str] = ()
    force: bool = False


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How to merge.

    `dtype` None: every tensor keeps its own, else all floating-point tensors are stored in it (`bfloat16` or `BF16`);
    `device` is auto, cpu, cuda, cuda:N or mps; `numerics` is exact or fast; `verify` reads the output again before it
    appears; `reversible` keeps, beside the weights, what gives the base back without the base's files;
    `force` accepts another base than the recorded one and results that are not finite; `replacements_of` is the
    adapter, as given to the merge, whose replaced tensors count where several replace one tensor; `keep_tied` changes
    tied names together, as PEFT's merge does.
    """

    dtype: str | None = None
    device: str = "auto"
    numerics: str = "exact"
    verify: bool = False
    force: bool = False
    replacements_of: str | None = None
    keep_tied: bool = False
    reversible: bool = False


@dataclass(frozen=True, slots=True)
class Retention:
    """Which versions of an adapter to keep.

    `last` is how many of the newest, at least 1; `best` are metrics of which the version with the highest value stays,
    or after a `-` the lowest, and all of those that share it. Tagged versions and parents of other adapters' versions
    stay too; with `force` only where `tagged` asks for the tagged ones.
    """

    last: int
    tagged: bool = False
    best: Sequence[str] = ()
    force: bool = False
