"""Command line: `python -m minirksc.generate [PROMPT | -]`.

Text and JSON go to stdout, everything else to stderr. Exit codes: 0, 1 when something failed, 2 for a wrong
command line, 130 when interrupted. Whatever can be checked is checked before the model is loaded.
"""

import argparse
import difflib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minirksc.cli import batch as cli_batch
from minirksc.cli import files as cli_files
from minirksc.cli import output as cli_output
from minirksc.cli.command import CommandParser, UsageError, check_text, run_command
from minirksc.cli.interrupts import importing
from minirksc.cli.strict_json import json_object
from minirksc.cli.terminal import check_stdout, is_terminal, note
from minirksc.errors import ConfigError
from minirksc.options import (
    BACKENDS,
    DTYPES,
    EVICTIONS,
    KV_CACHE_DTYPES,
    KV_SPLITS,
    QUANTIZATIONS,
    EngineConfig,
    SamplingParams,
)
from minirksc.rksc.answers import ANSWER_KINDS, SELECT_RULES
from minirksc.rksc.gates_file import MAX_FILE_BYTES, read_gates_file, settings_of
from minirksc.rksc.solver import DEFAULT_SAMPLING, MAX_BRANCHES, Solver, SolverConfig
from minirksc.version import __version__

if TYPE_CHECKING:
    from minirksc.llm import LLM

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_MAX_TOKENS = 512
DEFAULT_TOKENS_PER_STEP = 160
"""More than `SolverConfig`'s: an answer that is cut off is of no use to a person, and a short one ends by itself."""
SPIN_COUNT = "10000"
"""How often a waiting thread of OpenMP looks for work before it sleeps. That outlasts what lies between two operations;
GCC's own count, 30 times as large, has threads that wait keep the CPU from those that are waited for, wherever another
process is busy."""

Options = dict[str, tuple[type | tuple[str, ...], str]]
"""Name of a field of a config -> (its type or its choices, help)."""

SAMPLING: Options = {
    "max_tokens": (int, f"most new tokens (default: {DEFAULT_MAX_TOKENS}, or what the model's length leaves)"),
    "temperature": (float, "how freely to choose; 0 takes the likeliest token"),
    "top_p": (float, "of the likeliest tokens, as many as sum up to this probability"),
    "top_k": (int, "of the N likeliest tokens; 0: of all"),
    "min_p": (float, "of tokens at least this fraction as likely as the likeliest"),
    "repetition_penalty": (float, "above 1: against tokens of the prompt and the text"),
    "presence_penalty": (float, "-2 to 2, against tokens that the text has"),
    "frequency_penalty": (float, "-2 to 2, against them, for each time"),
    "seed": (
        int,
        "of the random numbers (default: a fixed one), from which each line of --input has its own",
    ),
    "min_tokens": (int, "no end before so many tokens"),
    "n": (int, "samples of the prompt (default: 1)"),
    "logprobs": (int, "report the N likeliest tokens of each position; with --json or --input"),
}
SOLVER: Options = {
    "branches": (int, "solve with N branches decoded together from one shared prompt"),
    "depth": (int, "rounds; the best branches are forked again (default: 1)"),
    "beam": (int, "branches that go on into the next round (default: 2)"),
    "tokens_per_step": (
        int,
        f"most tokens of a branch in a round (default: {DEFAULT_TOKENS_PER_STEP}); x --depth in all",
    ),
    "sharing": (
        ("exact", "semantic", "none"),
        "exact: what begins alike is computed once (default); semantic: also wordings that mean the same; none",
    ),
    "sharing_mode": (("substitute", "aligned"), "semantic: the first wording instead (default), or parts of its KV"),
    "tau": (float, "semantic: least similarity that is accepted (default: as tested for the model)"),
    "verify": (
        ("auto", "always", "never"),
        "ask the model about the answers: as far as gates leave a doubt (default), about each in full, or not",
    ),
    "verify_style": (("append", "standalone"), "after the branch (default), or as a prompt of its own"),
    "policy": (("rksc", "paper"), "gates: ours (default), or every published rule and constant"),
    "decode_exit": (
        ("auto", "off", "keep_leader", "stop_all"),
        "once a branch leads decisively: go on, the others stop (default), or all stop and are cut off",
    ),
    "select": (SELECT_RULES, "which branch is the answer (default: score)"),
    "answer_parser": (ANSWER_KINDS, "what an answer looks like (default: auto)"),
}
ENGINE: Options = {
    "dtype": (DTYPES, "numbers to compute in (default: auto)"),
    "device": (str, "auto, cpu, cuda or cuda:N (default: auto)"),
    "backend": (BACKENDS, "which kernels (default: auto)"),
    "threads": (int, "of the CPU (default: one a physical core that the process may use)"),
    "kv_cache_bytes": (str, "bytes, or for example 2GiB (default: from free memory)"),
    "kv_cache_dtype": (KV_CACHE_DTYPES, "int8: less memory, approximate (default: auto, the model's)"),
    "quantize": (QUANTIZATIONS, "int8: matrices of 8 bits, faster, approximate (default: none)"),
    "block_size": (int, "tokens a KV block (default: 16)"),
    "max_model_len": (int, "longest sequence (default: the model's)"),
    "max_batch_tokens": (int, "tokens computed in one step (default: 2048)"),
    "kv_split": (KV_SPLITS, "how a GPU's programs share long contexts (default: fixed, whatever else is in the batch)"),
    "eviction": (EVICTIONS, "which cached block goes first (default: rksc)"),
}
SWITCHES = ("chat", "json", "stats", "ignore_eos", "enforce_eager", "uncalibrated")
SOLVER_FILES = ("hints", "phrasings", "gates", "uncalibrated", "trace")
WITHOUT_SOLVER = {
    "n": "--branches says how many",
    "logprobs": "leave one out",
    "max_tokens": "use --tokens-per-step",
    "system": "put it into the problem",
    "chat_template_kwargs": "the solver uses the template as it is",
}

