"""Pages, pictures and files of the benchmarks of the solver: plain data in, markdown, PNG and JSONL out."""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import environment, summarise
from bench.measured import PHASES, Row


@dataclass
class Page:
    """One page of markdown, put together part by part.

    Attributes:
        title: its heading.
        lines: so far.
    """

    title: str
    lines: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """A section begins."""
        self.lines += ["", f"## {text}", ""]

    def text(self, text: str) -> None:
        """A paragraph."""
        self.lines += [text, ""]

    def items(self, texts: Sequence[str]) -> None:
        """A list; nothing where it is empty."""
        self.lines += [*(f"- {text}" for text in texts), ""] if texts else []

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table."""
        self.lines.append("| " + " | ".join(headings) + " |")
        self.lines.append("| --- " * len(headings) + "|")
        self.lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        self.lines.append("")

    def __str__(self) -> str:
        text = "\n".join([f"# {self.title}", "", *self.lines])
        while "\n\n\n" in text:
            text = text.replace("\n\n\n", "\n\n")
        return text.rstrip() + "\n"


def plain_options(options: argparse.Namespace) -> dict[str, Any]:
    """The command line as data that JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(options).items()}


def new_stem(folder: Path, name: str) -> Path:
    """Path without suffix of the files of one run; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def write_jsonl(file: Path, rows: Sequence[Row], common: Mapping[str, Any]) -> None:
    """One line a row, each complete in itself."""
    with file.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps({**common, **row}) + "\n")


def write_page(stem: Path, page: Page, threads: int, draw: Callable[[Any], bool] | None = None) -> list[Path]:
    """Writes the page, and its picture where something can be drawn; prints the page.

    Args:
        stem: of the files.
        page: gets the picture and a last line about versions and machine.
        threads: of the CPU.
        draw: draws onto a matplotlib figure; False: there was nothing to draw.

    Returns:
        The files.
    """
    files = [stem.with_suffix(".md")]
    if draw is not None and save_picture(stem.with_suffix(".png"), draw):
        files.append(stem.with_suffix(".png"))
        page.lines += ["", f"![{page.title}]({files[-1].name})"]
    facts = environment(threads)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    page.lines += ["", f"Commit {facts['commit']}; {versions}; {facts['cpu']}, {threads} threads."]
    files[0].write_text(str(page), encoding="utf-8")
    print(page)
    return files


def save_picture(file: Path, draw: Callable[[Any], bool]) -> bool:
    """Whether there is matplotlib, and something was drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(layout="constrained")
    if not draw(figure):
        return False
    figure.savefig(file, dpi=110)
    return True


def draw_phases(figure: Any, groups: Mapping[str, Sequence[Row]]) -> bool:
    """A panel a group of rows, a stacked bar an arm: median seconds of each phase."""
    if not groups:
        return False
    num_columns = min(2, len(groups))
    num_lines = -(-len(groups) // num_columns)
    num_arms = max(len(names(rows)) for rows in groups.values())
    figure.set_size_inches(5.2 * num_columns, 0.4 + num_lines * (1.1 + 0.28 * num_arms))
    for index, (title, rows) in enumerate(groups.items()):
        axes = figure.add_subplot(num_lines, num_columns, index + 1)
        arms = names(rows)[::-1]  # the first on top
        left = [0.0] * len(arms)
        for phase, label in PHASES.items():
            widths = [median(values(rows, arm, phase)) for arm in arms]
            axes.barh(arms, widths, left=left, label=label)
            left = [one + width for one, width in zip(left, widths, strict=True)]
        axes.set(title=title, xlabel="seconds (medians of the phases)")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    put_legend(figure)
    return True


def put_legend(figure: Any) -> None:
    """One legend for all panels, below them, where it hides nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)


def names(rows: Sequence[Row]) -> list[str]:
    """Arms, in order."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def values(rows: Sequence[Row], arm: str, metric: str) -> list[float]:
    """One metric of an arm, by repetition."""
    return [row[metric] for row in rows if row["arm"] == arm]


def ratios(rows: Sequence[Row], arm: str, base: str, metric: str = "total_s") -> list[float]:
    """How many times as fast as `base` an arm is, within each repetition; rows are of one group."""
    own = {row["repeat"]: row[metric] for row in rows if row["arm"] == arm}
    theirs = {row["repeat"]: row[metric] for row in rows if row["arm"] == base}
    return [theirs[repeat] / own[repeat] for repeat in own if repeat in theirs]


def spread(numbers: Sequence[float], scale: float = 1.0) -> str:
    """Median (p10 .. p90); "-" of none."""
    return str(summarise([number * scale for number in numbers])) if numbers else "-"


def share(count: int, total: int) -> str:
    """A count with its share."""
    return f"{count}/{total} ({count / total:.0%})" if total else "-"
