"""What a person says of an adapter that its files do not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from loramgr.errors import UsageError

__all__ = ["ReadHints"]


@dataclass(frozen=True, slots=True)
class ReadHints:
    """What the files of some formats do not say; None where nobody said it.

    `alpha` is the numerator of the scaling, for formats that do not store it; `enable_lora` says which slices of a
    fused weight have factors (loralib's MergedLinear); `initial` is the adapter as it was before the training, for one
    of PEFT whose initialisation changed the base. With `is_looked_at` the adapter is only to be described: it is read
    without a scaling that nobody says, and without the initial adapter. Raises UsageError for an alpha that is no
    finite number.
    """

    alpha: float | None = None
    enable_lora: tuple[bool, ...] | None = None
    initial: Path | None = None
    is_looked_at: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise UsageError(f"alpha is {self.alpha!r}, it must be a finite number", "--alpha 16")