EPILOG = """examples:
  python -m minirksc.generate "Name three rivers."
  python -m minirksc.generate --branches 8 "A train covers 120 km in 2 hours. How far does it get in 5?"
  python -m minirksc.generate --input prompts.jsonl --output answers.jsonl --temperature 0

Every flag can be given in the environment too, as MINIRKSC_TOP_P for --top-p (1 or 0 for flags without a value).
The command line wins; an empty variable counts as not set.
"""


class Parser(CommandParser):
    """Takes options from the environment too, and knows what an unknown one may have meant."""

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Options from the command line and the environment; `variables` has the names of the latter.

        Raises:
            UsageError: an option is unknown or its value is not allowed.
        """
        options, unknown = self.parse_known_args(arguments)
        names = [name for name in vars(options) if name != "prompt"]
        if unknown:
            flag = unknown[0].split("=")[0]
            if not flag.startswith("-"):
                raise UsageError(f"unexpected argument {flag!r}; put text with spaces into quotes")
            close = difflib.get_close_matches(flag, ["--no-chat", *map(_flag, names)], n=2)
            raise UsageError(f"unknown option {flag!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
        missing = [name for name in names if getattr(options, name) is None]
        options.variables = [name for name in missing if self._read_variable(options, name)]
        return options

    def _read_variable(self, options: argparse.Namespace, name: str) -> bool:
        """Sets an option from its variable; False if there is none."""
        text = os.environ.get(_variable(name))
        if not text:
            return False
        value: Any = text.lower() in ("1", "true", "yes")
        if name not in SWITCHES:
            try:
                value = getattr(self.parse_known_args([f"{_flag(name)}={text}"])[0], name)
            except UsageError as error:
                raise UsageError(f"{_variable(name)}={text!r}: {error}") from error
        elif not value and text.lower() not in ("0", "false", "no"):
            raise UsageError(f"{_variable(name)}={text!r} must be 1 or 0")
        elif not value and name != "chat":  # only --chat has an opposite
            return False
        setattr(options, name, value)
        return True


def build_parser(prog: str = "python -m minirksc.generate", branches: int | None = None) -> Parser:
    """All options; those that were not given are None.

    Args:
        prog: how it was called.
        branches: where --branches is not given; None: the solver is off then.
    """
    parser = Parser(
        prog=prog,
        usage="%(prog)s [options] [PROMPT | -]",
        description="Generates text, or solves a problem with many branches, on a local model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="text; - or nothing: standard input without its last line break")
    add("--version", action="version", version=f"minirksc {__version__}")
    add("--model", help=f"checkpoint folder or alias (default: {DEFAULT_MODEL})")
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: if there is one)")
    add("--system", metavar="TEXT", help="system message, for conversations that have none of their own")
    kwargs_help = 'variables for the chat template, such as {"enable_thinking": false} or {"tools": [...]}'
    add("--chat-template-kwargs", type=json_object, metavar="JSON", help=kwargs_help)
    add("--json", action="store_true", default=None, help="print one JSON object a prompt")
    add("--stats", action="store_true", default=None, help="print what was done and how fast, to stderr")

    group = parser.add_argument_group("sampling (defaults: the checkpoint's generation_config.json)")
    # The other value here is one that no value of an option contradicts: each is checked alone.
    sampling = partial(SamplingParams, max_tokens=None)
    _add_options(group, SAMPLING, sampling)
    add = group.add_argument
    stop = _checked("stop", str, sampling)
    add("--stop", action="append", type=stop, metavar="TEXT", help="end here; may be repeated")
    add("--ignore-eos", action="store_true", default=None, help="go on after the end token")

    needs = "these need --branches" if branches is None else f"default: {branches} branches"
    group = parser.add_argument_group(f"solver ({needs}; default sampling: temperature 0.8, top-p 0.95)")
    _add_options(group, SOLVER, partial(SolverConfig, branches=MAX_BRANCHES, sharing="semantic"))
    add = group.add_argument
    add("--hints", metavar="FILE", help="how each branch begins, one a line (default: Approach #1: and so on)")
    add("--phrasings", metavar="FILE", help="one wording of the problem a branch, one a line")
    add("--gates", metavar="FILE.json", help="thresholds of the gates, from python -m minirksc.calibrate")
    insist_help = "allow semantic sharing on a model for which no threshold was tested"
    add("--uncalibrated", action="store_true", default=None, help=insist_help)
    add("--trace", metavar="FILE.json|FILE.html", help="write the tree and every decision, as data or as a page")

    add = parser.add_argument_group("batch").add_argument
    add("--input", metavar="FILE.jsonl", help="one prompt a line: text, {prompt}, {messages} or {prompt_token_ids}")
    add("--output", metavar="FILE.jsonl", help="one result a line; an interrupted run goes on where it was")

    group = parser.add_argument_group("engine")
    _add_options(group, ENGINE, partial(EngineConfig, model=DEFAULT_MODEL))
    eager_help = "never record decode steps, neither as CUDA graphs nor as tapes of compiled CPU operations"
    group.add_argument("--enforce-eager", action="store_true", default=None, help=eager_help)
    add_ignored(group)
    return parser


def main(
    arguments: Sequence[str] | None = None,
    make_llm: Callable[..., "LLM"] | None = None,
    prog: str = "python -m minirksc.generate",
    branches: int | None = None,
) -> int:
    """Runs a command line; returns the exit code.

    Args:
        arguments: None for the process's own.
        make_llm: called with the engine's options; None for `LLM`.
        prog: how it was called, for messages.
        branches: where --branches is not given; None: the solver is off then.
    """

    def read() -> Callable[[], int]:
        options = build_parser(prog, branches).parse(arguments)
        options.branches = branches if options.branches is None else options.branches
        return partial(Job(options).run, make_llm or open_llm)

    return run_command(read)


class Job:
    """A checked command line.

    Args:
        options: of `build_parser`.

    Raises:
        UsageError, ConfigError: options contradict each other or are out of range.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.is_solving = options.branches is not None
        self.solver_s: Counter[str] = Counter()  # of all problems so far
        self._check_texts()
        self._check_combinations()
        self.engine_options = self._given(("model", *ENGINE, "enforce_eager")) | ignored(options)
        self.tokens_per_step = options.tokens_per_step or DEFAULT_TOKENS_PER_STEP
        self.params = self._sampling_params()
        self.solver_config = self._solver_config() if self.is_solving else None
        self.phrasings = self._lines_for_branches("phrasings")
        if options.gates is not None:
            cli_files.read_file(
                Path(options.gates), MAX_FILE_BYTES, self._label("gates")
            )  # what it says depends on the model
        if options.trace is not None:
            cli_output.check_trace(Path(options.trace), self._label("trace"))
        self.batch = None if options.input is None else cli_batch.Batch(Path(options.input), Path(options.output))
        self.prompt = "" if self.batch else self._read_prompt()

    def run(self, make_llm: Callable[..., "LLM"]) -> int:
        """Loads the model and does the work; returns the exit code."""
        if self.batch is None:
            check_stdout()
            self._run(make_llm)
            return 0
        with self.batch:
            if self.batch.todo:
                self._run(make_llm)
            return self.batch.report()

    def _run(self, make_llm: Callable[..., "LLM"]) -> None:
        options = self.options
        with make_llm(**self.engine_options) as llm:
            default = None if self.is_solving or options.max_tokens is not None else self.params.max_tokens
            prepare = cli_batch.Preparer(
                llm, options.chat, options.system, self.is_solving, default, options.chat_template_kwargs
            )
            if options.stats:
                cli_output.print_defaults(llm, self.params)
            self._note_gates(llm)
            if self.batch is not None:
                self.batch.run(llm, self.params, prepare, self._solve if self.is_solving else None)
            elif self.is_solving:
                self._run_solver(llm, prepare)
            else:
                self._run_generate(llm, prepare)
            if options.stats:
                cli_output.print_stats(llm.stats(), self.solver_s)

    def _run_generate(self, llm: "LLM", prepare: cli_batch.Preparer) -> None:
        prompt, params = prepare("prompt", self.prompt, self.params)
        if not self.options.json and params.n == 1:
            cli_output.print_stream(llm.stream(prompt, params))
            return
        (result,) = llm.generate([prompt], params, use_tqdm=params.n > 1 and is_terminal(sys.stderr))
        if self.options.json:
            cli_output.print_json(cli_output.generation_as_dict(result, llm.stats()))
        else:
            cli_output.print_samples(result)

    def _run_solver(self, llm: "LLM", prepare: cli_batch.Preparer) -> None:
        problem, _ = prepare("prompt", self.prompt, self.params)
        result = self._solve(llm, problem)
        if self.options.trace is not None:  # first: stdout may fail
            cli_output.write_trace(Path(self.options.trace), result.trace)
        if self.options.json:
            cli_output.print_json(cli_output.solve_as_dict(result))
        else:
            cli_output.print_solve(result)

    def _solve(self, llm: "LLM", problem: Any, salt: str | None = None, seed: int | None = None) -> Any:
        config, salted = self.solver_config, {} if salt is None else {"salt": salt}
        if config is not None and seed is not None:
            config = replace(config, sampling=replace(self.params, seed=seed))
        with cli_output.Progress(enabled=self.batch is None and is_terminal(sys.stderr)) as progress:
            result = Solver(llm, config).solve(problem, self.phrasings, on_event=progress.on_event, **salted)
        self.solver_s.update({name: result.stats[name] for name in ("prefill_s", "decode_s", "verify_s")})
        return result

    def _note_gates(self, llm: "LLM") -> None:
        """Says where the gates' file was made under other settings, so that its promise does not hold."""
        if self.options.gates is not None and self.solver_config is not None:
            file = read_gates_file(self.options.gates, llm.model_path)
            for difference in file.differences(settings_of(self.solver_config, llm)):
                note(f"--gates {self.options.gates}: {difference}; here they count as uncalibrated")

    def _check_texts(self) -> None:
        options = self.options
        check_text("PROMPT", options.prompt or "")
        check_text(self._label("system"), options.system or "")
        for stop in options.stop or ():
            check_text(self._label("stop"), stop)

    def _check_combinations(self) -> None:
        options = self.options
        for name in self._given([*SOLVER, *SOLVER_FILES]) if not self.is_solving else ():
            raise UsageError(f"{self._label(name)} needs --branches")
        for name in self._given(WITHOUT_SOLVER) if self.is_solving else ():
            raise UsageError(f"{self._label(name)} does not go with --branches; {WITHOUT_SOLVER[name]}")
        if options.beam is not None and (options.depth or 1) == 1:
            raise UsageError(f"{self._label('beam')} needs --depth 2 or more: nothing is forked again")
        if options.sharing == "semantic" and options.phrasings is None:
            raise UsageError(f"{self._label('sharing')} semantic compares wordings; give them with --phrasings")
        if options.verify_style is not None and options.verify == "never":
            raise UsageError(f"{self._label('verify_style')} does not go with {self._label('verify')} never")
        for name in ("system", "chat_template_kwargs"):
            if getattr(options, name) and options.chat is False:
                raise UsageError(f"{self._label(name)} does not go with {self._label('chat', '--no-chat')}")
        if options.logprobs is not None and not (options.json or options.input):
            raise UsageError(f"{self._label('logprobs')} needs --json")
        if (options.input is None) != (options.output is None):
            raise UsageError("--input and --output go together")
        for name in self._given(("prompt", "trace", "phrasings")) if options.input is not None else ():
            raise UsageError(f"--input does not go with {'PROMPT' if name == 'prompt' else self._label(name)}")

    def _sampling_params(self) -> SamplingParams:
        values = self._given([*SAMPLING, "stop", "ignore_eos"])
        min_tokens = values.get("min_tokens", 0)
        if not self.is_solving:
            return SamplingParams(**{"max_tokens": max(DEFAULT_MAX_TOKENS, min_tokens), **values})
        if min_tokens > self.tokens_per_step:
            limit = f"--tokens-per-step {self.tokens_per_step}"
            raise UsageError(f"{self._label('min_tokens')} {min_tokens} is more than {limit}")
        # On top of the solver's own: naming a seed must not change the temperature.
        return replace(DEFAULT_SAMPLING, max_tokens=self.tokens_per_step, **values)

    def _solver_config(self) -> SolverConfig:
        values = {**self._given([*SOLVER, "gates", "uncalibrated"]), "tokens_per_step": self.tokens_per_step}
        hints = self._lines_for_branches("hints")
        return SolverConfig(sampling=self.params, hints=hints, chat=self.options.chat is not False, **values)

    def _lines_for_branches(self, name: str) -> list[str] | None:
        """The non-empty lines of the file that an option names, one a branch; None if it was not given."""
        path = getattr(self.options, name)
        if path is None:
            return None
        lines = cli_files.read_lines(Path(path), self._label(name))
        same = next((i for i, line in enumerate(lines) if line in lines[:i]), None)
        if name == "phrasings" and same is not None:
            first = lines.index(lines[same])
            note(f"{self._label(name)} {path}: lines {first + 1} and {same + 1} are the same wording")
        if len(lines) != self.options.branches:
            counts = f"{len(lines)} lines for {self.options.branches} branches"
            raise UsageError(f"{self._label(name)} has {counts}; give one a branch")
        return lines

    def _read_prompt(self) -> str:
        prompt = self.options.prompt
        if prompt == "-" or (prompt is None and not is_terminal(sys.stdin)):
            prompt = cli_files.read_stdin()
        if prompt is None:
            raise UsageError("give a PROMPT, or - to read standard input")
        if not prompt.strip():
            raise UsageError("the prompt is empty")
        return str(prompt)

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self.options, name)) is not None}

    def _label(self, name: str, flag: str = "") -> str:
        """An option as the user gave it: flag or variable."""
        return _variable(name) if name in self.options.variables else flag or _flag(name)


