"""Pictures of what `inspect` and `diff` measure, layer by layer. The only place that knows matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramgr.errors import LoramgrError, NotFoundError, UsageError
from loramgr.records import DiffReport, InspectReport, ModuleRecord
from loramgr.temporary import temporary_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Picture"]

_FORMATS = (".png", ".svg", ".pdf")
_CELL = 0.42  # inches
_FEW = 80  # cells: so many figures can be read, and are written into them
_NO_LAYER = "–"
_MANY_LINES = 12
_SIGNS = {"added": "+", "removed": "−"}


@dataclass(slots=True)
class _Grid:
    """Values by the kind of module (rows, top down) and its layer (columns); a cell without a value is None."""

    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    values: dict[tuple[str, str], float | None] = field(default_factory=dict)
    marks: dict[tuple[str, str], str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, float | None], marks: Mapping[str, str]) -> _Grid:
        """Lay modules out by their names; `marks` are texts for cells, by module."""
        grid = cls()
        layers: dict[str, int] = {}
        for name in values:
            row, layer = _place(name)
            cell = row, layer
            grid.values[cell] = values[name]
            if name in marks:
                grid.marks[cell] = marks[name]
            layers[layer] = int(layer) if layer != _NO_LAYER else -1
            if row not in grid.rows:
                grid.rows.append(row)
        grid.columns = sorted(layers, key=layers.__getitem__)
        return grid


class Picture:
    """A picture file to be written; its ending says the format.

    Raises UsageError for another ending than .png, .svg or .pdf, NotFoundError for a folder that is not there, and
    LoramgrError without matplotlib: all before anything is computed.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in _FORMATS:
            raise UsageError(f"{self.path}: pictures are {', '.join(_FORMATS)}", f"--plot {self.path.stem}.png")
        if not self.path.absolute().parent.is_dir():
            raise NotFoundError(f"{self.path.parent}: no such folder")
        if find_spec("matplotlib") is None:
            raise LoramgrError("pictures need matplotlib, which is not installed", 'pip install "loramgr[plot]"')

    def draw_inspection(self, report: InspectReport) -> None:
        """Draw the norm of every module's delta by layer, and where it has the spectra, these below."""
        norms = {module.name: module.delta_norm for module in report.modules if module.rank is not None}
        marks = {module.name: "!" for module in report.modules if module.outlier}
        grid = _Grid.of(norms, marks)
        spectra = [module for module in report.modules if module.spectrum]
        figure, axes = _page(grid, 3.6 if spectra else 0.0)
        unmarked = f"{report.name}@v{report.version}" if report.version else report.name
        _heat(axes[0], grid, f"{unmarked}: norm of each delta, ‖scaling · BA‖", "Frobenius norm")
        if spectra:
            _curves(axes[1], spectra)
        self._write(figure)

    def draw_diff(self, report: DiffReport) -> None:
        """Draw how far every module is from the other's by layer, relative to the norm of the first."""
        known = {each.name: each.relative_distance for each in report.modules}
        marks = {each.name: _SIGNS[each.status] for each in report.modules if each.status in _SIGNS}
        grid = _Grid.of(known, marks)
        figure, axes = _page(grid, 0.0)
        what = "‖ΔA − ΔB‖ / ‖ΔA‖" if report.kind == "adapters" else "‖A − B‖ / ‖A‖"
        _heat(axes[0], grid, f"A = {report.a}\nB = {report.b}", what)
        if marks or None in known.values():
            axes[0].set_xlabel("layer    (+ only in B, − only in A, gray: not relative to anything known)", fontsize=9)
        self._write(figure)

    def _write(self, figure: Figure) -> None:
        """Write the picture; it appears whole, in the place of one that is there."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg(figure)
        data = io.BytesIO()
        kind = self.path.suffix.lower()[1:]
        figure.savefig(data, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        try:
            with temporary_folder(self.path.absolute().parent, ".loramgr-plot-") as folder:
                written = folder / self.path.name
                written.write_bytes(data.getvalue())
                written.replace(self.path)
        except OSError as error:
            raise LoramgrError(f"{self.path}: cannot be written: {error.strerror}") from error


def _place(name: str) -> tuple[str, str]:
    """Return the row and the column of a module: what stands around its layer's number, and the number."""
    parts = name.split(".")
    at = next((position for position, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return name, _NO_LAYER
    stack = ".".join(parts[:at])
    # one stack of layers needs no name; an encoder and a decoder do
    return f"{stack}.*.{'.'.join(parts[at + 1 :])}", parts[at]


def _short_rows(rows: Sequence[str]) -> list[str]:
    """Return the rows' labels without the stack's name where all share it."""
    stacks = {row.partition(".*.")[0] for row in rows if ".*." in row}
    return [row.partition(".*.")[2] if len(stacks) == 1 and ".*." in row else row for row in rows]


def _page(grid: _Grid, below: float) -> tuple[Figure, list[Axes]]:
    """Return a figure as large as the grid needs, and axes for the grid and, `below` inches high, for more."""
    from matplotlib.figure import Figure

    labels = max((len(label) for label in _short_rows(grid.rows)), default=0)
    width = min(40.0, max(6.4, 0.085 * labels + _CELL * len(grid.columns) + 1.8))
    height = min(40.0, max(1.0, _CELL * 0.9 * len(grid.rows)) + 1.3)
    figure = Figure(figsize=(width, height + below), layout="constrained")
    if not below:
        return figure, [figure.add_subplot()]
    upper, lower = figure.subplots(2, 1, height_ratios=[height, below])
    return figure, [upper, lower]


def _heat(axes: Axes, grid: _Grid, title: str, unit: str) -> None:
    from matplotlib import colormaps

    rows = {row: position for position, row in enumerate(grid.rows)}
    columns = {column: position for position, column in enumerate(grid.columns)}
    cells = [[math.nan] * len(columns) for _ in rows]
    for (row, column), value in grid.values.items():
        cells[rows[row]][columns[column]] = math.nan if value is None else value
    known = [value for value in grid.values.values() if value is not None]
    colors = colormaps["viridis"].with_extremes(bad="#e4e4e4")
    top = max(known, default=0.0) or 1.0
    image = axes.imshow(cells, cmap=colors, vmin=0.0, vmax=top, aspect="auto")
    axes.set_title(title, parse_math=False, fontsize=10, loc="left")
    axes.set_yticks(range(len(rows)), _short_rows(grid.rows), parse_math=False, fontsize=8)
    step = max(1, math.ceil(len(columns) / 48))
    axes.set_xticks(range(0, len(columns), step), list(columns)[::step], fontsize=8)
    axes.set_xlabel("layer", fontsize=9)
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label=unit, pad=0.01)
    few = len(grid.values) <= _FEW
    for cell, value in grid.values.items():
        if text := _cell_text(value, grid.marks.get(cell, ""), few=few):
            ink = "black" if value is None or value > 0.6 * top else "white"
            axes.text(columns[cell[1]], rows[cell[0]], text, ha="center", va="center", color=ink, fontsize=6)


def _cell_text(value: float | None, mark: str, *, few: bool) -> str:
    """Return what stands in a cell: its figure where there are few, and its mark; a sign says enough by itself."""
    number = f"{value:.2g}" if few and value is not None and mark not in _SIGNS.values() else ""
    return f"{number}{mark}"


def _curves(axes: Axes, modules: Sequence[ModuleRecord]) -> None:
    """Draw the singular values of every module, in the color of its kind."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    kinds = list(dict.fromkeys(_place(module.name)[0] for module in modules))
    labels = dict(zip(kinds, _short_rows(kinds), strict=True))
    colors = colormaps["tab10" if len(kinds) <= 10 else "viridis"]
    told: set[str] = set()
    marker = "." if len(modules) <= _FEW else ""
    for module in modules:
        kind = _place(module.name)[0]
        values = [value if value > 0 else math.nan for value in module.spectrum or ()]
        position = kinds.index(kind)
        color: Any = colors(position if len(kinds) <= 10 else position / (len(kinds) - 1))
        label = labels[kind] if kind not in told and len(told) < _MANY_LINES else "_hidden"
        told.add(kind)
        axes.plot(range(1, len(values) + 1), values, color=color, alpha=0.6, linewidth=0.9, marker=marker, label=label)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("number, the largest first", fontsize=9)
    axes.set_ylabel("singular value", fontsize=9)
    axes.grid(visible=True, alpha=0.25)
    legend = axes.legend(fontsize=7, loc="lower left", ncols=2 if len(kinds) > 4 else 1)
    for text in legend.get_texts():
        text.set_parse_math(False)
