"""What the command line reads: one prompt, or JSONL with many, and then JSONL out, resumable.

An input line is a JSON string, or an object with `prompt`, `messages` or `prompt_token_ids`, perhaps an `id` and
sampling values under `params`. Its result carries the line's number and a hash of its text: a run that was
interrupted goes on where it was, and a changed input is not mistaken for the old one. Results are in the order of
the input.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from minirksc.cli_output import check_writable, generation_as_dict, is_terminal, note, solve_as_dict, to_json
from minirksc.config import SamplingParams
from minirksc.errors import ConfigError, MinirkscError

if TYPE_CHECKING:
    from minirksc.llm import LLM

CHUNK = 32
"""Prompts that are batched together; what an interruption can lose."""

KINDS = ("prompt", "messages", "prompt_token_ids")


@dataclass(frozen=True)
class Line:
    """One input line: its number from 1, its bytes, and how its result begins."""

    number: int
    raw: bytes
    head: bytes


class Preparer:
    """Turns a prompt into what an LLM or a solver takes.

    Args:
        llm: whose tokenizer and chat template are used.
        chat: use the template; None: if there is one.
        system: message for conversations that do not begin with one.
        keep_text: leave text as it is: the solver has its own use for the template.
        default_max_tokens: nobody asked for so many, so as many as fit will do; None: somebody did.
        template_kwargs: variables for the chat template; `tools` among them.

    Raises:
        MinirkscError: the checkpoint lacks the chat template that the options need.
    """

    def __init__(
        self,
        llm: "LLM",
        chat: bool | None,
        system: str | None,
        keep_text: bool,
        default_max_tokens: int | None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        has_template = llm.tokenizer is not None and llm.tokenizer.has_chat_template
        needed_by = "--chat" if chat else "--system" if system else None
        needed_by = needed_by or ("--chat-template-kwargs" if template_kwargs else None)
        if needed_by and not has_template:
            raise ConfigError(f"{needed_by} needs a chat template, and {llm.model_path} has none; use --no-chat")
        self._llm = llm
        self._chat = chat
        self._wraps_text = has_template if chat is None else chat
        self._system = [{"role": "system", "content": system}] if system else []
        self._keep_text = keep_text
        self._default_max_tokens = default_max_tokens
        self._template_kwargs = dict(template_kwargs or {})
        self._tools = self._template_kwargs.pop("tools", None)

    def __call__(self, kind: str, prompt: Any, params: SamplingParams) -> tuple[Any, SamplingParams]:
        """(text or token ids, sampling parameters) for a prompt of one of `KINDS`.

        Raises:
            MinirkscError: it needs a tokenizer or a chat template that is not there, or the template refuses it.
        """
        if kind == "prompt" and self._keep_text:
            return prompt, params
        token_ids = self._token_ids(kind, prompt)
        max_model_len = self._llm.config.max_model_len
        if max_model_len is not None and params.max_tokens == self._default_max_tokens is not None:
            room = max(1, params.min_tokens, max_model_len - len(token_ids))
            params = replace(params, max_tokens=min(self._default_max_tokens, room))
        return token_ids, params

    def _token_ids(self, kind: str, prompt: Any) -> list[int]:
        if kind == "prompt_token_ids":
            return list(prompt)
        tokenizer = self._llm.need_tokenizer("text")
        if kind == "prompt" and not self._wraps_text:
            return tokenizer.encode(prompt)
        if self._chat is False:
            raise ConfigError("messages need the chat template; leave out --no-chat")
        messages = [{"role": "user", "content": prompt}] if kind == "prompt" else prompt
        own_system = messages[0].get("role") == "system"
        return tokenizer.encode_chat(
            [*(() if own_system else self._system), *messages],
            tools=self._tools,
            chat_template_kwargs=self._template_kwargs,
        )


class Batch:
    """An input file and the results that exist already.

    Args:
        source: JSONL file.
        target: JSONL file, new or from an earlier run on the same input.

    Attributes:
        todo: lines without a result.

    Raises:
        ConfigError: a file cannot be read or written, or the target is from another input.
    """

    def __init__(self, source: Path, target: Path) -> None:
        try:
            raw_lines = source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        except OSError as error:
            raise ConfigError(f"--input {source} cannot be read: {error}") from error
        if target.exists() and source.samefile(target):
            raise ConfigError(f"--input and --output are the same file, {target}; choose another output")
        self._lines = [_line(number, raw.strip()) for number, raw in enumerate(raw_lines, start=1) if raw.strip()]
        self._target = target
        self._num_failed = 0
        self._num_valid_bytes = 0
        done = self._read_target()
        self.todo = deque(line for line in self._lines if line.number not in done)
        try:
            with target.open("ab"):  # that it can be written must be known before a model is loaded
                pass
        except OSError as error:
            raise ConfigError(f"--output {target} cannot be written: {error}") from error

    def run(
        self,
        llm: "LLM",
        params: SamplingParams,
        prepare: Preparer,
        solve: Callable[["LLM", Any], Any] | None,
    ) -> None:
        """Does what is left.

        Args:
            llm: runs it.
            params: for lines that do not override them.
            prepare: turns a prompt into what `llm` or `solve` takes.
            solve: solves one problem; None generates.
        """
        from tqdm import tqdm

        size, total = 1 if solve else CHUNK, len(self._lines)
        with self._target.open("ab") as out, self._explain_end():
            out.truncate(self._num_valid_bytes)  # a result that was torn off
            with tqdm(
                total=total, initial=total - len(self.todo), unit="prompt", disable=not is_terminal(sys.stderr)
            ) as bar:
                while self.todo:
                    chunk = list(islice(self.todo, size))
                    if solve:
                        records = [self._solve(llm, chunk[0], params, prepare, solve)]
                    else:
                        records = self._generate(llm, chunk, params, prepare)
                    for line, record in zip(chunk, records, strict=True):
                        self._write(out, line, record)
                        bar.update()
                    os.fsync(out.fileno())

    def report(self) -> int:
        """Says how many lines failed, of all runs on this target; returns the exit code."""
        if not self._num_failed:
            return 0
        note(
            f"{self._num_failed} of {len(self._lines)} lines failed; see `error` in {self._target}, "
            "and remove those results to try again"
        )
        return 1

    def _generate(
        self, llm: "LLM", chunk: list[Line], params: SamplingParams, prepare: Preparer
    ) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = [{} for _ in chunk]
        jobs = [
            (record, *job)
            for line, record in zip(chunk, records, strict=True)
            if (job := _job(line, record, params, prepare)) is not None
        ]
        results = llm.generate([job[1] for job in jobs], [job[2] for job in jobs], return_errors=True) if jobs else []
        for (record, _, _), result in zip(jobs, results, strict=True):
            record.update(generation_as_dict(result) if result.error is None else {"error": str(result.error)})
        return records

    def _solve(
        self,
        llm: "LLM",
        line: Line,
        params: SamplingParams,
        prepare: Preparer,
        solve: Callable[["LLM", Any], Any],
    ) -> dict[str, Any]:
        record: dict[str, Any] = {}
        job = _job(line, record, params, prepare)
        if job is not None and job[1] is not params:
            record["error"] = "params in a line do not go with --branches"
        elif job is not None:
            try:
                record.update(solve_as_dict(solve(llm, job[0])))
            except MinirkscError as error:
                record["error"] = str(error)
        return record

    def _write(self, out: BinaryIO, line: Line, record: dict[str, Any]) -> None:
        # The head is written apart, since it is what a torn result is recognised by.
        out.write(line.head + to_json(record).encode().removeprefix(b"{") + b"\n")
        out.flush()
        self.todo.popleft()
        if "error" in record:
            self._num_failed += 1
            note(f"line {line.number}: {record['error']}")

    def _read_target(self) -> set[int]:
        """Numbers of the lines that have results."""
        if not self._target.exists():
            check_writable(self._target, "--output")
            return set()
        try:
            raw = self._target.read_bytes() if self._target.is_file() else b"?"
        except OSError as error:
            raise ConfigError(f"--output {self._target} cannot be read: {error}") from error
        *results, rest = raw.split(b"\n")
        if rest and not any(line.head.startswith(rest) or rest.startswith(line.head) for line in self._lines):
            raise self._foreign(len(results) + 1)
        self._num_valid_bytes = len(raw) - len(rest)
        heads = {line.number: line.head for line in self._lines}
        done = set()
        for place, text in enumerate(results, start=1):
            try:
                record = json.loads(text)
                number = record["line"]
                is_ours = isinstance(number, int) and isinstance(record["input_hash"], str)
            except (ValueError, KeyError, TypeError) as error:
                raise self._foreign(place) from error
            if not is_ours:
                raise self._foreign(place)
            if number not in heads or not text.startswith(heads[number]):
                raise ConfigError(
                    f"--output {self._target} has a result for another line {number} than --input has now; "
                    "choose another file, or restore the input"
                )
            self._num_failed += "error" in record
            done.add(number)
        return done

    def _foreign(self, place: int) -> ConfigError:
        return ConfigError(
            f"--output {self._target} exists and its line {place} is no result of this program; choose another file"
        )

    @contextlib.contextmanager
    def _explain_end(self) -> Iterator[None]:
        """Says what an interrupted or failed run leaves behind."""
        try:
            yield
        except BaseException:
            num_done = len(self._lines) - len(self.todo)
            note(
                f"{num_done} of {len(self._lines)} done and kept in {self._target}; "
                "the same command goes on from there",
            )
            raise


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return [line for line in text.split("\n") if line.strip()]


def json_object(text: str) -> dict[str, Any]:
    """The object that a text is in JSON; the type of an option for argparse.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object, such as {{"enable_thinking": false}}')
    return content


