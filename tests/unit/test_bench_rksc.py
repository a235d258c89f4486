"""bench.rksc, bench.paper_tables and what they share: intervals, problem sets, turns, pages."""

import importlib.util
import json
import math
import random
import sys
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean, median, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]

# The repository's root is not on the path (see conftest.py), so that the package is loaded from its file.
_spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
sys.modules.setdefault("bench", importlib.util.module_from_spec(_spec))

from bench import harness, measured, paper_tables, rksc, rksc_micro  # noqa: E402
from bench.intervals import bootstrap, clopper_pearson  # noqa: E402
from bench.problem_sets import kind_of, read_problem_set  # noqa: E402
from minirksc import LLM, SamplingParams, SolverConfig  # noqa: E402
from minirksc.calibrate.binomial import tail, upper_bound  # noqa: E402
from minirksc.errors import ConfigError  # noqa: E402
from minirksc.rksc.cgee import DEFAULT_GATES, EXACT_GATES, Gates, Lead  # noqa: E402
from minirksc.rksc.exits import MarginRule  # noqa: E402
from minirksc.rksc.gates_file import GatesFile, fingerprint, settings_of, write_gates  # noqa: E402
from minirksc.text.tokenizer import Tokenizer  # noqa: E402

# Intervals


def test_exact_intervals_of_known_counts():
    found = clopper_pearson(6, 1616)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0014, 0.0081)
    assert upper_bound(0, 299, 0.95) == pytest.approx(1 - 0.05 ** (1 / 299)) and upper_bound(0, 299, 0.95) < 0.01
    assert upper_bound(0, 298, 0.95) > 0.01
    assert clopper_pearson(0, 30).high == pytest.approx(1 - 0.025 ** (1 / 30))
    assert clopper_pearson(5, 5).high == 1 and clopper_pearson(0, 5).low == 0
    nothing = clopper_pearson(0, 0)
    assert math.isnan(nothing.estimate) and (nothing.low, nothing.high) == (0, 1)
    with pytest.raises(ValueError, match="4 of 3"):
        clopper_pearson(4, 3)


@given(st.data())
def test_an_exact_interval_is_the_rates_that_the_count_does_not_rule_out(data):
    total = data.draw(st.integers(1, 400))
    count = data.draw(st.integers(0, total))
    confidence = data.draw(st.floats(0.5, 0.999))
    found = clopper_pearson(count, total, confidence)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    side = (1 - confidence) / 2
    if count < total:
        assert tail(count, total, found.high) == pytest.approx(side, rel=1e-4)
    if count > 0:
        assert 1 - tail(count - 1, total, found.low) == pytest.approx(side, rel=1e-4)
    mirrored = clopper_pearson(total - count, total, confidence)
    assert mirrored.low == pytest.approx(1 - found.high) and mirrored.high == pytest.approx(1 - found.low)


@settings(max_examples=30)
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=40), shift=st.floats(-5, 5), seed=st.integers(0, 9))
def test_the_bootstrap_lies_within_the_values_and_moves_with_them(values, shift, seed):
    for statistic in (fmean, median):
        found = bootstrap(values, statistic, resamples=200, seed=seed)
        assert found == bootstrap(values, statistic, resamples=200, seed=seed)
        assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
        assert found.estimate == statistic(values)
        moved = bootstrap([value + shift for value in values], statistic, resamples=200, seed=seed)
        assert moved.low == pytest.approx(found.low + shift, abs=1e-6)
        assert moved.high == pytest.approx(found.high + shift, abs=1e-6)


def test_the_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    draw = random.Random(1)
    values = [draw.gauss(3, 2) for _ in range(300)]
    found = bootstrap(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 * stdev(values) / math.sqrt(300), rel=0.15)
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


# Problem sets

MATH = [(f"What is {n} plus {n}?", f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}") for n in range(2, 70)]


def write_data(file, rows):
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "sums.jsonl", MATH)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(layers=4, chat=True, max_len=2048)


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (["1 #### 2", "so #### 3"], "number"), (["(A)", " (C)\n"], "choice"), (["Yes", "no"], "boolean"),
        (["True", "False"], "boolean"), (["(A)", "yes"], "text"), (["blue", "#### 1"], "text"),
    ],
)  # fmt: skip
def test_kinds_of_answers(answers, kind):
    assert kind_of(answers) == kind


