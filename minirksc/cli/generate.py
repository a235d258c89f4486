"""Command line: `python -m minirksc.generate [PROMPT | -]`.

Text and JSON go to stdout, everything else to stderr. Exit codes: 0, 1 when something failed, 2 for a wrong
command line, 130 when interrupted. Whatever can be checked is checked before the model is loaded.
"""

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minirksc.cli import batch as cli_batch
from minirksc.cli import files as cli_files
from minirksc.cli import output as cli_output
from minirksc.cli.command import UsageError, check_text, run_command
from minirksc.cli.interrupts import importing
from minirksc.cli.parser import Parser, add_options, given, label, names_in
from minirksc.cli.strict_json import json_object
from minirksc.cli.terminal import check_stdout, is_terminal, note
from minirksc.options import EngineConfig, SamplingParams
from minirksc.rksc.gates_file import MAX_FILE_BYTES, read_gates_file, settings_of
from minirksc.rksc.solver import DEFAULT_SAMPLING, Solver, SolverConfig

if TYPE_CHECKING:
    from minirksc.llm import LLM

DEFAULT_MAX_TOKENS = 512
DEFAULT_TOKENS_PER_STEP = 160
"""More than `SolverConfig`'s: an answer that is cut off is of no use to a person, and a short one ends by itself."""
SPIN_COUNT = "10000"
"""How often a waiting thread of OpenMP looks for work before it sleeps. That outlasts what lies between two operations;
GCC's own count, 30 times as large, has threads that wait keep the CPU from those that are waited for, wherever another
process is busy."""

DEFAULTS = {
    "model": "smollm2-135m",
    "max_tokens": f"{DEFAULT_MAX_TOKENS}, or what the model's length leaves",
    "seed": "a fixed one, from which each line of --input has its own",
    "tokens_per_step": str(DEFAULT_TOKENS_PER_STEP),
}
"""Defaults in words of options for which commands have their own."""

SAMPLING = names_in(
    SamplingParams,
    without=(
        "stop_token_ids",
        "include_stop_str_in_output",
        "prompt_logprobs",
        "logit_bias",
        "skip_special_tokens",
        "detokenize",
    ),
)
SOLVER = names_in(SolverConfig, without=("hints", "sampling", "chat"))
SOLVER_FILES = ("hints", "phrasings", "trace")
ENGINE = names_in(EngineConfig, without=("model", "prefix_caching", "seed"))
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


def build_parser(prog: str = "python -m minirksc.generate", branches: int | None = None) -> Parser:
    """All options; those that were not given are None.

    Args:
        prog: name under which it was called.
        branches: number of branches where --branches is not given; None: the solver is off then.
    """
    parser = Parser(
        prog=prog,
        usage="%(prog)s [options] [PROMPT | -]",
        description="Generates text, or solves a problem with many branches, on a local model.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="text; - or nothing: standard input without its last line break")
    add_options(parser, EngineConfig, ["model"], DEFAULTS)
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: if there is one)")
    add("--system", metavar="TEXT", help="system message, for conversations that have none of their own")
    kwargs_help = 'variables for the chat template, such as {"enable_thinking": false} or {"tools": [...]}'
    add("--chat-template-kwargs", type=json_object, metavar="JSON", help=kwargs_help)
    add("--json", action="store_true", default=None, help="print one JSON object a prompt")
    add("--stats", action="store_true", default=None, help="print what was done and how fast, to stderr")

    group = parser.add_argument_group("sampling (defaults: the checkpoint's generation_config.json)")
    add_options(group, SamplingParams, SAMPLING, DEFAULTS)

    needs = "these need --branches" if branches is None else f"default: {branches} branches"
    group = parser.add_argument_group(f"solver ({needs}; default sampling: temperature 0.8, top-p 0.95)")
    add_options(group, SolverConfig, SOLVER, {**DEFAULTS, "branches": str(branches or "the solver is off")})
    add = group.add_argument
    add("--hints", metavar="FILE", help="how each branch begins, one a line (default: Approach #1: and so on)")
    add("--phrasings", metavar="FILE", help="one wording of the problem a branch, one a line")
    add("--trace", metavar="FILE.json|FILE.html", help="write the tree and every decision, as data or as a page")

    add = parser.add_argument_group("batch").add_argument
    add("--input", metavar="FILE.jsonl", help="one prompt a line: text, {prompt}, {messages} or {prompt_token_ids}")
    add("--output", metavar="FILE.jsonl", help="one result a line; an interrupted run goes on where it was")
    add_options(parser.add_argument_group("engine"), EngineConfig, ENGINE)
    return parser


def main(
    arguments: Sequence[str] | None = None,
    make_llm: Callable[..., "LLM"] | None = None,
    prog: str = "python -m minirksc.generate",
    branches: int | None = None,
) -> int:
    """Runs a command line; returns the exit code.

    Args:
        arguments: words of the command line; None: the process's own.
        make_llm: function that opens a model, given the engine's options; None: `LLM`.
        prog: name under which it was called, for messages.
        branches: number of branches where --branches is not given; None: the solver is off then.
    """

    def read() -> Callable[[], int]:
        options = build_parser(prog, branches).parse(arguments)
        options.branches = branches if options.branches is None else options.branches
        return partial(Job(options).run, make_llm or open_llm)

    return run_command(read)


