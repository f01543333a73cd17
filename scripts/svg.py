"""Plain SVG pictures for the documentation: boxes, text and arrows, readable in light and dark.

A picture is 460 units wide, so that its text stays readable on a screen of 400 pixels. Its colours
are CSS variables that follow `prefers-color-scheme`, in a page as on GitHub.
"""

from collections.abc import Sequence
from html import escape

WIDTH = 460

_STYLE = """
svg { --ink: #1f2430; --soft: #57606a; --line: #8a93a3; --fill: #f4f6fa; --accent: #3949ab;
  --tint: #e6e9f8; --second: #b45309 }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e8eaf2; --soft: #aab1c2; --line: #707889; --fill: #272b38; --accent: #9fa8da;
    --tint: #333a5e; --second: #f0a860 }
}
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  fill: var(--ink) }
.mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.bold { font-weight: 600 }
.soft { fill: var(--soft); font-size: 13px }
.box { fill: var(--fill); stroke: var(--line) }
.ours { fill: var(--tint); stroke: var(--accent) }
.frame { fill: none; stroke: var(--accent); stroke-dasharray: 5 4 }
.grid { stroke: var(--line); stroke-width: 0.5 }
.arrow { fill: none; stroke: var(--soft); stroke-width: 1.5 }
.tip { fill: var(--soft) }
.dot { fill: var(--accent) }
.square { fill: var(--second) }
"""

_CHARACTER = {"mono": 8.5, "soft": 7.2, "": 7.4}
"""A generous width of one character of each kind of text, in units."""


class Picture:
    """An SVG picture, drawn from the top down.

    Args:
        height: units.
        title: what a reader who cannot see the picture is told first.
        description: the same content in words.
    """

    def __init__(self, height: float, title: str, description: str):
        self.height = height
        self._title = title
        self._description = description
        self._elements: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box") -> None:
        """A rectangle of the kind `box`, `ours` or `frame`."""
        self._inside(x, y, width, height)
        self._add(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>'
        )

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """One line of text with its baseline at `y`.

        Raises ValueError if the line may be wider than the picture.
        """
        width = len(text) * _CHARACTER[next((k for k in ("mono", "soft") if k in kind), "")]
        left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
        self._inside(left, y - 12, width, 14)
        self._add(
            f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def labelled_box(
        self,
        x: float,
        y: float,
        width: float,
        lines: Sequence[tuple[str, str]],
        kind: str = "box",
        height: float = 0,
    ) -> float:
        """A box around centred lines of (text, kind of text); returns the y of its lower edge.

        Raises ValueError if a line may be wider than the box.
        """
        height = height or 18 * len(lines) + 10
        self.box(x, y, width, height, kind)
        baseline = y + (height - 18 * len(lines)) / 2 + 13.5
        for text, style in lines:
            needed = len(text) * _CHARACTER[next((k for k in ("mono", "soft") if k in style), "")]
            if needed > width:
                raise ValueError(f"{text!r} may need {needed:.0f} units in a box of {width}")
            self.text(x + width / 2, baseline, text, style, "middle")
            baseline += 18
        return y + height

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points with a tip at its end; its last part is straight."""
        (x0, y0), (x, y) = points[-2:]
        path = " L ".join(f"{px} {py}" for px, py in points)
        self._add(f'<path class="arrow" d="M {path}"/>')
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        tip = f"{x} {y} {x - 7 * dx - 4 * dy} {y - 7 * dy - 4 * dx} "
        tip += f"{x - 7 * dx + 4 * dy} {y - 7 * dy + 4 * dx}"
        self._add(f'<polygon class="tip" points="{tip}"/>')

    def line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A thin line, as in a grid."""
        self._add(f'<line class="grid" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>')

    def mark(self, x: float, y: float, kind: str) -> None:
        """A `dot` or a `square` of a chart."""
        if kind == "dot":
            self._add(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        else:
            self._add(
                f'<rect class="square" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
            )

    def svg(self) -> str:
        """The file."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:g}" '
                f'width="{WIDTH}" height="{self.height:g}" role="img" '
                'aria-labelledby="title description">',
                f'<title id="title">{escape(self._title)}</title>',
                f'<desc id="description">{escape(self._description)}</desc>',
                f"<style>{_STYLE}</style>",
                *self._elements,
                "</svg>",
                "",
            ]
        )

    def _add(self, element: str) -> None:
        self._elements.append(element)

    def _inside(self, x: float, y: float, width: float, height: float) -> None:
        if x < 0 or y < 0 or x + width > WIDTH or y + height > self.height:
            raise ValueError(f"({x}, {y}, {width}, {height}) is not inside the picture")