def test_worked_examples_are_never_asked_and_answers_never_given_away(data, model):
    found = read_problem_set(data, 5, num_shots=3)
    assert found.kind == "number" and found.references == ["4", "6", "8", "10", "12"]
    assert [question for question, _ in found.shots] == [question for question, _ in MATH[-3:]]
    assert not any("<<" in answer for _, answer in found.shots)
    tokenizer = Tokenizer.from_folder(model)
    ids = found.prompt_ids(tokenizer, 1, 900)  # far more than three examples fill
    text = tokenizer.decode(ids)
    assert len(ids) == 900 and text.endswith(f"Question: {MATH[1][0]}\nAnswer:")
    assert text.count(MATH[1][0]) == 1 and text.count(MATH[-1][0]) > 1
    assert len(read_problem_set(data, None, num_shots=3).questions) == len(MATH) - 3


def test_files_that_cannot_be_used_are_named(tmp_path):
    few = write_data(tmp_path / "few.jsonl", MATH[:2])
    with pytest.raises(ConfigError, match="2 rows"):
        read_problem_set(few, None, num_shots=2)
    (tmp_path / "other.jsonl").write_text('{"prompt": 1}\n')
    for name in ("other.jsonl", "none.jsonl"):
        with pytest.raises(ConfigError, match=name):
            read_problem_set(tmp_path / name, None)


# Turns and arms


def test_arms_take_turns_in_changing_orders_and_warm_up_first():
    calls = []
    arms = {name: lambda index, name=name: calls.append((name, index)) or {"value": index} for name in "abcd"}
    rows = list(harness.take_turns(arms, range(5, 12), warmup=2))
    turns = [rows[begin : begin + 4] for begin in range(0, len(rows), 4)]
    assert [[row["arm"] for row in turn] for turn in turns] == [list("abcd")] * 7
    assert [turn[0]["repeat"] for turn in turns] == [row["value"] for row, *_ in turns] == list(range(5, 12))
    assert len(calls) == 4 * (7 + 2) and {index for _, index in calls[:8]} == {5}
    orders = {tuple(name for name, _ in calls[begin : begin + 4]) for begin in range(8, len(calls), 4)}
    assert len(orders) > 1 and all(sorted(order) == list("abcd") for order in orders)


def test_a_gate_that_only_looked_has_not_fired():
    notes = [("skip", "ask"), ("layer_exit", "goes on"), ("bound", "3 not asked")]
    assert measured.fired({"gate": gate, "decision": decision} for gate, decision in notes) == ["bound"]
    more = [("skip", "nobody is asked"), ("layer_exit", "leaves"), ("layer_exit", "leaves")]
    fired = measured.fired({"gate": gate, "decision": decision} for gate, decision in more)
    assert fired == ["layer_exit", "skip"]


EVERY_GATE = Gates(skip=(Lead(gap=0.1),), layer_exit=MarginRule(3.0), decode_exit=(Lead(gap=0.2),), source="calibrated")


def test_each_arm_changes_one_thing():
    arms = rksc.make_arms(SolverConfig(branches=3), EVERY_GATE)
    assert list(arms)[:3] == list(rksc.BASELINES)

    def changes(one, other):
        return {f.name for f in fields(SolverConfig) if getattr(arms[one], f.name) != getattr(arms[other], f.name)}

    assert changes("exact standalone", "none standalone") == {"sharing"}
    assert changes("exact append", "exact standalone") == {"verify_style"}
    assert changes("+ bound", "exact append") <= {"verify", "gates", "decode_exit"}
    assert changes("paper", "exact standalone") == {"verify", "policy"}
    assert changes("rksc", "+ decode exit") == {"gates"} and arms["rksc"].gates == EVERY_GATE
    assert arms["+ bound"].gates == EXACT_GATES
    for name, kept in measured.LONE_GATES.items():
        gates = arms[f"+ {name}"].gates
        assert not gates.exact and gates.source == "calibrated"
        assert [field for field in measured.LONE_GATES.values() if getattr(gates, field)] == [kept]
    assert arms["exact append"].verify == "always"


