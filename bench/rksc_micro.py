"""Single steps: what a row that leaves early saves, what gates cost that are off, what measuring attention costs.

Started by `python -m bench.rksc --micro`. Everything runs behind one prompt of --prefix-tokens that all rows share.
- score: one pass that asks about each branch with `NUM_QUESTION_TOKENS` tokens. Half of the rows leave after half of
  the layers; all are looked at from there on, and none leaves; a gate that is never asked; no gate.
- decode: steps of all branches, with and without a seat at a gate that is never asked, and on an engine that measures
  no attention, since its eviction does not need it.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from statistics import median

from bench.harness import Row, groups_of, keep_only, names, ratios, seconds_of, take_turns, values
from bench.intervals import bootstrap
from bench.measured import begin_decoding, load
from bench.prompts import EXAMPLES, few_shot_ids
from bench.report import Page, spread
from minirksc import LLM, SamplingParams
from minirksc.engine.gates import LEAVE, Decisions, GateRows, LayerGate
from minirksc.engine.mass import MASS_INTERVAL
from minirksc.rksc.exits import MarginRule

NUM_QUESTION_TOKENS = 16
NUM_STEPS = 2 * MASS_INTERVAL
"""Of a decode measurement: attention is measured in exactly two of them."""

COMPARISONS = (
    ("score, half leaves", "score, no gate", "half of the rows leave after half of the layers"),
    ("score, all watched", "score, no gate", "all rows are looked at from half of the layers on"),
    ("score, gate never asked", "score, no gate", "a gate that is off, in the pass of the question"),
    ("decode, gate never asked", "decode, no gate", "a gate that is off, in a decode step"),
    ("decode, no gate", "decode, no mass", "measuring attention for eviction (rksc against lru)"),
)
"""An arm, the one that its time is held against, and what the ratio says."""


class Leaving:
    """A layer gate at which given rows leave after one layer.

    Args:
        layers: layers after which it is asked.
        rows: rows that leave.
    """

    def __init__(self, layers: Collection[int], rows: Collection[int]) -> None:
        self.layers = layers
        self._rows = rows

    def after_layer(self, layer: int, rows: GateRows) -> Decisions:
        """See `minirksc.engine.gates.LayerGate`."""
        return {row: LEAVE for row in rows.rows if row in self._rows}


def make_arms(llm: LLM, without_mass: LLM, options: argparse.Namespace) -> dict[str, Callable[[int], Row]]:
    """Every arm, by name.

    Args:
        llm: engine.
        without_mass: engine of the same model whose eviction policy needs no attention.
        options: command line.
    """
    tokenizer = llm.need_tokenizer("bench.rksc")
    text = few_shot_ids(tokenizer, EXAMPLES, options.prefix_tokens + 2048)
    prompt, rest = text[: options.prefix_tokens], text[options.prefix_tokens :]
    branches = llm.branch(prompt).fork(options.branches)
    without_mass.branch(prompt).prune()  # what it computed stays in the prefix cache
    num_layers = llm.spec.num_layers
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in (" YES", " NO"))
    watching = MarginRule(margin=float("inf"))

    def score(make_gate: Callable[[], LayerGate | None]) -> Callable[[int], Row]:
        def one(index: int) -> Row:
            # Other questions in each pass: nothing may be found in the prefix cache.
            questions = [window(rest, index * len(branches) + row) for row in range(len(branches))]
            return _counted(llm, lambda: llm.score(branches, questions, [[yes], [no]], make_gate()))

        return one

    half = range(len(branches) // 2)
    return {
        "score, no gate": score(lambda: None),
        "score, half leaves": score(lambda: Leaving((num_layers // 2 - 1,), half)),
        "score, all watched": score(lambda: watching.gate(llm.lens, (yes, no), num_layers)),
        "score, gate never asked": score(lambda: Leaving((), ())),
        "decode, no gate": lambda _: decode(llm, prompt, len(branches), None),
        "decode, gate never asked": lambda _: decode(llm, prompt, len(branches), Leaving((), ())),
        "decode, no mass": lambda _: decode(without_mass, prompt, len(branches), None),
    }


def window(token_ids: Sequence[int], number: int) -> list[int]:
    """`NUM_QUESTION_TOKENS` tokens, others for each number until the text is used up."""
    begin = number % (len(token_ids) - NUM_QUESTION_TOKENS + 1)
    return list(token_ids[begin : begin + NUM_QUESTION_TOKENS])


def decode(llm: LLM, prompt: list[int], num_branches: int, gate: LayerGate | None) -> Row:
    """`NUM_STEPS` decode steps of one sequence a branch, after the prompt and one more token of its own."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NUM_STEPS + 1).resolved(llm.sampling_defaults)
    measured = _counted(llm, begin_decoding(llm, prompt, num_branches, params, gate))
    assert measured["num_decoded_tokens"] == NUM_STEPS * num_branches, "all must have begun in the same step"
    return {**measured, "seconds": measured["seconds"] / NUM_STEPS}


def measure_all(options: argparse.Namespace) -> list[Row]:
    """Every arm, for every dtype."""
    rows = []
    for dtype in options.dtypes:
        with load(options, dtype) as llm, load(options, dtype, eviction="lru") as without_mass:
            arms = make_arms(llm, without_mass, options)
            chosen = {name: arms[name] for name in keep_only(arms, options.only)}
            rows += [
                {"part": "micro", "dtype": llm.stats()["dtype"], **row}
                for row in take_turns(chosen, range(options.micro_repeats), options.warmup)
            ]
    return rows


def make_page(rows: Sequence[Row], options: argparse.Namespace) -> Page:
    """The page."""
    page = Page("What gates cost and save within one step")
    page.text(
        f"{options.branches} rows behind one prompt of {options.prefix_tokens} tokens; questions of "
        f"{NUM_QUESTION_TOKENS} tokens; {NUM_STEPS} decode steps a measurement, with attention measured in every "
        f"{MASS_INTERVAL}th. Median (p10 .. p90); relative time: median within a repetition, with its 95% interval "
        "over repetitions."
    )
    for (dtype,), own in groups_of(rows, "dtype").items():
        page.heading(dtype)
        table = []
        for arm in names(own):
            layer_rows = f"{median(values(own, arm, 'num_layer_rows')):.0f}"
            table.append([arm, spread(values(own, arm, "seconds"), 1000), layer_rows])
        page.table(["arm", "ms a pass or step", "layer rows"], table)
        comparisons = []
        for arm, base, what in COMPARISONS:
            relative = [1 / ratio for ratio in ratios(own, arm, base, "seconds")]
            if relative:
                comparisons.append([what, bootstrap(relative, median).show(".3f")])
        page.table(["what", "relative time [95%]"], comparisons)
    return page


def _counted(llm: LLM, work: Callable[[], object]) -> Row:
    before = llm.stats()
    seconds = seconds_of(work)
    after = llm.stats()
    counters = ("num_layer_rows", "num_prefilled_tokens", "num_decoded_tokens")
    return {"seconds": seconds, **{name: after[name] - before[name] for name in counters}}
