"""The tree of a trace as a picture: one column a round, one row a branch, the chosen path marked.

The shape says what a branch shares, its shade how it was scored, a dashed outline that it was pruned: nothing is
said by colour alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minirksc.trace.html import Markup, Part, join, tag
from minirksc.trace.parts import DASH, number, one_line, shortened

Node = Mapping[str, Any]

NUM_SHADES = 5
_CHAR = 7.0
"""Width of a character of a label, px; digits have all the same."""
_GAP = 44.0
"""Between a column's labels and the next column, px: room for the lines."""
_WIDE_GAP = 96.0
"""The same where there is but one column."""
_LABEL = 14
"""Characters of an answer in a label."""
_SHAPES = {"exact": "prefix shared", "semantic": "another wording's prefix (approximate)", "none": "nothing shared"}


@dataclass(frozen=True)
class Spot:
    """Where a node is drawn, and where lines to its children begin."""

    x: float
    y: float
    end: float


def name_of(node: Node) -> str:
    """Its path, from 1: branch 3.1 is the first fork of branch 3."""
    return ".".join(str(index + 1) for index in node.get("path") or [node["id"]])


def chosen_path(nodes: Sequence[Node], best: int) -> set[int]:
    """Ids of the chosen node and its ancestors."""
    parents = {node["id"]: node.get("parent") for node in nodes}
    path: set[int] = set()
    at: int | None = best
    while at is not None and at in parents and at not in path:
        path.add(at)
        at = parents[at]
    return path


def given_up(nodes: Sequence[Node]) -> set[int]:
    """Ids of pruned nodes: not of failed ones, and one that was forked went on in its children."""
    pruned = {node["id"] for node in nodes if node.get("pruned") and not node.get("error")}
    return pruned - {node.get("parent") for node in nodes}


