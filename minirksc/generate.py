"""Command line: `python -m minirksc.generate [PROMPT | -]`.

Text and JSON go to stdout, everything else to stderr. Exit codes: 0, 1 when something failed, 2 for a wrong
command line, 130 when interrupted. Whatever can be checked is checked before the model is loaded.
"""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minirksc import __version__, cli_batch, cli_output
from minirksc.config import BACKENDS, DTYPES, EVICTIONS, EngineConfig, SamplingParams
from minirksc.errors import ConfigError, MinirkscError
from minirksc.solver import Solver, SolverConfig

if TYPE_CHECKING:
    from minirksc.llm import LLM

DEFAULT_MAX_TOKENS = 512
DEFAULT_TOKENS_PER_STEP = 128
"""More than `SolverConfig`'s: a person wants whole answers, and a short one ends by itself."""

SAMPLING_FLAGS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "min_tokens": int,
}
ENGINE_FLAGS: dict[str, dict[str, Any]] = {
    "dtype": {"choices": DTYPES},
    "device": {"metavar": "auto|cpu|cuda[:N]"},
    "backend": {"choices": BACKENDS},
    "threads": {"type": int},
    "kv_cache_bytes": {"metavar": "SIZE", "help": "bytes, or for example 2GiB (default: from free memory)"},
    "block_size": {"type": int, "help": "tokens a KV block (default: 16)"},
    "max_model_len": {"type": int, "help": "longest sequence (default: the model's)"},
    "max_batch_tokens": {"type": int, "help": "tokens computed in one step (default: 2048)"},
    "eviction": {"choices": EVICTIONS, "help": "which cached block goes first (default: rksc)"},
}
SOLVER_RULES = ("depth", "beam", "sharing", "verify", "verify_style", "select")
SOLVER_ONLY = (*SOLVER_RULES, "tokens_per_step", "phrasings", "hints", "trace")
WITHOUT_SOLVER = ("n", "logprobs", "max_tokens")

EPILOG = """examples:
  python -m minirksc.generate "Name three rivers."
  python -m minirksc.generate --branches 8 "A train covers 120 km in 2 hours. How far does it get in 5?"
  python -m minirksc.generate --input prompts.jsonl --output answers.jsonl --temperature 0

Every flag can be given in the environment too, as MINIRKSC_TOP_P for --top-p; the command line wins.
"""


class UsageError(Exception):
    """The command line cannot be carried out as it stands."""