def test_each_problem_has_its_own_seed_and_nothing_else_changes():
    config = SolverConfig(tokens_per_step=9, sampling=SamplingParams(seed=100, top_p=0.5))
    seeds = [measured.seeded(config, index).step_sampling.seed for index in range(3)]
    assert seeds == [100, 101, 102] and measured.seeded(SolverConfig(), 4).step_sampling.seed == 4
    again = measured.seeded(config, 2)
    assert replace(again.step_sampling, seed=100) == config.step_sampling
    assert replace(again, sampling=config.sampling) == config


def test_a_gate_without_a_threshold_is_no_arm():
    assert "+ layer exit" not in rksc.make_arms(SolverConfig(), DEFAULT_GATES)
    assert "+ layer exit" in rksc.make_arms(SolverConfig(), EVERY_GATE)


def test_ratios_are_within_a_repetition():
    rows = [
        {"arm": arm, "repeat": r, "total_s": s} for r, a, b in ((0, 2, 6), (1, 4, 4)) for arm, s in (("a", a), ("b", b))
    ]
    assert harness.ratios(rows, "a", "b") == [3, 1] and harness.ratios(rows, "b", "a") == [1 / 3, 1]
    assert harness.ratios(rows, "a", "c") == []


def test_only_says_what_there_is():
    assert harness.keep_only(["rksc", "paper"], "^r") == ["rksc"]
    with pytest.raises(SystemExit, match="rksc, paper"):
        harness.keep_only(["rksc", "paper"], "none")


def test_gates_are_only_calibrated_under_their_own_settings(model, tmp_path, capsys):
    config = SolverConfig(branches=3, answer_parser="number")
    with LLM(model, kv_cache_bytes="32MiB") as llm:
        assert measured.load_gates(None, llm, config) == DEFAULT_GATES
        found = {"counts": {}, "data": {}, "budget": 0.01, "confidence": 0.95, "minirksc_version": "0"}
        made_for = {"settings": settings_of(config, llm), "model": fingerprint(model)}
        write_gates(tmp_path / "gates.json", GatesFile(gates=EVERY_GATE, **found, **made_for))
        assert measured.load_gates(tmp_path / "gates.json", llm, config) == EVERY_GATE
        assert measured.load_gates(tmp_path / "gates.json", llm, measured.seeded(config, 7)) == EVERY_GATE
        assert capsys.readouterr().err == ""
        other = measured.load_gates(tmp_path / "gates.json", llm, replace(config, branches=4))
    assert other == replace(EVERY_GATE, source="uncalibrated")
    assert "branches is 4, but the gates were calibrated with 3" in capsys.readouterr().err


# Whole runs on a tiny model


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def common(model, tmp_path):
    return [
        "--model",
        str(model),
        "--threads",
        "1",
        "--kv-cache-bytes",
        "32MiB",
        "--branches",
        "3",
        "--output",
        str(tmp_path),
    ]


def test_rksc_measures_and_reports(common, tmp_path, capsys):
    more = ["--quick", "--prefix-tokens", "64", "--tokens", "17", "--hint-tokens", "4", "--warmup", "0"]
    rksc.main([*common, *more])
    (file,) = tmp_path.glob("rksc-*.jsonl")
    rows = rows_of(file)
    assert {row["tokens"] for row in rows} == {17} and {row["bench"] for row in rows} == {"rksc"}
    cost = {row["arm"]: row for row in rows if row["repeat"] == 1}
    assert cost["exact append"]["token_ids"] == cost["none standalone"]["token_ids"] == cost["+ bound"]["token_ids"]
    computed = [cost[arm]["num_layer_rows"] for arm in ("skip forced", *reversed(rksc.BASELINES))]
    assert computed == sorted(set(computed))
    assert cost["skip forced"]["fired"] == ["skip"] and cost["skip forced"]["num_asked"] == 0
    assert (
        cost["decode exit forced"]["num_tokens"].count(17) == 1 and min(cost["decode exit forced"]["num_tokens"]) == 16
    )
    (page,) = tmp_path.glob("rksc-*.md")
    assert "## 17 tokens a branch, float32, 2 repetitions" in page.read_text()
    assert page.read_text() in capsys.readouterr().out


