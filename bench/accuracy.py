"""How often the answer is right, and what it costs: one greedy answer, a vote, full verification, gates, the paper.

    python -m bench.accuracy --data problems.jsonl --gates gates.json
    python -m bench.accuracy --data problems.jsonl --quick

Every problem is asked as it is, through the checkpoint's chat template. Arms:
- greedy: one answer at temperature 0.
- vote: --branches answers, the commonest one; nobody is asked.
- full: the same answers, everybody is asked (append), the best score wins.
- rksc: as far as the gates leave anything to ask.
- paper: every published rule, standalone questions, exact sharing.

All arms but greedy have the same hints and, on the same problem, the same seed, so that they choose among the same
answers unless a gate stops one early. Arms take turns problem by problem, each from an empty prefix cache, and their
results go into one JSONL a file of problems as they come: what was interrupted goes on where it stopped, if every
setting, version and machine is the same. --limit may be raised later. Problems are the unit of all intervals.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import environment
from bench.intervals import bootstrap, clopper_pearson, mcnemar
from bench.measured import (
    Row,
    keep_only,
    load,
    load_gates,
    make_parser,
    parse_with_quick,
    positive,
    run_or_exit,
    seeded,
    solve,
    take_turns,
)
from bench.problem_sets import ProblemSet, read_problem_set
from bench.report import Page, names, new_stem, put_legend, ratios, share, spread, values, write_page
from minirksc import LLM, SamplingParams, SolverConfig
from minirksc.errors import ConfigError
from minirksc.rksc.cgee import Gates
from minirksc.rksc.gates_file import checksum, fingerprint
from minirksc.rksc.solver_config import DEFAULT_SAMPLING

FULL = "full"
"""The arm that the others are compared with: nothing in it is approximated."""


def make_arms(base: SolverConfig, gates: Gates) -> dict[str, SolverConfig]:
    """Every arm.

    Args:
        base: branches, tokens, hints, sampling and parser.
        gates: of arm rksc.
    """
    greedy = SamplingParams(temperature=0)
    return {
        "greedy": replace(base, branches=1, beam=1, hints=[()], sampling=greedy, verify="never"),
        "vote": replace(base, verify="never", select="vote"),
        FULL: replace(base, verify="always"),
        "rksc": replace(base, verify="auto", gates=gates),
        "paper": replace(base, verify="auto", policy="paper", verify_style="standalone"),
    }


def base_config(problems: ProblemSet, options: argparse.Namespace) -> SolverConfig:
    """What all arms have in common."""
    return SolverConfig(
        branches=options.branches,
        tokens_per_step=options.tokens,
        hints=[()] * options.branches if options.no_hints else None,
        sampling=replace(DEFAULT_SAMPLING, seed=options.seed),
        answer_parser=problems.kind,
    )


def header_of(llm: LLM, problems: ProblemSet, arms: Iterable[str], options: argparse.Namespace) -> dict[str, Any]:
    """All that decides the results, or how long they take, but for the commit; as JSON gives it back."""
    facts = environment(options.threads)
    del facts["commit"]
    gates = None if options.gates is None else hashlib.sha256(options.gates.read_bytes()).hexdigest()
    header = {
        "data": problems.sha256,
        "kind": problems.kind,
        "model": checksum(fingerprint(llm.model_path)),
        "dtype": llm.stats()["dtype"],
        "kv_cache_bytes": llm.stats()["kv_cache_bytes"],
        "arms": list(arms),
        "gates": gates,
        **{name: getattr(options, name) for name in ("branches", "tokens", "seed", "no_hints", "suffix")},
        "environment": facts,
    }
    return dict(json.loads(json.dumps(header)))


def resume(file: Path, header: dict[str, Any]) -> list[Row]:
    """Rows of the problems that are done; begins the file where there is none.

    A last line that was cut off is removed.

    Raises:
        ConfigError: the file was made with other settings.
    """
    if not file.exists() or not file.read_bytes().count(b"\n"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"bench": "accuracy", "header": header}) + "\n", encoding="utf-8")
        return []
    content = file.read_bytes()
    whole = content[: content.rindex(b"\n") + 1]
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()]
        found = first["header"]
        rows = [row for line in lines for row in line["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no result of bench.accuracy ({error!r}); give another --output") from error
    different = [name for name in {**header, **found} if header.get(name) != found.get(name)]
    if different:
        was = ", ".join(f"{name} was {found.get(name)!r}, is {header.get(name)!r}" for name in sorted(different))
        raise ConfigError(f"{file} has results under other settings: {was}; give another --output, or remove it")
    if len(whole) < len(content):
        file.write_bytes(whole)
    return rows


def measure_set(llm: LLM, problems: ProblemSet, options: argparse.Namespace) -> list[Row]:
    """All arms on all problems that are not done yet; rows of all."""
    base = base_config(problems, options)
    configs = make_arms(base, load_gates(options.gates, llm, replace(base, verify="auto")))
    arms: dict[str, Callable[[int], Row]] = {}
    for name in keep_only(configs, options.only):

        def one(index: int, config: SolverConfig = configs[name]) -> Row:
            row = solve(llm, seeded(config, index), problems.questions[index] + options.suffix)
            del row["token_ids"]
            return {
                **row,
                "reference": problems.references[index],
                "right": row["parsed"] == problems.references[index],
            }

        arms[name] = one
    mark = "-quick" if options.quick else ""
    file = options.output / f"accuracy-{problems.name}-{llm.stats()['dtype']}{mark}.jsonl"
    rows = resume(file, header_of(llm, problems, arms, options))
    done = {row["repeat"] for row in rows}
    commit = environment(options.threads)["commit"]
    indices = [index for index in range(len(problems.questions)) if index not in done]
    with file.open("a", encoding="utf-8") as stream:
        for turn in take_turns(arms, indices, warmup=1, seed=options.seed):
            rows += (made := [{**row, "commit": commit} for row in turn])
            stream.write(json.dumps({"problem": turn[0]["repeat"], "rows": made}) + "\n")
            stream.flush()
    print(f"results: {file}")
    return [row for row in rows if row["repeat"] < len(problems.questions)]


def accuracy_table(page: Page, rows: Sequence[Row]) -> None:
    """Accuracy, cost, and the comparison with full verification problem by problem."""
    full = {row["repeat"]: row for row in rows if row["arm"] == FULL}
    headings = ["arm", "right [95%]", f"points over {FULL} [95%]", f"right: only here / only {FULL} (p)"]
    headings += [f"answer as {FULL}", "no answer", "tokens decoded", "asked", "s a problem", f"x {FULL}"]
    table = []
    for arm in names(rows):
        own = [row for row in rows if row["arm"] == arm]
        right = sum(row["right"] for row in own)
        found = clopper_pearson(right, len(own))
        cells = [
            arm,
            f"{right}/{len(own)}: {100 * found.estimate:.1f}% [{100 * found.low:.1f}, {100 * found.high:.1f}]",
        ]
        if full and arm != FULL:
            pairs = [(row, full[row["repeat"]]) for row in own]
            points = bootstrap([100.0 * (mine["right"] - theirs["right"]) for mine, theirs in pairs])
            split = mcnemar([mine["right"] for mine, _ in pairs], [theirs["right"] for _, theirs in pairs])
            same = sum(mine["parsed"] == theirs["parsed"] for mine, theirs in pairs)
            cells += [points.show("+.1f"), f"{split.only_first} / {split.only_second} ({split.p_value:.2g})"]
            cells += [share(same, len(own))]
        else:
            cells += ["-", "-", "-"]
        cells += [
            str(sum(row["parsed"] is None for row in own)),
            f"{median(values(rows, arm, 'num_decoded_tokens')):.0f}",
            f"{median(values(rows, arm, 'num_asked')):.0f}",
            spread(values(rows, arm, "total_s")),
            spread(ratios(rows, arm, FULL)) if full and arm != FULL else "-",
        ]
        table.append(cells)
    page.table(headings, table)


def gates_table(page: Page, rows: Sequence[Row]) -> None:
    """How often each gate fired, and what became of the answer there."""
    full = {row["repeat"]: row for row in rows if row["arm"] == FULL}
    table = []
    for arm in names(rows):
        own = [row for row in rows if row["arm"] == arm]
        for gate in sorted({gate for row in own for gate in row["fired"]}):
            some = [row for row in own if gate in row["fired"]]
            pairs = [(row, full[row["repeat"]]) for row in some if full]
            harmed = sum(theirs["right"] and not mine["right"] for mine, theirs in pairs)
            bound = clopper_pearson(harmed, len(pairs)).high if pairs else 1.0
            changed = sum(theirs["parsed"] != mine["parsed"] for mine, theirs in pairs)
            thresholds = ", ".join(sorted({row["gates"] for row in some}))
            counts = [share(changed, len(pairs)), f"{share(harmed, len(pairs))}, at most {bound:.1%}"]
            table.append([arm, gate, share(len(some), len(own)), *(counts if pairs else ["-", "-"]), thresholds])
    if table:
        harm = f"{FULL} right, this wrong, with 95% upper limit"
        page.table(["arm", "gate", "fired", f"other answer than {FULL}", harm, "thresholds"], table)
    else:
        page.text("No gate fired.")


def make_page(groups: dict[str, list[Row]], options: argparse.Namespace) -> Page:
    """The page."""
    page = Page("Accuracy and time, by how the answer is chosen")
    page.text(
        f"{options.branches} branches of up to {options.tokens} tokens, seed {options.seed}, "
        f"{'no hints' if options.no_hints else 'a hint a branch'}; model {options.model}. Arms took turns problem by "
        "problem. Seconds and ratios: median (p10 .. p90) over problems; x: how many times as fast on the same one. "
        "Rates have exact (Clopper-Pearson) intervals, differences the bootstrap's over problems, paired; p is of the "
        f"exact McNemar test. Gates: {'of no calibration' if options.gates is None else options.gates.name}."
    )
    for title, rows in groups.items():
        page.heading(f"{title}: {len({row['repeat'] for row in rows})} problems")
        accuracy_table(page, rows)
        gates_table(page, rows)
        commits = list(dict.fromkeys(str(row["commit"]) for row in rows))
        if len(commits) > 1:
            page.text(f"Results of several commits: {', '.join(commits)}.")
    return page


def draw(figure: Any, groups: dict[str, list[Row]]) -> bool:
    """Accuracy over seconds, a panel a group."""
    figure.set_size_inches(4.6 * len(groups), 3.8)
    for index, (title, rows) in enumerate(groups.items()):
        axes = figure.add_subplot(1, len(groups), index + 1)
        for arm in names(rows):
            right = values(rows, arm, "right")
            found = clopper_pearson(right.count(True), len(right))
            seconds = median(values(rows, arm, "total_s"))
            sides = [[100 * (found.estimate - found.low)], [100 * (found.high - found.estimate)]]
            axes.errorbar([seconds], [100 * found.estimate], yerr=sides, fmt="o", capsize=3, label=arm)
        axes.set(
            title=title, xlabel="seconds a problem (median)", ylabel="right, % (95%)", xlim=(0, None), ylim=(0, None)
        )
        axes.grid(alpha=0.3)
    put_legend(figure)
    return True


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("bench.accuracy", __doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL with question and answer")
    parser.add_argument("--limit", type=positive, help="first problems of each file only")
    parser.add_argument("--tokens", type=positive, default=256, help="most of a branch (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of all samples; each problem adds its number (%(default)s)"
    )
    parser.add_argument("--no-hints", action="store_true", help="all branches begin alike")
    parser.add_argument("--suffix", default="", help="text after each question, such as how to state the answer")
    return parse_with_quick(parser, arguments, limit=6, tokens=48)


def run(options: argparse.Namespace) -> None:
    """Measures what is left to measure, and writes page and picture of all."""
    groups = {}
    for dtype in options.dtypes:
        with load(options, dtype) as llm:
            for file in options.data:
                problems = read_problem_set(file, options.limit)
                groups[f"{problems.name}, {llm.stats()['dtype']}"] = measure_set(llm, problems, options)
    stem = new_stem(options.output, "accuracy")
    page = make_page(groups, options)
    for path in write_page(stem, page, options.threads, lambda figure: draw(figure, groups)):
        print(f"results: {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    run_or_exit(lambda: run(options))


if __name__ == "__main__":
    main()
