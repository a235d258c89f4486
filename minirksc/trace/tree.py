"""The tree of a trace as a picture: where each branch is drawn, one column a round and one row a branch."""

from collections.abc import Sequence
from dataclasses import dataclass

from minirksc.trace.branches import PageBranch
from minirksc.trace.figures import number, one_line, shortened

_CHAR = 7.0
"""Width of a character of a label, px; digits have all the same."""
_GAP = 44.0
"""Room between a column's labels and the next column for the lines, px."""
_WIDE_GAP = 96.0
"""The same where there is but one column."""
_LABEL = 14
"""Characters of an answer in a label."""


@dataclass(frozen=True)
class Spot:
    """Where something is drawn, px.

    Attributes:
        x: middle of the mark, from the left.
        y: middle of the mark, from the top.
        end: where its label ends and lines to its children begin.
    """

    x: float
    y: float
    end: float


@dataclass(frozen=True)
class Mark:
    """A branch in the picture.

    Attributes:
        branch: the branch.
        label: text beside the mark.
        spot: where both are.
        start: where its parent, or else the prompt, is.
    """

    branch: PageBranch
    label: str
    spot: Spot
    start: Spot


@dataclass(frozen=True)
class Picture:
    """The tree of branches.

    Attributes:
        marks: the branches in the order of the trace.
        root: where the prompt is.
        width: extent from left to right, px.
        height: extent from top to bottom, px.
    """

    marks: list[Mark]
    root: Spot
    width: int
    height: int


def picture_of(branches: Sequence[PageBranch]) -> Picture:
    """Lays the tree out."""
    columns = _columns(branches)
    labels = {branch: _label(branch) for branch in branches}
    most = max(map(len, columns), default=1)
    pitch = 28.0 if most <= 16 else 21.0 if most <= 40 else 16.0
    height = max(most, 2) * pitch + 8
    root = Spot(2, height / 2, 62)
    spots: dict[PageBranch | None, Spot] = {}
    x = root.end + (_GAP if len(columns) > 1 else _WIDE_GAP)
    for column in columns:
        top = (height - len(column) * pitch) / 2 + pitch / 2
        for row, branch in enumerate(column):
            spots[branch] = Spot(x, top + row * pitch, x + 20 + _CHAR * len(labels[branch]))
        x += 16 + _CHAR * max((len(labels[branch]) for branch in column), default=0) + _GAP
    marks = [Mark(branch, labels[branch], spots[branch], spots.get(branch.parent, root)) for branch in branches]
    return Picture(marks, root, round(x - _GAP + 12), round(height))


def _columns(branches: Sequence[PageBranch]) -> list[list[PageBranch]]:
    """Branches by round, children in the order of their parents so that no lines cross."""
    columns = []
    rank: dict[PageBranch | None, int] = {None: -1}
    for depth in range(1, 1 + max((branch.node["depth"] for branch in branches), default=0)):
        column = [branch for branch in branches if branch.node["depth"] == depth]
        column.sort(key=lambda branch: (rank.get(branch.parent, -1), branch.node["path"] or [], branch.node["id"]))
        rank.update((branch, index) for index, branch in enumerate(column))
        columns.append(column)
    return columns


def _label(branch: PageBranch) -> str:
    answer = shortened(one_line(branch.node["parsed"]), _LABEL)
    return "  ".join([branch.name, number(branch.node["score"]), *[answer] * bool(answer)])