class Shades:
    """Which of `NUM_SHADES` steps a score gets: the range is that of the tree's own scores."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        scores = [node["score"] for node in nodes if number(node.get("score")) != DASH]
        self.low: float | None = min(scores, default=None)
        self.high: float | None = max(scores, default=None)

    def of(self, node: Node) -> int | None:
        """0 (lowest) to NUM_SHADES - 1; None without a score."""
        if self.low is None or self.high is None or number(node.get("score")) == DASH:
            return None
        if self.low == self.high:
            return NUM_SHADES // 2
        return min(int((node["score"] - self.low) / (self.high - self.low) * NUM_SHADES), NUM_SHADES - 1)


def tree_figure(nodes: Sequence[Node], best: int) -> Markup:
    """The picture and its legend; every node is a link to `#branch-ID`."""
    columns = _columns(nodes)
    labels = {node["id"]: _label(node) for node in nodes}
    spots, root, width, height = _layout(columns, labels)
    shades, path, pruned = Shades(nodes), chosen_path(nodes, best), given_up(nodes)
    lines: list[Markup] = []
    on_path: list[Markup] = []
    marks: list[Markup] = []
    for node in nodes:
        start = spots.get(node.get("parent"), root)
        is_chosen = node["id"] in path
        line = tag("path", d=_curve(start, spots[node["id"]]), class_="line on" if is_chosen else "line")
        (on_path if is_chosen else lines).append(line)
        classes = " ".join(["node", *["pruned"] * (node["id"] in pruned), *["on"] * is_chosen])
        marks.append(_mark(node, spots[node["id"]], labels[node["id"]], shades.of(node), classes, node["id"] == best))
    origin = tag("g", tag("rect", x=2, y=root.y - 10, width=root.end - 6, height=20, rx=4, class_="shape root"),
                 tag("text", "prompt", x=9, y=root.y + 4))  # fmt: skip
    picture = tag(
        "svg", lines, on_path, origin, marks,
        viewBox=f"0 0 {width:.0f} {height:.0f}", width=round(width), height=round(height),
        role="group", aria_label="Tree of branches",
    )  # fmt: skip
    scroller = tag("div", picture, class_="scroll", tabindex=0, role="region", aria_label="Picture of the tree")
    return join(scroller, _legend(nodes, shades))


def shape(sharing: str, x: float, y: float, r: float, class_: str) -> Markup:
    """A circle (exact), a diamond (semantic) or a square (none)."""
    if sharing == "exact":
        return tag("circle", cx=x, cy=y, r=r, class_=class_)
    if sharing == "semantic":
        r *= 1.25
        return tag("path", d=f"M{x:g} {y - r:g}L{x + r:g} {y:g}L{x:g} {y + r:g}L{x - r:g} {y:g}Z", class_=class_)
    r *= 0.9
    return tag("rect", x=x - r, y=y - r, width=2 * r, height=2 * r, class_=class_)


def _columns(nodes: Sequence[Node]) -> list[list[Node]]:
    """Nodes by round, children in the order of their parents so that no lines cross."""
    columns: list[list[Node]] = [[] for _ in range(max((node.get("depth", 1) for node in nodes), default=0))]
    rank: dict[Any, int] = {None: -1}
    for depth, column in enumerate(columns, 1):
        column += [node for node in nodes if node.get("depth", 1) == depth]
        column.sort(key=lambda node: (rank.get(node.get("parent"), -1), node.get("path") or [], node["id"]))
        rank.update((node["id"], index) for index, node in enumerate(column))
    return columns


def _layout(columns: Sequence[Sequence[Node]], labels: Mapping[int, str]) -> tuple[dict[Any, Spot], Spot, float, float]:
    """Spots of the nodes and of the prompt, width and height in px."""
    most = max(map(len, columns), default=1)
    pitch = 28.0 if most <= 16 else 21.0 if most <= 40 else 16.0
    height = max(most, 2) * pitch + 8
    root = Spot(2, height / 2, 62)
    spots: dict[Any, Spot] = {}
    x = root.end + (_GAP if len(columns) > 1 else _WIDE_GAP)
    for column in columns:
        room = 16 + _CHAR * max((len(labels[node["id"]]) for node in column), default=0)
        top = (height - len(column) * pitch) / 2 + pitch / 2
        for row, node in enumerate(column):
            spots[node["id"]] = Spot(x, top + row * pitch, x + 20 + _CHAR * len(labels[node["id"]]))
        x += room + _GAP
    return spots, root, x - _GAP + 12, height


def _label(node: Node) -> str:
    label = f"{name_of(node)}  {number(node.get('score'))}"
    answer = one_line(node.get("parsed"))
    if answer:
        label += f"  {shortened(answer, _LABEL)}"
    return label


def _curve(start: Spot, end: Spot) -> str:
    middle = (start.end + end.x - 8) / 2
    return f"M{start.end - 4:g} {start.y:g}C{middle:g} {start.y:g} {middle:g} {end.y:g} {end.x - 8:g} {end.y:g}"


def _mark(node: Node, spot: Spot, label: str, shade: int | None, classes: str, is_best: bool) -> Markup:
    x, y, sharing = spot.x, spot.y, node.get("sharing", "none")
    marks = [shape(sharing, x, y, 6.5, "shape" if shade is None else f"shape q{shade}")]
    if is_best:
        marks.insert(0, tag("circle", cx=x, cy=y, r=11, class_="ring"))
    if node.get("error"):
        marks.append(tag("path", d=f"M{x - 4:g} {y - 4:g}l8 8m0 -8l-8 8", class_="cross"))
    said = [f"Branch {name_of(node)}", f"score {number(node.get('score'))}", _SHAPES.get(sharing, str(sharing))]
    said += ["chosen"] * is_best + ["pruned"] * ("pruned" in classes) + ["failed"] * bool(node.get("error"))
    text = tag("text", label, x=x + 15, y=y + 4, class_="label")
    return tag("a", tag("title", ", ".join(said)), marks, text, href=f"#branch-{node['id']}", class_=classes)


def _legend(nodes: Sequence[Node], shades: Shades) -> Markup:
    """What the marks mean: only those that occur."""
    entries: list[Part] = []
    if shades.low is not None:
        swatches = [tag("rect", x=i * 14, y=3, width=14, height=12, class_=f"shape q{i}") for i in range(NUM_SHADES)]
        strip = tag("svg", swatches, width=NUM_SHADES * 14, height=18, aria_hidden="true")
        entries.append(("score ", number(shades.low), " ", strip, " ", number(shades.high)))
    if any(shades.of(node) is None and not node.get("error") for node in nodes):
        entries.append("unshaded: not asked about, no score")
    for sharing, meaning in _SHAPES.items():
        if any(node.get("sharing", "none") == sharing for node in nodes):
            entries.append((_key(shape(sharing, 9, 9, 6, "shape")), meaning))
    ring = [tag("circle", cx=9, cy=9, r=8, class_="ring"), tag("circle", cx=9, cy=9, r=4, class_="shape")]
    entries.append((_key(*ring), "chosen"))
    if given_up(nodes):
        entries.append((tag("svg", tag("g", shape("exact", 9, 9, 6, "shape"), class_="pruned"), **_KEY), "pruned"))
    if any(node.get("error") for node in nodes):
        entries.append((_key(tag("path", d="M5 5l8 8m0 -8l-8 8", class_="cross")), "failed"))
    return tag("ul", [tag("li", entry) for entry in entries], class_="legend")


_KEY: dict[str, Any] = {"width": 18, "height": 18, "aria_hidden": "true"}


def _key(*parts: Markup) -> Markup:
    return tag("svg", parts, **_KEY)
