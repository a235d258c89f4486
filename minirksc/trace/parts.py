"""What the sections of a trace's page are made of: figures in words, tables, bars, lists of facts."""

import math
from collections.abc import Callable, Iterable, Sequence

from minirksc.trace.html import Markup, Part, join, tag

DASH = "\u2013"
"""Where there is no value."""


def number(value: object, digits: int = 2) -> str:
    """A figure, or a dash."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return DASH
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def seconds(value: object) -> str:
    """A time in a unit that suits it, or a dash."""
    if not isinstance(value, int | float) or number(value) == DASH:
        return DASH
    return f"{1000 * value:.0f} ms" if value < 0.1 else f"{value:.2f} s" if value < 10 else f"{value:,.1f} s"


def yes_no(value: object) -> str:
    """A truth value, or a dash for None."""
    return DASH if value is None else "yes" if value else "no"


def some(count: int, one: str, many: str) -> str:
    """A count and what is counted."""
    return f"{count:,} {one if count == 1 else many}"


def one_line(text: object) -> str:
    """Runs of white space as one space; None as nothing."""
    return "" if text is None else " ".join(str(text).split())


def shortened(text: str, most: int) -> str:
    """At most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def facts(pairs: Iterable[tuple[Part, Part]], class_: str = "facts") -> Markup:
    """Terms and values as a list."""
    return tag("dl", [tag("div", tag("dt", term), tag("dd", value)) for term, value in pairs], class_=class_)


def fold(title: Part, *parts: Part, is_open: bool = False, class_: str = "fold") -> Markup:
    """A title, and what it unfolds."""
    return tag("details", tag("summary", title), parts, open=is_open, class_=class_)


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Part]]) -> Markup:
    """A table; on a narrow screen each row becomes a list.

    Args:
        columns: heading and kind of each: "n" for numbers, "w" for long texts, "" for others.
        rows: cells.
    """
    # It says its roles, since being laid out as a list takes them away.
    heads = [tag("th", name, class_=kind or None, scope="col", role="columnheader") for name, kind in columns]
    lines = []
    for row in rows:
        cells = []
        for (name, kind), cell in zip(columns, row, strict=True):
            is_empty = cell is None or cell in ("", DASH)
            class_ = " ".join(filter(None, (kind, "empty" * is_empty)))
            cells.append(tag("td", cell, class_=class_ or None, data_label=name, role="cell"))
        lines.append(tag("tr", cells, role="row"))
    head = tag("thead", tag("tr", heads, role="row"), role="rowgroup")
    return tag("div", tag("table", head, tag("tbody", lines, role="rowgroup"), role="table"), class_="scroll stack")


def meter(part: float, width: float | str, height: float = 6) -> Markup:
    """A bar that is filled to a part of 0..1; the figure stands beside it."""
    size = f"{100 * min(max(part, 0.0), 1.0):.1f}%"
    bars = [tag("rect", width=w, height=height, rx=2, class_=c) for w, c in (("100%", "track"), (size, "fill"))]
    return tag("svg", bars, width=width, height=height, aria_hidden="true")


def stacked(parts: Sequence[tuple[str, float]], written: Callable[[float], str]) -> Markup:
    """A bar of parts in different shades, and under it each part in figures.

    Args:
        parts: name and size of each, at most four.
        written: a size in words.
    """
    total, at = sum(size for _, size in parts) or 1.0, 0.0
    bar, entries = [], []
    for index, (name, size) in enumerate(parts):
        share = 100 * size / total
        if size:
            bar.append(tag("rect", x=f"{at:.2f}%", width=f"{share:.2f}%", height="100%", class_=f"p{index}"))
        at += share
        key = tag("svg", tag("rect", width=12, height=12, rx=2, class_=f"p{index}"), class_="key", aria_hidden="true")
        entries.append(tag("li", key, tag("span", name), tag("b", written(size)), f"{share:.0f}%"))
    return join(tag("svg", bar, class_="bar", aria_hidden="true"), tag("ul", entries, class_="legend"))
