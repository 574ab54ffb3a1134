"""Charts as inline SVG: widths in percent and text in pixels, so that a narrow page stays readable.

Colours are classes (c0 ... c5, and those of eval/page.py's style sheet): light and dark are the
page's affair.  Every number that is written carries its row's text in data-value.
"""

import html
import math
from collections.abc import Sequence

COLOURS = 6  # classes c0 to c5


def bars(entries: Sequence[tuple[str, str, str, str, int]], unit: str, height: int = 20) -> str:
    """Returns lying bars with whiskers, a line of text above each.

    Args:
      entries: (label, value, low, high, colour) as texts of a row; low and high "" for no whisker.
      unit: behind the numbers.
      height: of a bar, in pixels.
    """
    values = [float(value) for _, value, _, _, _ in entries]
    highs = [
        float(high) if high else value
        for (_, _, _, high, _), value in zip(entries, values, strict=True)
    ]
    # A whisker that other work on the machine made ends at the edge: bars stay long enough to see.
    end = min(max(highs), 2 * max(values)) or 1.0
    share = 76 / end  # percent; the rest is for the number

    parts = []
    for (label, text, low, _, colour), value, high in zip(entries, values, highs, strict=True):
        marks = [f'<rect width="{share * value:.2f}%" height="{height}" class="c{colour}"/>']
        edge = share * value
        if low:
            edge = max(edge, share * min(high, end))
            marks.append(
                f'<line class="whisker" x1="{share * float(low):.2f}%" '
                f'x2="{share * min(high, end):.2f}%" y1="{height / 2:g}" y2="{height / 2:g}"/>'
            )
            for x in (float(low), high):
                if x <= end:
                    marks.append(
                        f'<line class="whisker" x1="{share * x:.2f}%" x2="{share * x:.2f}%" '
                        f'y1="{height / 4:g}" y2="{3 * height / 4:g}"/>'
                    )
        marks.append(
            f'<text x="{edge:.2f}%" dx="6" y="{height / 2 + 4.5:g}" data-value="{html.escape(text)}">'
            f"{rounded(text)} {html.escape(unit)}</text>"
        )
        parts.append(
            f'<div class="bar-label">{html.escape(label)}</div>'
            f'<svg width="100%" height="{height}" role="img" '
            f'aria-label="{html.escape(label)}: {rounded(text)} {html.escape(unit)}">'
            f"{''.join(marks)}</svg>"
        )
    return f'<div class="bars">{"".join(parts)}</div>'


def scatter(
    points: Sequence[tuple[str, str, str, str, int]], x_label: str, y_label: str, height: int = 260
) -> str:
    """Returns numbered points with vertical whiskers, and a list that says which is which.

    Args:
      points: (label, x, y, error of y or "", colour) as texts of a row; x in bytes.
      x_label, y_label: of the axes.
      height: of the plot, in pixels.
    """
    xs = [float(x) / 1e6 for _, x, _, _, _ in points]
    ys = [float(y) for _, _, y, _, _ in points]
    errors = [float(error) if error else 0.0 for _, _, _, error, _ in points]
    low = min(y - error for y, error in zip(ys, errors, strict=True))
    high = max(y + error for y, error in zip(ys, errors, strict=True))
    room = 0.12 * (high - low) or 0.05
    low, high = max(0.0, low - room), min(1.0, high + room)
    end = 1.12 * max(xs) or 1.0
    x_ticks = [tick for tick in ticks(0.0, end) if tick <= end]
    y_ticks = [tick for tick in ticks(low, high) if low <= tick <= high]

    def left(x):
        return 2 + 96 * x / end

    def top(y):
        return 10 + (height - 20) * (high - y) / ((high - low) or 1.0)

    names = "".join(
        f'<text x="42" y="{top(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in y_ticks
    )
    marks = [
        f'<line class="grid" x1="0" x2="100%" y1="{top(tick):.1f}" y2="{top(tick):.1f}"/>'
        for tick in y_ticks
    ]
    for tick in x_ticks:
        marks.append(
            f'<line class="grid" x1="{left(tick):.2f}%" x2="{left(tick):.2f}%" y1="0" y2="{height}"/>'
            f'<text x="{left(tick):.2f}%" y="{height + 14}" text-anchor="middle">{tick:g}</text>'
        )
    spots = [(left(x), top(y)) for x, y in zip(xs, ys, strict=True)]
    taken: list[tuple[tuple[float, float], tuple[int, int]]] = []
    written = []  # above all points
    for number, ((label, _, _, _, colour), x, y, error) in enumerate(
        zip(points, xs, ys, errors, strict=True), 1
    ):
        place = f"{left(x):.2f}%"
        if error:
            marks.append(
                f'<line class="whisker" x1="{place}" x2="{place}" y1="{top(y + error):.1f}" '
                f'y2="{top(y - error):.1f}"/>'
            )
        marks.append(
            f'<circle cx="{place}" cy="{top(y):.1f}" r="5" class="c{colour}">'
            f"<title>{html.escape(label)}</title></circle>"
        )
        right, down = _free_place((left(x), top(y)), spots, taken)
        # Left of its point a number of two digits ends where one of one digit does.
        side = f'dx="{right}"' if right > 0 else f'dx="{right + 9}" text-anchor="end"'
        written.append(
            f'<text class="number" x="{place}" {side} y="{top(y) + down:.1f}">{number}</text>'
        )
    legend = "".join(
        f'<li><svg width="12" height="12" aria-hidden="true"><circle cx="6" cy="6" r="5" '
        f'class="c{colour}"/></svg> {html.escape(label)}: '
        f'<data value="{html.escape(y)}">{rounded(y)}</data>, '
        f'<data value="{html.escape(x)}">{rounded(x)}</data> bytes</li>'
        for label, x, y, _, colour in points
    )
    return (
        f'<div class="axis-label">{html.escape(y_label)}</div><div class="plot">'
        f'<svg width="48" height="{height + 20}" aria-hidden="true">{names}</svg>'
        f'<svg class="area" height="{height + 20}" role="img" '
        f'aria-label="{html.escape(y_label)} against {html.escape(x_label)}">'
        f"{''.join(marks + written)}</svg></div>"
        f'<div class="axis-label right">{html.escape(x_label)}</div>'
        f'<ol class="legend">{legend}</ol>'
    )