class Job:
    """A checked command line.

    Args:
        options: options that a parser of `build_parser` has read.

    Raises:
        UsageError, ConfigError: options contradict each other or are out of range.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.is_solving = options.branches is not None
        self.solver_s: Counter[str] = Counter()  # of all problems so far
        self._check_texts()
        self._check_combinations()
        self.engine_options = given(options, ("model", *ENGINE))
        self.tokens_per_step = options.tokens_per_step or DEFAULT_TOKENS_PER_STEP
        self.params = self._sampling_params()
        self.solver_config = self._solver_config() if self.is_solving else None
        self.phrasings = self._lines_for_branches("phrasings")
        if options.gates is not None:
            # What it says depends on the model.
            cli_files.read_file(Path(options.gates), MAX_FILE_BYTES, label(options, "gates"))
        if options.trace is not None:
            cli_output.check_trace(Path(options.trace), label(options, "trace"))
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
                self._run_solver(llm)
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

    def _run_solver(self, llm: "LLM") -> None:
        result = self._solve(llm, self.prompt)
        if self.options.trace is not None:  # first: stdout may fail
            cli_output.write_trace(Path(self.options.trace), result.trace)
        if self.options.json:
            cli_output.print_json(cli_output.solve_as_dict(result))
        else:
            cli_output.print_solve(result)

    def _solve(self, llm: "LLM", problem: Any, salt: str | None = None, seed: int | None = None) -> Any:
        config = self.solver_config
        if config is not None and seed is not None:
            config = replace(config, sampling=replace(self.params, seed=seed))
        is_watched = self.batch is None and is_terminal(sys.stderr)
        with cli_output.progress() if is_watched else nullcontext() as on_event:
            result = Solver(llm, config).solve(problem, self.phrasings, on_event=on_event, salt=salt)
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
        check_text(label(options, "system"), options.system or "")
        for stop in options.stop or ():
            check_text(label(options, "stop"), stop)

    def _check_combinations(self) -> None:
        options = self.options
        for name in given(options, [*SOLVER, *SOLVER_FILES]) if not self.is_solving else ():
            raise UsageError(f"{label(options, name)} needs --branches")
        for name in given(options, WITHOUT_SOLVER) if self.is_solving else ():
            raise UsageError(f"{label(options, name)} does not go with --branches; {WITHOUT_SOLVER[name]}")
        if options.beam is not None and (options.depth or 1) == 1:
            raise UsageError(f"{label(options, 'beam')} needs --depth 2 or more: nothing is forked again")
        if options.sharing == "semantic" and options.phrasings is None:
            raise UsageError(f"{label(options, 'sharing')} semantic compares wordings; give them with --phrasings")
        if options.verify_style is not None and options.verify == "never":
            raise UsageError(f"{label(options, 'verify_style')} does not go with {label(options, 'verify')} never")
        for name in ("system", "chat_template_kwargs"):
            if getattr(options, name) and options.chat is False:
                raise UsageError(f"{label(options, name)} does not go with {label(options, 'chat', '--no-chat')}")
        if options.logprobs is not None and not (options.json or options.input):
            raise UsageError(f"{label(options, 'logprobs')} needs --json")
        if (options.input is None) != (options.output is None):
            raise UsageError("--input and --output go together")
        for name in given(options, ("prompt", "trace", "phrasings")) if options.input is not None else ():
            raise UsageError(f"--input does not go with {'PROMPT' if name == 'prompt' else label(options, name)}")

    def _sampling_params(self) -> SamplingParams:
        values = given(self.options, SAMPLING)
        min_tokens = values.get("min_tokens", 0)
        if not self.is_solving:
            return SamplingParams(**{"max_tokens": max(DEFAULT_MAX_TOKENS, min_tokens), **values})
        if min_tokens > self.tokens_per_step:
            limit = f"--tokens-per-step {self.tokens_per_step}"
            raise UsageError(f"{label(self.options, 'min_tokens')} {min_tokens} is more than {limit}")
        # On top of the solver's own: naming a seed must not change the temperature.
        return replace(DEFAULT_SAMPLING, max_tokens=self.tokens_per_step, **values)

    def _solver_config(self) -> SolverConfig:
        values = {**given(self.options, SOLVER), "tokens_per_step": self.tokens_per_step}
        hints = self._lines_for_branches("hints")
        return SolverConfig(sampling=self.params, hints=hints, chat=self.options.chat is not False, **values)

    def _lines_for_branches(self, name: str) -> list[str] | None:
        """The non-empty lines of the file that an option names, one a branch; None if it was not given."""
        path = getattr(self.options, name)
        if path is None:
            return None
        lines = cli_files.read_lines(Path(path), label(self.options, name))
        same = next((i for i, line in enumerate(lines) if line in lines[:i]), None)
        if name == "phrasings" and same is not None:
            first = lines.index(lines[same])
            note(f"{label(self.options, name)} {path}: lines {first + 1} and {same + 1} are the same wording")
        if len(lines) != self.options.branches:
            counts = f"{len(lines)} lines for {self.options.branches} branches"
            raise UsageError(f"{label(self.options, name)} has {counts}; give one a branch")
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
