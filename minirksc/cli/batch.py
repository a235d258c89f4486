"""What the command line reads: one prompt, or JSONL with many, and then JSONL out, resumable.

An input line is a JSON string, or an object with `prompt`, `messages` or `prompt_token_ids`, perhaps an `id`, sampling
values under `params`, and a `salt` (`cache_salt`) that keeps what is cached of it from lines with another one. Its
result carries the line's number and a hash of its text: a run that was interrupted goes on where it was, and a changed
input is not mistaken for the old one. Results are in the order of the input. A line without a seed of its own gets one
that follows from its number, so that equal prompts give independent samples, the same in an interrupted run.
"""

import argparse
import contextlib
import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from minirksc.cli.command import UsageError, check_text
from minirksc.cli.files import GrowingFile, check_utf8, read_file
from minirksc.cli.output import generation_as_dict, solve_as_dict, to_json
from minirksc.cli.strict_json import strict_json
from minirksc.cli.terminal import is_terminal, note, shortened
from minirksc.errors import ConfigError, MinirkscError
from minirksc.options import SamplingParams

if TYPE_CHECKING:
    from minirksc.engine.outputs import RequestOutput
    from minirksc.llm import LLM

CHUNK = 32
"""Prompts that are batched together; what an interruption can lose."""

MAX_INPUT_BYTES = 1 << 30
MAX_TEXT_BYTES = 64 << 20
"""Of a prompt from standard input, and of a file with hints or wordings."""

KINDS = ("prompt", "messages", "prompt_token_ids")
SALTS = ("salt", "cache_salt")
BEGIN = b'{"line": '
"""Of every result."""


@dataclass(frozen=True)
class Line:
    """One input line: its number from 1, its bytes, and how its result begins."""

    number: int
    raw: bytes
    head: bytes


