"""What a command needs besides its own arguments: where things are and where the output goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from loramgr.cli.sink import Sink

if TYPE_CHECKING:
    from pathlib import Path

    from loramgr.workspace import Workspace

__all__ = ["Session"]


class Session(NamedTuple):
    """The global options; `home` is None for the platform's user data folder."""

    home: str | None
    sink: Sink
    progress: bool

    def workspace(
        self,
        jobs: int | None = None,
        *,
        alpha: float | None = None,
        enable_lora: tuple[bool, ...] | None = None,
        initial: Path | None = None,
    ) -> Workspace:
        """Open the workspace; `jobs` is None for one worker per core, the others are hints for adapters on disk."""
        # Here and not above: --help needs no path, and SQLAlchemy costs more than all of it.
        from pathlib import Path

        from loramgr.workspace import ReadHints, Workspace

        hints = ReadHints(alpha, enable_lora, initial)
        home = None if self.home is None else Path(self.home)
        return Workspace(home, jobs=jobs, progress=self.progress, hints=hints)
