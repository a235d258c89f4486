"""The one report: the files of all benchmarks; plain data in, a page of markdown and JSONL out."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import Row, environment, summarise


@dataclass
class Page:
    """One page of markdown, put together part by part.

    Attributes:
        title: heading of the page.
        lines: lines so far.
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
        rows = [[*row, *[""] * (len(headings) - len(row))] for row in rows]  # a row may end early
        self.lines.append("| " + " | ".join(headings) + " |")
        self.lines.append("| --- " * len(headings) + "|")
        self.lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        self.lines.append("")

    def columns(self, rows: Iterable[Any], columns: Mapping[str, Callable[[Any], object]]) -> None:
        """A table with a line for each row, or group of rows: heading -> what stands below it."""
        self.table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])

    def __str__(self) -> str:
        text = "\n".join([f"# {self.title}", "", *self.lines])
        while "\n\n\n" in text:
            text = text.replace("\n\n\n", "\n\n")
        return text.rstrip() + "\n"


def write_run(
    name: str,
    options: argparse.Namespace,
    rows: Iterable[Row],
    page: Page,
    threads: int | None = None,
) -> None:
    """Writes what a benchmark found, prints its page, and says where the files are.

    Args:
        name: name of the benchmark, with which the files begin.
        options: command line; `output` is the folder.
        rows: measurements, each a line of JSONL that is complete in itself.
        page: page; it gets a last line about versions and machine.
        threads: threads of the CPU; None: as the options say.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    facts = environment(options.threads if threads is None else threads)
    common = {"bench": name.replace("-", "_"), "options": vars(options), "environment": facts}
    for _ in write_lines(stem.with_suffix(".jsonl"), rows, common):
        pass
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    page.lines += ["", f"Commit {facts['commit']}; {versions}; {facts['cpu']}, {facts['threads']} threads."]
    stem.with_suffix(".md").write_text(str(page), encoding="utf-8")
    print(page)
    for suffix in (".jsonl", ".md"):
        print(f"results: {stem.with_suffix(suffix)}")


def write_lines(file: Path, rows: Iterable[Row], common: Row) -> Iterator[Row]:
    """Hands rows on, each written as a JSONL line, complete in itself, as soon as it is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", buffering=1) as stream:
        for row in rows:
            stream.write(json_line({**common, **row}))
            yield row


def json_line(row: Row) -> str:
    """A row as JSON, which has no infinity, no NaN and no paths: they become strings."""
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    is_strange = isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value))
    return str(value) if is_strange else value


def spread(numbers: Sequence[float], scale: float = 1.0) -> str:
    """Median (p10 .. p90); "-" of none."""
    return str(summarise([number * scale for number in numbers])) if numbers else "-"


def share(count: int, total: int) -> str:
    """A count with its share."""
    return f"{count}/{total} ({count / total:.0%})" if total else "-"