class Task(NamedTuple):
    """What a line asks for; `params` are its own, None where it has none."""

    kind: str
    prompt: Any
    params: Mapping[str, Any] | None
    salt: str | None


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
    """An input file and the results that exist already; a context manager, for no other run may write meanwhile.

    Args:
        source: JSONL file.
        target: JSONL file, new or from an earlier run on the same input.

    Attributes:
        todo: lines without a result.

    Raises:
        ConfigError: a file cannot be read or written, the target is from another input, or another run writes it.
    """

    def __init__(self, source: Path, target: Path) -> None:
        raw = read_file(source, MAX_INPUT_BYTES, "--input")
        check_utf8(raw, f"--input {source}")
        raw_lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        self._lines = [_line(number, raw.strip()) for number, raw in enumerate(raw_lines, start=1) if raw.strip()]
        self._target = target
        self._num_failed = 0
        self._num_valid_bytes = 0
        self._out = GrowingFile(target, "--output")
        try:
            if source.samefile(target):
                raise ConfigError(f"--input and --output are the same file, {target}; choose another output")
            done = self._read_target()
        except BaseException:
            self._out.close()
            raise
        self.todo = deque(line for line in self._lines if line.number not in done)

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *exception: object) -> None:
        self._out.close()

    def run(
        self,
        llm: "LLM",
        params: SamplingParams,
        prepare: Preparer,
        solve: Callable[["LLM", Any, str | None, int], Any] | None,
    ) -> None:
        """Does what is left.

        Args:
            llm: runs it.
            params: for lines that do not override them; the seeds of lines follow from theirs.
            prepare: turns a prompt into what `llm` or `solve` takes.
            solve: solves one problem, given its salt and seed; None generates.
        """
        from tqdm import tqdm

        from minirksc.engine.sampling import derived_seed

        size, total = 1 if solve else CHUNK, len(self._lines)
        with self._explain_end():
            self._out.truncate(self._num_valid_bytes)  # a result that was torn off
            with tqdm(
                total=total, initial=total - len(self.todo), unit="prompt", disable=not is_terminal(sys.stderr)
            ) as bar:
                while self.todo:
                    chunk = [
                        (line, replace(params, seed=derived_seed(params.seed or 0, line.number)))
                        for line in islice(self.todo, size)
                    ]
                    if solve:
                        records = [self._solve(llm, *chunk[0], prepare, solve)]
                    else:
                        records = self._generate(llm, chunk, prepare)
                    for (line, _), record in zip(chunk, records, strict=True):
                        self._write(line, record)
                        bar.update()
                    self._out.sync()

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
        self, llm: "LLM", chunk: list[tuple[Line, SamplingParams]], prepare: Preparer
    ) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = [{} for _ in chunk]
        jobs: list[tuple[dict[str, Any], Any, SamplingParams]] = []
        for (line, params), record in zip(chunk, records, strict=True):
            with _failing_alone(record):
                task = _parse(line.raw, record)
                prompt, own = prepare(task.kind, task.prompt, _override(params, task.params))
                jobs.append((record, prompt if task.salt is None else _salted(prompt, task.salt), own))
        _complete(llm, jobs)
        return records

    def _solve(
        self,
        llm: "LLM",
        line: Line,
        params: SamplingParams,
        prepare: Preparer,
        solve: Callable[["LLM", Any, str | None, int], Any],
    ) -> dict[str, Any]:
        record: dict[str, Any] = {}
        with _failing_alone(record):
            task = _parse(line.raw, record)
            if task.params is not None:
                raise ConfigError("params in a line do not go with --branches")
            problem, _ = prepare(task.kind, task.prompt, params)
            record.update(solve_as_dict(solve(llm, problem, task.salt, params.seed or 0)))
        return record

    def _write(self, line: Line, record: dict[str, Any]) -> None:
        # The head is written apart, since it is what a torn result is recognised by.
        self._out.add(line.head + to_json(record).encode().removeprefix(b"{") + b"\n")
        self.todo.popleft()
        if "error" in record:
            self._num_failed += 1
            note(f"line {line.number}: {record['error']}")

    def _read_target(self) -> set[int]:
        """Numbers of the lines that have results."""
        heads = {line.number: line.head for line in self._lines}
        done: set[int] = set()
        try:
            with self._target.open("rb") as stream:
                for place, text in enumerate(_lines_of(stream), start=1):
                    if text.endswith(b"\n"):
                        done.add(self._done(place, text, heads))
                        self._num_valid_bytes += len(text)
                    elif not any(head.startswith(text) or text.startswith(head) for head in heads.values()):
                        raise self._foreign(place)
        except OSError as error:
            raise ConfigError(f"--output {self._target} cannot be read: {error.strerror}") from error
        return done

    def _done(self, place: int, text: bytes, heads: Mapping[int, bytes]) -> int:
        """The number of the line that a line of the target is the result of."""
        try:
            record = json.loads(text)
            number = record["line"]
            is_ours = isinstance(number, int) and isinstance(record["input_hash"], str)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._foreign(place) from error
        if not is_ours:
            raise self._foreign(place)
        if number not in heads or not text.startswith(heads[number]):
            raise ConfigError(
                f"--output {self._target} has a result for another line {number} than --input has now; "
                "choose another file, or restore the input"
            )
        self._num_failed += "error" in record
        return int(number)

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


def read_lines(path: Path, what: str) -> list[str]:
    """The non-empty lines of a text file.

    Args:
        path: of the file.
        what: it is, for messages.

    Raises:
        ConfigError: it cannot be read.
    """
    raw = read_file(path, MAX_TEXT_BYTES, what)
    return [line for line in _text(raw, f"{what} {path}").split("\n") if line.strip()]