def let_threads_sleep(environ: MutableMapping[str, str]) -> None:
    """Sets how long threads of OpenMP wait, unless the user has; it takes effect before torch is imported."""
    if not environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def open_llm(**options: Any) -> "LLM":
    """An LLM, its warnings as notes; torch is imported here, after everything that can be checked without it."""
    let_threads_sleep(os.environ)
    with importing():
        from minirksc.llm import LLM

    with warnings.catch_warnings(record=True, action="always") as caught:
        llm = LLM(use_tqdm=is_terminal(sys.stderr), **options)
    for warning in caught:  # in the form of everything else on stderr
        note(f"warning: {warning.message}")
    return llm


def add_ignored(group: Any) -> None:
    """Adds the option of which `ignored` is the value."""
    text = "pass over a field of config.json that nothing reads: you know that it changes nothing; may be repeated"
    group.add_argument("--ignore-config-key", action="append", metavar="NAME", help=text)


def ignored(options: argparse.Namespace) -> dict[str, Any]:
    """The engine's option for it; {} where it was not given."""
    names = options.ignore_config_key
    return {} if names is None else {"ignore_config_keys": names}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return "MINIRKSC_" + name.upper()


def _checked(name: str, kind: type, config: Callable[..., object]) -> Callable[[str], Any]:
    """A type for argparse that makes a config of the one value, to check its range."""

    def parse(text: str) -> Any:
        value = kind(text)
        try:
            config(**{name: value})
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    parse.__name__ = kind.__name__  # what argparse calls it in its messages
    return parse


def _add_options(group: Any, table: Options, config: Callable[..., object]) -> None:
    for name, (kind, text) in table.items():
        if isinstance(kind, tuple):
            group.add_argument(_flag(name), choices=kind, help=text)
        else:
            metavar = {int: "N", float: "X"}.get(kind, "TEXT")
            group.add_argument(_flag(name), type=_checked(name, kind, config), metavar=metavar, help=text)
