"""What the use cases can be told beyond what they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "FROM_BASE",
    "NUMERICS",
    "AddOptions",
    "ComposeOptions",
    "ExtractOptions",
    "MergeOptions",
    "PullOptions",
    "PushOptions",
    "ResizeOptions",
    "Retention",
]

NUMERICS = ("exact", "fast")
FROM_BASE: Literal["base"] = "base"


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How to import a checkpoint.

    `name` None: the folder's, or its parent's for `checkpoint-N`; `base` None: the recorded digest's, else the one the
    configuration names; `include` are globs of further files to keep; `parents` empty: the latest version; `force`
    imports what would be refused for NaN or infinite values or for a base that does not fit; `recipe` is how it was
    made of others, as JSON, None for a checkpoint that was trained. `alpha`, `enable_lora` and `initial` are what the
    files do not say, as in `ReadHints`; `initial` "base": what PiSSA or OLoRA began with is computed of the base.
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
    recipe: Mapping[str, Any] | None = None
    alpha: float | None = None
    enable_lora: tuple[bool, ...] | None = None
    initial: Path | Literal["base"] | None = None


@dataclass(frozen=True, slots=True)
class ComposeOptions:
    """How to make one adapter of several.

    `method` is an entry of the table in docs/composing.md. None stands for: `rank`, the sum of the ranks, or for svd
    the largest; `density`, the share of entries that stay, 0.5; `epsilon`, the width of DELLA's probabilities, 0.1;
    `seed`, 0; `space`, dense; `dtype` of the factors, float32. Only what the method takes may be given. `device` is
    auto, cpu, cuda, cuda:N or mps.
    """

    method: str = "linear"
    rank: int | None = None
    density: float | None = None
    epsilon: float | None = None
    seed: int | None = None
    space: str | None = None
    dtype: str | None = None
    device: str = "auto"


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
class ExtractOptions:
    """How to extract an adapter from a full fine-tune.

    One of three says how good it has to be: `rank`; `energy`, the share of the squared norm of every module's
    difference to keep; `max_error`, the largest relative error of a module. `exact` keeps what restores the fine-tune
    bit for bit; `dtype` is that of the factors; `device` is auto, cpu, cuda, cuda:N or mps.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    exact: bool = False
    dtype: str = "float32"
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class ResizeOptions:
    """How to truncate an adapter; one of three is given.

    `rank` is the largest of a module; `energy` the share of the squared norm of every module's delta to keep; `budget`
    the number of parameters that the whole adapter may have. `dtype` None: every module's factors keep theirs.
    """

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None
    dtype: str | None = None
    device: str = "auto"


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


@dataclass(frozen=True, slots=True)
class PullOptions:
    """What of a remote's adapters to bring, and what to do where both sides went on.

    `source` is a registered remote or a URL, None for the only one registered or the one named origin; `all_versions`
    brings the files of every version, not only of the one that is asked for; `rebase` makes the own log entries anew
    after those of the remote; `dry_run` only tells.
    """

    source: str | None = None
    all_versions: bool = False
    rebase: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class PushOptions:
    """Where to push to, and what to do where both sides went on; `target` as `source` in `PullOptions`.

    `tags` gives the adapter's tags to git too, where the remote is a hub; in the log they travel always. `repair` reads
    everything that the remote has of the adapters, and puts right what is damaged.
    """

    target: str | None = None
    rebase: bool = False
    dry_run: bool = False
    tags: bool = False
    repair: bool = False
