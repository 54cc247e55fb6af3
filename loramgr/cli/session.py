"""What a command needs besides its own arguments: where things are and where the output goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from loramgr.cli.sink import Sink

if TYPE_CHECKING:
    from loramgr.workspace import Workspace

__all__ = ["Session"]


class Session(NamedTuple):
    """The global options; `home` is None for the platform's user data folder."""

    home: str | None
    sink: Sink
    progress: bool

    def workspace(self, jobs: int | None = None) -> Workspace:
        """Open the workspace; `jobs` is None for one worker per core."""
        # Here and not above: --help needs no path, and SQLAlchemy costs more than all of it.
        from pathlib import Path

        from loramgr.workspace import Workspace

        return Workspace(None if self.home is None else Path(self.home), jobs=jobs, progress=self.progress)
