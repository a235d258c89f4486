"""What the command line reads: one prompt, or JSONL with many, and then JSONL out, resumable.

An input line is a JSON string, or an object with `prompt`, `messages` or `prompt_token_ids`, perhaps an `id`, sampling
values under `params`, and a `salt` (`cache_salt`) that keeps what is cached of it from lines with another one. Its
result carries the line's number and a hash of its text: a run that was interrupted goes on where it was, and a changed
input is not mistaken for the old one. Results are in the order of the input. A line without a seed of its own gets one
that follows from its number, so that equal prompts give independent samples, the same in an interrupted run.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from minirksc.cli.files import read_jsonl
from minirksc.cli.output import generation_as_dict, solve_as_dict, to_json
from minirksc.cli.resumable import GrowingFile
from minirksc.cli.strict_json import strict_json
from minirksc.cli.terminal import note, shortened
from minirksc.errors import ConfigError, MinirkscError
from minirksc.options import SamplingParams

if TYPE_CHECKING:
    from minirksc.llm import LLM

Solve: TypeAlias = Callable[["LLM", Any, str | None, int], Any]
"""Solver of one problem: model, problem, salt and seed in, its `SolveResult` out."""

CHUNK = 32
"""Number of prompts that are batched together: what an interruption can lose."""

MAX_INPUT_BYTES = 1 << 30
SALTS = ("salt", "cache_salt")
BEGIN = b'{"line": '
"""Beginning of every result."""


class Line(NamedTuple):
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


@dataclass(frozen=True)
class Preparer:
    """Turns a prompt into what an LLM or a solver takes.

    Attributes:
        llm: model whose tokenizer and chat template are used.
        chat: whether to use the template; None: if there is one.
        system: message for conversations that do not begin with one.
        keep_text: whether text stays as it is: the solver has its own use for the template.
        default_max_tokens: number of tokens that nobody asked for, so that as many as fit will do; None: somebody did.
        template_kwargs: variables for the chat template; `tools` among them.

    Raises:
        MinirkscError: The checkpoint lacks the chat template that the options need.
    """

    llm: "LLM"
    chat: bool | None
    system: str | None
    keep_text: bool
    default_max_tokens: int | None
    template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        needed_by = "--chat" if self.chat else "--system" if self.system else None
        needed_by = needed_by or ("--chat-template-kwargs" if self.template_kwargs else None)
        if needed_by and not self._has_template:
            raise ConfigError(f"{needed_by} needs a chat template, and {self.llm.model_path} has none; use --no-chat")

    def __call__(self, kind: str, prompt: Any, params: SamplingParams) -> tuple[Any, SamplingParams]:
        """(text or token ids, sampling parameters) for a prompt of one of `KINDS`.

        Raises:
            MinirkscError: It needs a tokenizer or a chat template that is not there, or the template refuses it.
        """
        if kind == "prompt" and self.keep_text:
            return prompt, params
        token_ids = self._token_ids(kind, prompt)
        max_model_len = self.llm.config.max_model_len
        if max_model_len is not None and params.max_tokens == self.default_max_tokens is not None:
            room = max(1, params.min_tokens, max_model_len - len(token_ids))
            params = replace(params, max_tokens=min(self.default_max_tokens, room))
        return token_ids, params

    @property
    def _has_template(self) -> bool:
        return self.llm.tokenizer is not None and self.llm.tokenizer.has_chat_template

    def _token_ids(self, kind: str, prompt: Any) -> list[int]:
        if kind == "prompt_token_ids":
            return list(prompt)
        tokenizer = self.llm.need_tokenizer("text")
        if kind == "prompt" and not (self._has_template if self.chat is None else self.chat):
            return tokenizer.encode(prompt)
        if self.chat is False:
            raise ConfigError("messages need the chat template; leave out --no-chat")
        messages = [{"role": "user", "content": prompt}] if kind == "prompt" else prompt
        if self.system and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        kwargs = dict(self.template_kwargs or {})
        return tokenizer.encode_chat(messages, tools=kwargs.pop("tools", None), chat_template_kwargs=kwargs)


class Batch(GrowingFile):
    """An input file and the results that exist already; a context manager, for no other run may write meanwhile.

    Args:
        source: JSONL file of prompts.
        target: JSONL file of results, new or from an earlier run on the same input.

    Attributes:
        todo: lines without a result.

    Raises:
        ConfigError: A file cannot be read or written, the target is from another input, or another run writes it.
    """

    def __init__(self, source: Path, target: Path) -> None:
        _, raw_lines = read_jsonl(source, MAX_INPUT_BYTES, "--input")
        lines = [_line(number, raw) for number, raw in raw_lines]
        self._heads = {line.number: line.head for line in lines}
        self._done: set[int] = set()
        self._num_failed = 0
        super().__init__(target, "--output")
        try:
            if source.samefile(target):
                raise ConfigError(f"--input and --output are the same file, {target}; choose another output")
            self._num_valid_bytes = self.read(self._take, BEGIN)
        except BaseException:
            self.close()
            raise
        self.todo = [line for line in lines if line.number not in self._done]

    def run(self, llm: "LLM", params: SamplingParams, prepare: Preparer, solve: "Solve | None") -> None:
        """Does what is still to be done.

        Args:
            llm: model that runs it.
            params: values for lines that do not override them; the seed of a line follows from theirs.
            prepare: callback that turns a prompt into what `llm` or `solve` takes.
            solve: callback that solves one problem, given its salt and seed; None generates.
        """
        from minirksc.engine.sampling import derived_seed

        def add_results(lines: Sequence[Line]) -> Iterator[None]:
            own = [replace(params, seed=derived_seed(params.seed or 0, line.number)) for line in lines]
            for line, record in zip(lines, _records(llm, lines, own, prepare, solve), strict=True):
                # The head is written apart, since it is what a torn result is recognised by.
                self.add(line.head + to_json(record).encode().removeprefix(b"{") + b"\n")
                if "error" in record:
                    self._num_failed += 1
                    note(f"line {line.number}: {record['error']}")
                yield

        self.truncate(self._num_valid_bytes)  # a result that was torn off
        chunk = 1 if solve else CHUNK
        self.fill(self.todo, len(self._heads), add_results, chunk=chunk, unit="prompt", state="done and kept in")

    def report(self) -> int:
        """Says how many lines failed, of all runs on this target; returns the exit code."""
        if self._num_failed:
            note(
                f"{self._num_failed} of {len(self._heads)} lines failed; see `error` in {self.path}, "
                "and remove those results to try again"
            )
        return 1 if self._num_failed else 0

    def _take(self, place: int, text: bytes) -> None:
        """Notes of which line a line of the target is the result."""
        if not text.endswith(b"\n"):
            if not any(head.startswith(text) or text.startswith(head) for head in self._heads.values()):
                raise self._foreign(place)
            return
        try:
            record = json.loads(text)
            number = record["line"]
            if not (isinstance(number, int) and isinstance(record["input_hash"], str)):
                raise TypeError("line or input_hash is of another type")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._foreign(place) from error
        if number not in self._heads or not text.startswith(self._heads[number]):
            raise ConfigError(
                f"--output {self.path} has a result for another line {number} than --input has now; "
                "choose another file, or restore the input"
            )
        self._num_failed += "error" in record
        self._done.add(number)

    def _foreign(self, place: int) -> ConfigError:
        return ConfigError(
            f"--output {self.path} exists and its line {place} is no result of this program; choose another file"
        )


def _line(number: int, raw: bytes) -> Line:
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return Line(number, raw, f'{{"line": {number}, "input_hash": "{digest}", '.encode())


def _records(
    llm: "LLM", lines: Sequence[Line], own_params: Sequence[SamplingParams], prepare: Preparer, solve: Solve | None
) -> list[dict[str, Any]]:
    """What each line gave: solved one by one, or generated together."""
    records: list[dict[str, Any]] = [{} for _ in lines]
    jobs: list[tuple[dict[str, Any], Any, SamplingParams]] = []
    for line, own, record in zip(lines, own_params, records, strict=True):
        with _failing_alone(record):
            task = _parse(line.raw, record)
            if solve and task.params is not None:
                raise ConfigError("params in a line do not go with --branches")
            prompt, params = prepare(task.kind, task.prompt, _override(own, task.params))
            if solve:
                record.update(solve_as_dict(solve(llm, prompt, task.salt, params.seed or 0)))
            else:
                jobs.append((record, prompt if task.salt is None else _salted(prompt, task.salt), params))
    _complete(llm, jobs)
    return records


def _salted(prompt: str | list[int], salt: str) -> dict[str, Any]:
    return {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, "cache_salt": salt}


def _complete(llm: "LLM", jobs: Sequence[tuple[dict[str, Any], Any, SamplingParams]]) -> None:
    """Puts into each record what its prompt gave; a prompt that breaks the call breaks it for itself alone."""
    failure: dict[str, Any] = {}
    with _failing_alone(failure):
        prompts, params = [job[1] for job in jobs], [job[2] for job in jobs]
        results = llm.generate(prompts, params, return_errors=True) if jobs else []
        for (record, _, _), result in zip(jobs, results, strict=True):
            error = {"error": shortened(str(result.error))}
            record.update(generation_as_dict(result) if result.error is None else error)
    if failure and len(jobs) == 1:
        jobs[0][0].update(failure)
    elif failure:
        for job in jobs:
            _complete(llm, [job])


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
    is_right, allowed = KINDS[given[0]]
    if not is_right(prompt):
        raise ConfigError(f"{given[0]} must be {allowed}")
    if params is not None and not isinstance(params, dict):
        raise ConfigError(f"params must be an object, not {params!r}")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise ConfigError(f"{salts[0]} {salt!r} must be a text that is not empty")
    return Task(given[0], prompt, params, salt)


def _is_list_of(value: Any, kind: type) -> bool:
    """Whether it is a list of at least one value of a type; True and False are no numbers."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(part, kind) and not isinstance(part, bool) for part in value)


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (lambda value: isinstance(value, str) and bool(value.strip()), "a text that is not empty"),
    "messages": (lambda value: _is_list_of(value, dict), 'a list of at least one {"role": ..., "content": ...}'),
    "prompt_token_ids": (lambda value: _is_list_of(value, int), "a list of at least one whole number"),
}
"""Field of a prompt -> what it must be, as a check and in words."""


def _override(params: SamplingParams, values: Mapping[str, Any] | None) -> SamplingParams:
    if values is None:
        return params
    base = dict(vars(params))
    if "max_new_tokens" in values:
        del base["max_tokens"]  # its other name
    # A seed of null is as if it were not there.
    values = {name: value for name, value in values.items() if name != "seed" or value is not None}
    return SamplingParams.from_dict({**base, **values})