def read_stdin() -> str:
    """Standard input, as UTF-8 whatever the locale says, without its last line break.

    Raises:
        ConfigError: it is closed or not UTF-8.
    """
    if sys.stdin is None:
        raise ConfigError("standard input is closed; give a PROMPT")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text: {error}") from error


def _line(number: int, raw: bytes) -> Line:
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return Line(number, raw, f'{{"line": {number}, "input_hash": "{digest}", '.encode())


def _job(
    line: Line, record: dict[str, Any], params: SamplingParams, prepare: Preparer
) -> tuple[Any, SamplingParams] | None:
    """(prompt, its sampling parameters) of a line; None, and why in the record, if it cannot run."""
    try:
        return prepare(*_parse(line.raw, record, params))
    except Exception as error:
        # A line may hold anything, and none may stop the others.
        unexpected = "" if isinstance(error, MinirkscError) else f"{type(error).__name__}: "
        record["error"] = f"{unexpected}{error}"
        return None


def _parse(raw: bytes, record: dict[str, Any], params: SamplingParams) -> tuple[str, Any, SamplingParams]:
    """(kind of prompt, prompt, its sampling parameters); the line's id goes into the record."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the line is not JSON: {error}") from error
    if isinstance(content, str):
        content = {"prompt": content}
    if not isinstance(content, dict):
        raise ConfigError("the line must be a string or an object")
    if "id" in content:
        record["id"] = content["id"]
    given = [kind for kind in KINDS if kind in content]
    if len(given) != 1 or set(content) - {*KINDS, "id", "params"}:
        names = ", ".join(KINDS)
        raise ConfigError(f"the line has the fields {sorted(content)}; it takes one of {names}, and id and params")
    prompt = content[given[0]]
    _check_prompt(given[0], prompt)
    if content.get("params") is not None:
        params = _override(params, content["params"])
    return given[0], prompt, params


def _check_prompt(kind: str, prompt: Any) -> None:
    allowed, item = {
        "prompt": ("a text that is not empty", str),
        "messages": ('a list of at least one {"role": ..., "content": ...}', dict),
        "prompt_token_ids": ("a list of at least one whole number", int),
    }[kind]
    is_right = isinstance(prompt, str) and bool(prompt.strip())
    if kind != "prompt":
        is_right = isinstance(prompt, list) and bool(prompt)
        is_right = is_right and all(isinstance(part, item) and not isinstance(part, bool) for part in prompt)
    if not is_right:
        raise ConfigError(f"{kind} must be {allowed}")


def _override(params: SamplingParams, values: Any) -> SamplingParams:
    if not isinstance(values, dict):
        raise ConfigError(f"params must be an object, not {values!r}")
    base = {field.name: getattr(params, field.name) for field in fields(SamplingParams)}
    if "max_new_tokens" in values:
        del base["max_tokens"]  # its other name
    return SamplingParams.from_dict({**base, **values})