class Parser(argparse.ArgumentParser):
    """Reports errors by exception, and knows what an unknown option may have meant."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError, where argparse would end the process."""
        raise UsageError(message)

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Options from the command line and the environment.

        Raises:
            UsageError: an option is unknown or its value is not allowed.
        """
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=2)
            raise UsageError(
                f"unknown option {unknown[0]!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")
            )
        self._read_environment(options)
        return options

    def _read_environment(self, options: argparse.Namespace) -> None:
        """MINIRKSC_<FLAG> for what the command line leaves open."""
        for action in self._actions:
            variable = "MINIRKSC_" + action.dest.upper()
            if variable not in os.environ or getattr(options, action.dest, None) is not None:
                continue
            value = os.environ[variable]
            if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
                if value.lower() not in ("0", "1", "true", "false", "yes", "no"):
                    raise UsageError(f"{variable}={value!r} must be 1 or 0")
                setattr(options, action.dest, value.lower() in ("1", "true", "yes"))
                continue
            try:
                parsed = self._get_value(action, value)
                self._check_value(action, parsed)
            except argparse.ArgumentError as error:
                raise UsageError(f"{variable}: {error}") from error
            setattr(options, action.dest, [parsed] if action.nargs == "append" else parsed)


def build_parser() -> Parser:
    """All options; those that were not given are None."""
    parser = Parser(
        prog="python -m minirksc.generate",
        description="Generates text, or solves a problem with many branches, on a local model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="text; - or nothing reads standard input")
    add("--version", action="version", version=f"minirksc {__version__}")
    add("--model", help="checkpoint folder or alias (default: smollm2-135m)")
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: if there is one)")
    add("--system", metavar="TEXT", help="system message, with the chat template")
    add("--json", action="store_true", default=None, help="print one JSON object a prompt")
    add("--stats", action="store_true", default=None, help="print what was done and how fast, to stderr")

    group = parser.add_argument_group("sampling (defaults: the checkpoint's generation_config.json)")
    add = group.add_argument
    add(
        "--max-tokens",
        type=int,
        help=f"most new tokens (default: {DEFAULT_MAX_TOKENS}, or what the model's length leaves)",
    )
    for name, kind in SAMPLING_FLAGS.items():
        add(_flag(name), type=kind)
    add("--stop", action="append", metavar="TEXT", help="end the text here; may be repeated")
    add("--ignore-eos", action="store_true", default=None, help="go on after the end token")
    add("--n", type=int, help="samples of the prompt")
    add("--logprobs", type=int, metavar="K", help="report the K likeliest tokens; with --json")

    group = parser.add_argument_group("solver")
    add = group.add_argument
    add("--branches", type=int, metavar="B", help="solve with B branches decoded together from one shared prompt")
    add("--depth", type=int, metavar="D", help="rounds; the best branches are forked again (default: 1)")
    add("--beam", type=int, help="branches that go on into the next round (default: 2)")
    add(
        "--tokens-per-step",
        type=int,
        metavar="T",
        help=f"tokens a branch and round (default: {DEFAULT_TOKENS_PER_STEP})",
    )
    add("--hints", metavar="FILE", help="how each branch begins, one a line (default: Approach #k:)")
    add("--phrasings", metavar="FILE", help="one wording of the problem a branch, one a line")
    add(
        "--sharing",
        choices=("none", "exact"),
        help="exact: the prompt is computed once (default); none: by every branch",
    )
    add("--verify", choices=("always", "never"), help="ask the model about each answer (default: always)")
    add(
        "--verify-style", choices=("append", "standalone"), help="after the branch (default), or as a prompt of its own"
    )
    add("--select", choices=("score", "vote", "weighted_vote"), help="which branch is the answer (default: score)")
    add("--trace", metavar="FILE.json", help="write the tree and every decision")

    group = parser.add_argument_group("batch")
    add = group.add_argument
    add("--input", metavar="FILE.jsonl", help="one prompt a line: text, {prompt}, {messages} or {prompt_token_ids}")
    add("--output", metavar="FILE.jsonl", help="one result a line; an interrupted run goes on where it was")

    group = parser.add_argument_group("engine")
    for name, settings in ENGINE_FLAGS.items():
        group.add_argument(_flag(name), **settings)
    return parser


def main(arguments: Sequence[str] | None = None, make_llm: Callable[..., "LLM"] | None = None) -> int:
    """Runs a command line; returns the exit code.

    Args:
        arguments: None for the process's own.
        make_llm: called with the engine's options; None for `LLM`.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # text must not die on a narrow terminal encoding
    try:
        job = Job(build_parser().parse(arguments))
    except (UsageError, ConfigError) as error:
        print(f"minirksc: error: {error}\n(--help lists the options)", file=sys.stderr)
        return 2
    except MinirkscError as error:
        print(f"minirksc: error: {error}", file=sys.stderr)
        return 1
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    try:
        return job.run(make_llm or _make_llm)
    except KeyboardInterrupt:
        print("minirksc: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough; the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MinirkscError, OSError) as error:
        if os.environ.get("MINIRKSC_DEBUG"):
            traceback.print_exc()
        print(f"minirksc: error: {error}", file=sys.stderr)
        return 1


class Job:
    """A checked command line.

    Args:
        options: of `build_parser`.

    Raises:
        UsageError, ConfigError: options contradict each other or are out of range.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.engine_options = {
            name: getattr(options, name) for name in ENGINE_FLAGS if getattr(options, name) is not None
        }
        EngineConfig(model=options.model or "smollm2-135m", **self.engine_options)
        self.is_solving = options.branches is not None
        self._check_combinations()
        self.params = self._sampling_params()
        self.solver_config = self._solver_config() if self.is_solving else None
        self.phrasings = _lines(options.phrasings) if options.phrasings else None
        if self.phrasings is not None and len(self.phrasings) != options.branches:
            raise UsageError(
                f"--phrasings has {len(self.phrasings)} lines for {options.branches} branches; give one a branch"
            )
        self.batch = None
        if options.input is not None:
            self.batch = cli_batch.Batch(Path(options.input), Path(options.output))
            self.prompt = ""
        else:
            self.prompt = self._read_prompt()

    def run(self, make_llm: Callable[..., "LLM"]) -> int:
        """Loads the model and does the work; returns the exit code."""
        options = self.options
        with make_llm(options.model or "smollm2-135m", **self.engine_options) as llm:
            if options.stats:
                cli_output.print_defaults(llm, self.params)
            if self.batch is not None:
                code = self.batch.run(llm, self.params, self._preparer(llm), self._solve if self.is_solving else None)
            elif self.is_solving:
                code = self._run_solver(llm)
            else:
                code = self._run_generate(llm)
            if options.stats:
                cli_output.print_stats(llm.stats())
        return code

    def _run_generate(self, llm: "LLM") -> int:
        prompt, params = self._preparer(llm)(self.prompt, self.params)
        if self.options.json or params.n > 1:
            (result,) = llm.generate([prompt], params)
            if self.options.json:
                cli_output.print_json(cli_output.generation_as_dict(result, llm.stats()))
            else:
                cli_output.print_samples(result)
            return 0
        finish_reason = None
        for chunk in llm.stream(prompt, params):
            print(chunk.text, end="", flush=True)
            finish_reason = chunk.finish_reason
        print(flush=True)
        if finish_reason == "length":
            print(f"minirksc: cut at {params.max_tokens} tokens (--max-tokens)", file=sys.stderr)
        return 0

    def _run_solver(self, llm: "LLM") -> int:
        result = self._solve(llm, self.prompt)
        if self.options.trace:
            cli_output.write_json(Path(self.options.trace), result.trace)
        if self.options.json:
            cli_output.print_json(cli_output.solve_as_dict(result))
        else:
            cli_output.print_solve(result)
        return 0

    def _solve(self, llm: "LLM", problem: Any) -> Any:
        show = cli_output.Progress(enabled=self.batch is None and sys.stderr.isatty())
        with show:
            return Solver(llm, self.solver_config).solve(problem, self.phrasings, on_event=show.on_event)

    def _preparer(self, llm: "LLM") -> cli_batch.Prepare:
        """What turns a prompt into what the LLM or the solver takes."""
        has_template = llm.tokenizer is not None and llm.tokenizer.has_chat_template
        wants_chat = has_template if self.options.chat is None else self.options.chat
        if self.options.system and not wants_chat:
            raise ConfigError("--system needs a chat template; the checkpoint has none, or --no-chat was given")
        system = [{"role": "system", "content": self.options.system}] if self.options.system else []

        def prepare(prompt: Any, params: SamplingParams) -> tuple[Any, SamplingParams]:
            if isinstance(prompt, str):
                if self.is_solving:
                    return prompt, params  # the solver has its own use for the chat template
                tokenizer = llm.need_tokenizer("text")
                if wants_chat:
                    prompt = tokenizer.encode_chat([*system, {"role": "user", "content": prompt}])
                else:
                    prompt = tokenizer.encode(prompt)
            elif prompt and isinstance(prompt[0], dict):
                prompt = llm.need_tokenizer("a conversation").encode_chat(prompt)
            if self.options.max_tokens is None and params.max_tokens == self.params.max_tokens:
                # Nobody asked for so many: as many as fit will do.
                room = (llm.config.max_model_len or DEFAULT_MAX_TOKENS) - len(prompt)
                params = replace(params, max_tokens=max(1, params.min_tokens, min(DEFAULT_MAX_TOKENS, room)))
            return prompt, params

        return prepare

    def _check_combinations(self) -> None:
        options = self.options
        given = [name for name in SOLVER_ONLY if getattr(options, name) is not None]
        if given and not self.is_solving:
            raise UsageError(f"{_flag(given[0])} needs --branches")
        clash = [name for name in WITHOUT_SOLVER if getattr(options, name) is not None]
        if self.is_solving and clash:
            remedy = "use --tokens-per-step" if clash[0] == "max_tokens" else "leave one out"
            raise UsageError(f"{_flag(clash[0])} does not go with --branches; {remedy}")
        if self.is_solving and options.system:
            raise UsageError("--system does not go with --branches; put it into the problem")
        if options.logprobs is not None and not (options.json or options.input):
            raise UsageError("--logprobs needs --json")
        if (options.input is None) != (options.output is None):
            raise UsageError("--input and --output go together")
        if options.input is not None and (options.prompt or options.trace or options.phrasings):
            raise UsageError("--input does not go with PROMPT, --trace or --phrasings")

    def _sampling_params(self) -> SamplingParams:
        options = self.options
        values: dict[str, Any] = {
            name: getattr(options, name)
            for name in (*SAMPLING_FLAGS, "stop", "ignore_eos", "n", "logprobs")
            if getattr(options, name) is not None
        }
        if not self.is_solving:
            default = max(DEFAULT_MAX_TOKENS, values.get("min_tokens", 0))
            values["max_tokens"] = default if options.max_tokens is None else options.max_tokens
        return SamplingParams(**values)

    def _solver_config(self) -> SolverConfig:
        options = self.options
        values = {name: getattr(options, name) for name in SOLVER_RULES if getattr(options, name) is not None}
        given = any(getattr(options, name) is not None for name in (*SAMPLING_FLAGS, "stop", "ignore_eos"))
        return SolverConfig(
            branches=options.branches,
            tokens_per_step=options.tokens_per_step or DEFAULT_TOKENS_PER_STEP,
            hints=_lines(options.hints) if options.hints else None,
            sampling=self.params if given else None,
            chat=options.chat is not False,
            **values,
        )

    def _read_prompt(self) -> str:
        prompt = self.options.prompt
        if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
            prompt = _read_stdin()
        if prompt is None:
            raise UsageError("give a PROMPT, or - to read standard input")
        if not prompt.strip():
            raise UsageError("the prompt is empty")
        return str(prompt)


def _make_llm(model: str, **options: Any) -> "LLM":
    from minirksc.llm import LLM  # torch is imported here, after everything that can be checked without it

    return LLM(model, **options)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_stdin() -> str:
    """All of standard input, as UTF-8 whatever the locale says."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 text: {error}") from error


def _lines(path: str) -> list[str]:
    """The non-empty lines of a text file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    return [line for line in text.splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
