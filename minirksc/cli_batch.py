"""JSONL in, JSONL out: many prompts, resumable.

An input line is a JSON string, or an object with `prompt`, `messages` or `prompt_token_ids`, perhaps an `id` and
sampling values under `params`. Its result carries the line's number and a hash of its text: a run that was
interrupted goes on where it was, and a changed input is not mistaken for the old one.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from minirksc.cli_output import generation_as_dict, solve_as_dict, to_json
from minirksc.config import SamplingParams
from minirksc.errors import ConfigError, MinirkscError

if TYPE_CHECKING:
    from minirksc.llm import LLM

Prepare = Callable[[Any, SamplingParams], tuple[Any, SamplingParams]]
"""From a prompt (text, messages or token ids) and its sampling values to what runs."""

CHUNK = 32
"""Prompts that are batched together; what an interruption can lose."""

KINDS = ("prompt", "messages", "prompt_token_ids")


@dataclasses.dataclass(frozen=True)
class Line:
    """One input line: its number from 1, its text, and a hash of it."""

    number: int
    text: str
    digest: str


class Batch:
    """An input file and the results that exist already.

    Args:
        source: JSONL file.
        target: JSONL file, new or from an earlier run on the same input.

    Raises:
        ConfigError: a file cannot be read or written, or the target is from another input.
    """

    def __init__(self, source: Path, target: Path) -> None:
        try:
            texts = source.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--input {source} cannot be read: {error}") from error
        self.lines = [
            Line(number, text, hashlib.sha256(text.encode()).hexdigest()[:16])
            for number, text in enumerate(texts, start=1)
            if text.strip()
        ]
        self.target = target
        self._num_failed = 0
        self._done = self._read_target()

    def run(
        self,
        llm: "LLM",
        params: SamplingParams,
        prepare: Prepare,
        solve: Callable[["LLM", Any], Any] | None,
    ) -> int:
        """Does what is left; returns the exit code.

        Args:
            llm: runs it.
            params: for lines that do not override them.
            prepare: turns a prompt into what `llm` or `solve` takes.
            solve: solves one problem; None generates.
        """
        from tqdm import tqdm

        todo = [line for line in self.lines if line.number not in self._done]
        size = 1 if solve else CHUNK
        with (
            self.target.open("a", encoding="utf-8") as out,
            tqdm(total=len(self.lines), initial=len(self._done), unit="prompt", disable=not sys.stderr.isatty()) as bar,
            self._explain_interruption(),
        ):
            for begin in range(0, len(todo), size):
                chunk = todo[begin : begin + size]
                work = self._solve_one if solve else self._generate
                for line, record in work(llm, chunk, params, prepare, solve):
                    self._write(out, line, record)
                bar.update(len(chunk))
                out.flush()
                os.fsync(out.fileno())
        if self._num_failed:
            print(f"minirksc: {self._num_failed} of {len(self.lines)} lines failed; see their `error`", file=sys.stderr)
        return 1 if self._num_failed else 0

    def _generate(
        self, llm: "LLM", chunk: list[Line], params: SamplingParams, prepare: Prepare, _: Any
    ) -> Iterator[tuple[Line, dict[str, Any]]]:
        jobs: list[tuple[Line, dict[str, Any], Any, SamplingParams]] = []
        for line in chunk:
            record: dict[str, Any] = {}
            try:
                prompt, own = self._parse(line, record, params)
                jobs.append((line, record, *prepare(prompt, own)))
            except MinirkscError as error:
                yield line, {**record, "error": str(error)}
        results = llm.generate([job[2] for job in jobs], [job[3] for job in jobs], return_errors=True) if jobs else []
        for (line, record, _prompt, _own), result in zip(jobs, results, strict=True):
            if result.error is not None:
                yield line, {**record, "error": str(result.error)}
            else:
                yield line, {**record, **generation_as_dict(result)}

    def _solve_one(
        self,
        llm: "LLM",
        chunk: list[Line],
        params: SamplingParams,
        prepare: Prepare,
        solve: Callable[["LLM", Any], Any] | None,
    ) -> Iterator[tuple[Line, dict[str, Any]]]:
        assert solve is not None
        for line in chunk:
            record: dict[str, Any] = {}
            try:
                prompt, own = self._parse(line, record, params)
                if own is not params:
                    raise ConfigError("params in a line do not go with --branches")
                yield line, {**record, **solve_as_dict(solve(llm, prepare(prompt, own)[0]))}
            except MinirkscError as error:
                yield line, {**record, "error": str(error)}

    def _parse(self, line: Line, record: dict[str, Any], params: SamplingParams) -> tuple[Any, SamplingParams]:
        """(prompt, its sampling parameters); the line's id goes into the record."""
        try:
            content = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"line {line.number} is not JSON: {error}") from error
        if isinstance(content, str):
            content = {"prompt": content}
        if not isinstance(content, dict):
            raise ConfigError(f"line {line.number} must be a string or an object")
        if "id" in content:
            record["id"] = content["id"]
        given = [kind for kind in KINDS if kind in content]
        unknown = set(content) - {*KINDS, "id", "params"}
        if len(given) != 1 or unknown:
            raise ConfigError(
                f"line {line.number} has the fields {sorted(content)}; it takes one of "
                f"{', '.join(KINDS)}, and perhaps id and params"
            )
        prompt = content[given[0]]
        if not isinstance(prompt, str if given[0] == "prompt" else list) or not prompt:
            raise ConfigError(f"line {line.number}: {given[0]} is empty or of the wrong type")
        if content.get("params"):
            names = {f.name for f in dataclasses.fields(SamplingParams)}
            base = {name: getattr(params, name) for name in names}
            params = SamplingParams.from_dict({**base, **content["params"]})
        return prompt, params

    def _write(self, out: IO[str], line: Line, record: dict[str, Any]) -> None:
        if "error" in record:
            self._num_failed += 1
            print(f"minirksc: line {line.number}: {record['error']}", file=sys.stderr)
        out.write(to_json({"line": line.number, "input_hash": line.digest, **record}) + "\n")
        self._done.add(line.number)

    def _read_target(self) -> set[int]:
        """Numbers of the lines that have results; a torn last result is cut off."""
        try:
            self.target.touch()
            with self.target.open("rb+") as file:
                raw = file.read()
                whole = raw.rfind(b"\n") + 1
                file.truncate(whole)
        except OSError as error:
            raise ConfigError(f"--output {self.target} cannot be written: {error}") from error
        digests = {line.number: line.digest for line in self.lines}
        done = set()
        for place, text in enumerate(raw[:whole].splitlines(), start=1):
            try:
                record = json.loads(text)
                number, digest = record["line"], record["input_hash"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"--output {self.target} exists and its line {place} is no result of this program; "
                    "choose another file"
                ) from error
            if digests.get(number) != digest:
                raise ConfigError(
                    f"--output {self.target} has a result for another line {number} than --input has now; "
                    "choose another file, or restore the input"
                )
            self._num_failed += "error" in record
            done.add(number)
        return done

    @contextlib.contextmanager
    def _explain_interruption(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            print(
                f"\nminirksc: {len(self._done)} of {len(self.lines)} done and kept in {self.target}; "
                "the same command goes on from there",
                file=sys.stderr,
            )
            raise