_PERCENT = (3.3, 10.4)  # in pixels, on pages of 400 and of 1280 pixels
# Where a point's number may stand, in pixels from its centre; files of one size lie close together.
_PLACES = ((9, 4), (-17, 4), (7, -7), (7, 15), (-15, -7), (-15, 15), (-4, -10), (-4, 18))
_FURTHER = tuple((x, y) for x in (20, -28, 32, -40) for y in (4, -9, 17))


def _free_place(spot, spots, taken):
    """Returns where a number covers neither a point nor a number; notes it in `taken`.

    Args:
      spot: of the number's point: percent from the left, pixels from the top.
      spots: of all points.
      taken: (spot, place) of the numbers that are written.
    """
    places = [*_PLACES, *_FURTHER]
    free = [place for place in places if _is_apart(spot, place, taken, 12, 10)]
    bare = [(each, (-5, 4)) for each in spots]  # a number's middle is 5 right of its place, 4 up
    clear = [place for place in free if _is_apart(spot, place, bare, 10, 9)]
    chosen = [*clear, *free, *places][0]
    taken.append((spot, chosen))
    return chosen


def _is_apart(spot, place, others, width, height):
    return all(
        abs(percent * (spot[0] - x) + place[0] - right) >= width
        or abs(spot[1] - y + place[1] - down) >= height
        for percent in _PERCENT
        for (x, y), (right, down) in others
    )


def profile(
    names: Sequence[str], series: Sequence[tuple[str, Sequence[str], int]], unit: str
) -> str:
    """Returns a line of points for each series, one name below the other, the first on top.

    Args:
      names: of the rows.
      series: (title, a text for each name, "" where there is none, colour).
      unit: of the values.
    """
    step, head = 15, 20
    height = step * len(names) + head
    known = [float(v) for _, values, _ in series for v in values if v and math.isfinite(float(v))]
    if not known:
        return "<p>No finite value.</p>"
    marked = ticks(min(0.0, min(known)), max(known))
    start, end = min(marked[0], min(known)), max(marked[-1], max(known))

    def left(x):
        return 2 + 95 * (x - start) / ((end - start) or 1.0)

    marks = [
        f'<line class="grid" x1="{left(tick):.2f}%" x2="{left(tick):.2f}%" y1="{head}" '
        f'y2="{height}"/><text x="{left(tick):.2f}%" y="13" text-anchor="middle">{tick:g}</text>'
        for tick in marked
    ]
    for title, values, colour in series:
        places = [
            (left(float(value)), head + step * (index + 0.5), names[index], value)
            for index, value in enumerate(values)
            if value and math.isfinite(float(value))
        ]
        corners = " ".join(f"{x:.2f},{y:g}" for x, y, _, _ in places)
        # Percentages in a line: a picture of its own, stretched to the width.
        marks.append(
            f'<svg x="0" y="0" width="100%" height="{height}" viewBox="0 0 100 {height}" '
            f'preserveAspectRatio="none"><polyline class="line s{colour}" points="{corners}"/></svg>'
        )
        marks += [
            f'<circle class="c{colour}" cx="{x:.2f}%" cy="{y:g}" r="3.5"><title>'
            f"{html.escape(name)}, {html.escape(title)}: {rounded(value)} {html.escape(unit)}"
            "</title></circle>"
            for x, y, name, value in places
        ]
    legend = "".join(
        f'<li><svg width="12" height="12" aria-hidden="true"><circle cx="6" cy="6" r="4" '
        f'class="c{colour}"/></svg> {html.escape(title)}</li>'
        for title, _, colour in series
    )
    labels = "".join(
        f'<div title="{html.escape(name)}"><bdi>{html.escape(name)}</bdi></div>' for name in names
    )
    return (
        f'<ul class="legend">{legend}</ul><div class="plot">'
        f'<div class="names">{labels}</div>'
        f'<svg class="area" height="{height}" role="img" aria-label="{html.escape(unit)} by layer">'
        f'{"".join(marks)}</svg></div><div class="axis-label right">{html.escape(unit)}</div>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Returns 3 to 7 round numbers, steps of 1, 2 or 5, that span low to high."""
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span))
    step = next(s * size for s in (0.2, 0.5, 1.0, 2.0) if span / (s * size) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def rounded(text: str) -> str:
    """Returns a number of a row as it is shown: whole ones whole, others with 4 digits."""
    try:
        number = float(text)
    except ValueError:
        return html.escape(text)
    if not math.isfinite(number):
        return html.escape(text)
    if number == int(number) and "." not in text and "e" not in text.lower():
        return f"{int(number):,}"
    if number and abs(number) < 1e-3:
        return f"{number:.3e}"
    return f"{number:,.0f}" if abs(number) >= 1e4 else f"{number:.4g}"
