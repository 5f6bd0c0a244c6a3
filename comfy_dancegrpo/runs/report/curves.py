"""A run's curves as SVG that stands in the page and takes its colours: matplotlib draws the lines, and no text of a run goes through it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

POINTS = 600  # of a line: a page is not a table
_COLOURS = {"#040506": "quiet", "#070809": "accent", "#0a0b0c": "second"}  # what matplotlib is given, and the page's variables
QUIET, ACCENT, SECOND = _COLOURS
_NAN = float("nan")


@dataclass(frozen=True)
class Line:
    """y against x, both as long; None, or not a number, leaves a gap. spread: a band of so much above and below. marks: each point is marked."""

    x: Sequence[float]
    y: Sequence[float | None] = field(repr=False)
    colour: str = ACCENT
    width: float = 1.6
    alpha: float = 1.0
    spread: Sequence[float | None] | None = field(default=None, repr=False)
    marks: bool = False

    def thinned(self) -> Line:
        step = -(-len(self.x) // POINTS)
        if step <= 1:
            return self
        places = sorted({*range(0, len(self.x), step), len(self.x) - 1})
        spread = None if self.spread is None else [self.spread[i] for i in places]
        return Line([self.x[i] for i in places], [self.y[i] for i in places], self.colour, self.width, self.alpha, spread, self.marks)


def svg(name: str, lines: Sequence[Line], width: float = 3.6, height: float = 2.1, end: float = 1.0, dots: Sequence[float] = ()) -> str:
    """The chart, [width, height] in inches of its own. name: of letters, unique in the page. end: the last iteration. dots: iterations that are marked below."""
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    # inches for the numbers at the axes: a layout that is found by drawing takes four times as long
    axes = figure.add_axes((0.56 / width, 0.24 / height, 1 - 0.64 / width, 1 - 0.42 / height))
    for line in (line.thinned() for line in lines):
        x, y = np.asarray(line.x, float), np.array([_NAN if v is None or abs(v) == float("inf") else v for v in line.y], float)
        if line.spread is not None:
            spread = np.array([0.0 if v is None or v != v else v for v in line.spread], float)
            axes.fill_between(x, y - spread, y + spread, color=line.colour, alpha=0.13, linewidth=0)
        marks = line.marks or np.isfinite(y).sum() == 1  # a line of one point is none
        axes.plot(x, y, color=line.colour, linewidth=line.width, alpha=line.alpha, marker="o" if marks else None, markersize=3.5)
    if len(dots):
        axes.plot(dots, [0.02] * len(dots), "^", color=QUIET, markersize=3, transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set_xlim(0, max(end, 1.0) * 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.12)
    axes.tick_params(labelsize=8, colors=QUIET, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.grid(color=QUIET, alpha=0.18, linewidth=0.6)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4))  # so that numbers fit beside the axis
    axes.yaxis.get_offset_text().set(color=QUIET, fontsize=8)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "path.simplify_threshold": 0.3}):
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(file.getvalue(), name)


def _inline(text: str, prefix: str) -> str:
    """Without the document's head; ids are the chart's own, and colours the page's."""
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" role="img" aria-hidden="true">', text, count=1)
    for colour, name in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text