def json_object(text: str) -> dict[str, Any]:
    """The object that a text is in JSON; the type of an option for argparse.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        check_text("its text", text)
        content = strict_json(text.encode())
    except (ValueError, UsageError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object, such as {{"enable_thinking": false}}')
    return content


def read_stdin() -> str:
    """Standard input, as UTF-8 whatever the locale says, without its last line break.

    Raises:
        ConfigError: it is closed, cannot be read, is too long, or not UTF-8.
    """
    if sys.stdin is None:
        raise ConfigError("standard input is closed; give a PROMPT")
    try:
        raw = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"standard input cannot be read: {error}; give a PROMPT") from error
    if len(raw) > MAX_TEXT_BYTES:
        raise ConfigError(f"standard input has more than {MAX_TEXT_BYTES} bytes; give a prompt that a model can hold")
    return _text(raw, "standard input").removesuffix("\n").removesuffix("\r")


def _text(raw: bytes, what: str) -> str:
    check_utf8(raw, what)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text: {error}") from error


def _line(number: int, raw: bytes) -> Line:
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return Line(number, raw, f'{{"line": {number}, "input_hash": "{digest}", '.encode())


def _lines_of(stream: BinaryIO) -> Iterator[bytes]:
    """Lines of a file of results; of one that is none, no more than its first bytes."""
    while text := stream.readline(len(BEGIN)):
        yield text + (stream.readline() if text == BEGIN else b"")


def _salted(prompt: str | list[int], salt: str) -> dict[str, Any]:
    return {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, "cache_salt": salt}


def _complete(llm: "LLM", jobs: Sequence[tuple[dict[str, Any], Any, SamplingParams]]) -> None:
    """Puts into each record what its prompt gave; a prompt that breaks the call breaks it for itself alone."""
    if len(jobs) == 1:
        ((record, prompt, params),) = jobs
        with _failing_alone(record):
            (result,) = llm.generate([prompt], [params], return_errors=True)
            _put(record, result)
        return
    try:
        results = llm.generate([job[1] for job in jobs], [job[2] for job in jobs], return_errors=True) if jobs else []
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        for job in jobs:
            _complete(llm, [job])
        return
    for (record, _, _), result in zip(jobs, results, strict=True):
        _put(record, result)


def _put(record: dict[str, Any], result: "RequestOutput") -> None:
    record.update(generation_as_dict(result) if result.error is None else {"error": shortened(str(result.error))})


@contextlib.contextmanager
def _failing_alone(record: dict[str, Any]) -> Iterator[None]:
    """A line may hold anything, and none may stop the others: what goes wrong with it goes into its record."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in compiled Rust is no Exception
        unexpected = "" if isinstance(error, MinirkscError) else f"{type(error).__name__}: "
        record["error"] = shortened(f"{unexpected}{error}")


def _parse(raw: bytes, record: dict[str, Any]) -> Task:
    """What a line asks for; its id goes into the record."""
    try:
        content = strict_json(raw)
    except ValueError as error:
        raise ConfigError(f"the line is not JSON: {error}") from error
    if isinstance(content, str):
        content = {"prompt": content}
    if not isinstance(content, dict):
        raise ConfigError("the line must be a string or an object")
    if "id" in content:
        record["id"] = content["id"]
    given = [kind for kind in KINDS if kind in content]
    salts = [name for name in SALTS if name in content]
    if len(given) != 1 or len(salts) > 1 or set(content) - {*KINDS, *SALTS, "id", "params"}:
        names = ", ".join(KINDS)
        raise ConfigError(f"the line has the fields {sorted(content)}; it takes one of {names}, and id, params, salt")
    prompt, params, salt = content[given[0]], content.get("params"), content[salts[0]] if salts else None
    _check_prompt(given[0], prompt)
    if params is not None and not isinstance(params, dict):
        raise ConfigError(f"params must be an object, not {params!r}")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise ConfigError(f"{salts[0]} {salt!r} must be a text that is not empty")
    return Task(given[0], prompt, params, salt)


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


def _override(params: SamplingParams, values: Mapping[str, Any] | None) -> SamplingParams:
    if values is None:
        return params
    base = {field.name: getattr(params, field.name) for field in fields(SamplingParams)}
    if values.get("seed", 0) is None:  # as if it were not there
        values = {name: value for name, value in values.items() if name != "seed"}
    if "max_new_tokens" in values:
        del base["max_tokens"]  # its other name
    return SamplingParams.from_dict({**base, **values})