def test_unequal_work_is_an_error():
    with pytest.raises(RuntimeError, match=r"\+ skip generated \[4, 3\] tokens, not 2 x 4"):
        harness.check_same_work("+ skip", [4, 3], 2, 4)
    harness.check_same_work("+ skip", [4, 4], 2, 4)


def test_micro_counts_what_leaves(common, tmp_path):
    common[common.index("--branches") + 1] = "4"
    rksc.main([*common, "--micro", "--micro-repeats", "3", "--prefix-tokens", "96", "--warmup", "0"])
    (file,) = tmp_path.glob("rksc-micro-*.jsonl")
    rows = {row["arm"]: row for row in rows_of(file) if row["repeat"] == 2}
    full = 4 * rksc_micro.NUM_QUESTION_TOKENS * 4  # branches, tokens, layers
    assert rows["score, no gate"]["num_layer_rows"] == rows["score, gate never asked"]["num_layer_rows"] == full
    assert rows["score, all watched"]["num_layer_rows"] == full
    assert rows["score, half leaves"]["num_layer_rows"] == full * 3 / 4
    decoded = {rows[arm]["num_decoded_tokens"] for arm in rows if arm.startswith("decode")}
    assert decoded == {4 * rksc_micro.NUM_STEPS}
    (page,) = tmp_path.glob("rksc-micro-*.md")
    text = page.read_text()
    assert all(f"| {what} |" in text for _, _, what in rksc_micro.COMPARISONS)


def test_paper_tables_measures_and_reports(common, data, tmp_path):
    more = ["--quick", "--problems", "2", "--prefix-tokens", "64", "--warmup", "0", "--data", str(data)]
    paper_tables.main([*common, *more])
    (file,) = tmp_path.glob("paper-tables-*.jsonl")
    rows = rows_of(file)
    assert [row["arm"] for row in rows[:5]] == ["no KV", "prefix KV", "prefix KV, append", "RKSC as published", "RKSC"]
    assert {row["tokens"] for row in rows} == {8} and all(max(row["num_tokens"]) <= 8 for row in rows)
    by_arm = {row["arm"]: row for row in rows if row["repeat"] == 1}
    assert by_arm["no KV"]["num_prefilled_tokens"] > by_arm["prefix KV"]["num_prefilled_tokens"]
    assert by_arm["RKSC as published"]["gates"] == "paper"
    (page,) = tmp_path.glob("paper-tables-*.md")
    assert "3.008" in page.read_text() and "Not comparable: milliseconds" in page.read_text()


def test_an_error_is_right_in_full_and_wrong_with_gates():
    def row(arm, repeat, right):
        return {"arm": arm, "repeat": repeat, "right": right, "data": "d", "tokens": 8, "dtype": "float32"}

    full, gated = [True, True, False, False], [False, True, True, False]
    rows = [row("prefix KV", i, right) for i, right in enumerate(full)]
    rows += [row("RKSC as published", i, right) for i, right in enumerate(gated)]
    assert paper_tables.errors(rows, "RKSC as published") == (1, 4, 2)
    assert paper_tables.errors(rows, "RKSC") is None and paper_tables.errors(rows, "prefix KV") is None
    (published,) = [row[3] for row in paper_tables.PAPER if row[0] == "RKSC"]
    assert paper_tables._show_errors((6, 1616, 0)).startswith(published)


def test_wrong_usage_is_told(common, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"error: .*there is no such file"):
        rksc.main([*common, "--gates", str(tmp_path / "none.json")])
    for arguments in (["--tokens", "0"], ["--only", "("], ["--dtypes", ","]):
        with pytest.raises(SystemExit) as error:
            rksc.parse(arguments)
        assert error.value.code == 2
    assert rksc.parse(["--quick", "--tokens", "5"]).tokens == [5] and rksc.parse(["--quick"]).tokens == [32]
    capsys.readouterr()
