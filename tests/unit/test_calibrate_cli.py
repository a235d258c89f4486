"""`python -m minirksc.calibrate`: exit codes, resuming, and what it writes."""

import json
import os

import pytest

from minirksc import LLM
from minirksc.calibrate.collect import Collector
from minirksc.cli import calibrate
from minirksc.cli.calibrate import main
from minirksc.cli.evidence_file import read_evidence
from minirksc.cli.resumable import GrowingFile
from minirksc.rksc.gates_file import read_gates, read_gates_file

NUM_PROBLEMS = 20
OPTIONS = ["--branches", "3", "--tokens-per-step", "6", "--budget", "0.2", "--confidence", "0.9", "--threads", "1"]
"""Needs 11 problems."""


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(chat=True)


@pytest.fixture()
def run(tmp_path, model, capsys, monkeypatch):
    """Runs the command line; returns (exit code, stdout, stderr)."""
    for name in ("MODEL", "BUDGET", "SEED", "LIMIT"):
        monkeypatch.delenv(f"MINIRKSC_{name}", raising=False)
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"How many are {i} and {i}?", "answer": str(2 * i)} for i in range(NUM_PROBLEMS)]
    data.write_text("\n".join(json.dumps(row) for row in rows))

    def run(*extra, options=OPTIONS, make_llm=None):
        arguments = ["--model", str(model), "--data", str(data), "-o", str(tmp_path / "gates.json"), *options, *extra]
        make = make_llm or (lambda **given: LLM(**{"kv_cache_bytes": "4MiB", "block_size": 8, **given}))
        code = main(arguments, make)
        out = capsys.readouterr()
        return code, out.out, out.err

    run.model, run.data, run.output, run.evidence = (
        model,
        data,
        tmp_path / "gates.json",
        tmp_path / "gates.json.evidence.jsonl",
    )
    return run


def no_llm(**options):
    raise AssertionError("the model must not be loaded")


def test_a_whole_run(run, model):
    code, out, err = run()
    assert code == 0, err
    assert "needs 11 problems" in err and f"wrote {run.output}" in err
    assert "certified" in out and "signal" in out and "right answers" in out
    file = read_gates_file(run.output, model)
    assert file.gates.is_calibrated and file.gates.exact
    counts = file.counts
    assert counts["ordering"] + counts["test"] == counts["problems"] == NUM_PROBLEMS
    assert counts["bound"] <= 0.2 == file.budget
    assert counts["steps"][0]["changed"] == 0 and counts["steps"][0]["passed"]
    assert counts["accuracy"]["problems"] == NUM_PROBLEMS
    header, evidence = read_evidence(run.evidence)
    assert len(evidence) == NUM_PROBLEMS and header["model"] == file.model
    assert header["data"]["sha256"] == file.data["sha256"]
    assert "select" not in header["settings"] and file.settings["select"] == "score"


def test_json_goes_to_stdout_alone(run):
    code, out, _ = run("--json")
    found = json.loads(out)
    assert code == 0 and found["output"] == str(run.output)
    assert found["steps"] and found["bound"] <= 0.2


def test_a_second_run_solves_nothing_and_finds_the_same(run, monkeypatch):
    assert run()[0] == 0
    first = json.loads(run.output.read_text())
    monkeypatch.setattr(Collector, "collect", lambda *_: pytest.fail("solved again"))
    assert run()[0] == 0
    assert json.loads(run.output.read_text()) == first
    # What only the choice depends on can be changed without solving anew.
    assert run("--select", "vote", "--answer-parser", "number", "--budget", "0.3", "--split-seed", "4")[0] == 0
    again = json.loads(run.output.read_text())
    assert (again["settings"]["select"], again["budget"]) == ("vote", 0.3)


def test_an_interrupted_run_goes_on_where_it_was(run, monkeypatch):
    monkeypatch.setattr(calibrate, "BRANCHES_AT_ONCE", 12)
    collect, asked = Collector.collect, []

    def interrupted(self, problems, seeds):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(problems)
        return collect(self, problems, seeds)

    monkeypatch.setattr(Collector, "collect", interrupted)
    code, out, err = run()
    assert (code, out) == (130, "")
    assert f"8 of {NUM_PROBLEMS} problems are in" in err and "goes on from there" in err
    assert not run.output.exists()
    with run.evidence.open("ab") as stream:
        stream.write(b'{"problem": 8, "evid')  # torn off
    seen = []
    monkeypatch.setattr(Collector, "collect", lambda *given: seen.extend(given[1]) or collect(*given))
    code, _, err = run()
    assert code == 0, err
    assert [problem for problem, _ in seen] == [f"How many are {i} and {i}?" for i in range(8, NUM_PROBLEMS)]
    _, resumed = read_evidence(run.evidence)
    run.evidence.unlink()
    assert run()[0] == 0
    _, at_once = read_evidence(run.evidence)
    assert len(resumed) == len(at_once) == NUM_PROBLEMS
    for one, other in zip(resumed, at_once, strict=True):
        assert [b.token_ids for b in one.branches] == [b.token_ids for b in other.branches]
        assert one.reference == other.reference


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tokens-per-step", "7"], "settings: tokens_per_step 6, and this run has 7"),
        (["--seed", "5"], "seed 0, and this run has 5"),
        (["--temperature", "0.5"], "settings: sampling.temperature 0.8"),
    ],
)
def test_evidence_of_other_settings_is_refused(run, extra, message):
    assert run()[0] == 0
    before = run.evidence.read_text()
    code, _, err = run(*extra)
    assert code == 1
    assert message in err
    assert "choose another --output" in err
    assert run.evidence.read_text() == before


def test_foreign_evidence_is_left_alone(run):
    for text in ("something else", "something else\n", '{"schema": "other"}\n'):
        run.evidence.write_text(text)
        code, _, err = run()
        assert code == 1 and str(run.evidence) in err
        assert run.evidence.read_text() == text


def test_more_problems_can_follow(run):
    assert run("--limit", "12")[0] == 0
    assert len(read_evidence(run.evidence)[1]) == 12
    assert run()[0] == 0
    assert len(read_evidence(run.evidence)[1]) == NUM_PROBLEMS


def test_too_few_problems_are_refused_before_a_model_is_loaded(run):
    code, out, err = run("--limit", "10", make_llm=no_llm)
    assert (code, out) == (1, "")
    assert "10 problems are too few" in err and "needs 11" in err
    assert "a budget of 0.2057 at best" in err
    code, _, err = run("--budget", "0.2057", "--limit", "10")
    assert code == 0, err


def test_problems_that_fail_do_not_count(run):
    rows = run.data.read_text().splitlines()
    rows[3] = json.dumps({"question": "x" * 3000})
    run.data.write_text("\n".join(rows))
    code, _, err = run()
    assert code == 0 and "1 of 20 problems failed" in err
    assert json.loads(run.output.read_text())["counts"]["problems"] == NUM_PROBLEMS - 1
    run.output.unlink()
    code, _, err = run("--limit", "11")
    assert code == 1 and "10 problems without an error are too few" in err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--budget", "0"], "--budget 0.0 must be above 0"),
        (["--budget", "0.6"], "at most 0.5"),
        (["--budget", "nan"], "--budget nan"),
        (["--confidence", "0.5"], "--confidence 0.5"),
        (["--confidence", "1"], "below 1"),
        (["--limit", "0"], "--limit 0"),
        (["--branches", "0"], "branches=0"),
        (["--temperature", "-1"], "temperature"),
        (["--signal", "entropy"], "signal"),
        (["--budgets", "1"], "unknown option '--budgets'; did you mean --budget"),
        (["--depth", "2"], "unknown option '--depth'"),
        (["--data", "none.jsonl"], "none.jsonl cannot be read"),
        (["--output", "none/gates.json"], "cannot be written"),
    ],
)
def test_wrong_usage(run, extra, message):
    code, out, err = run(*extra, make_llm=no_llm)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("name", ["--data", "--output"])
def test_files_must_be_named(name, capsys):
    other = {"--data": "--output", "--output": "--data"}[name]
    assert main([other, "x.json"], no_llm) == 2
    assert f"{name} is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        ('{"question": "a"}\n[1]', "line 2 must be an object"),
        ('{"text": "a"}', "question, problem, prompt"),
        ('{"question": "a", "prompt": "b"}', "one text"),
        ('{"question": "a", "question": "b"}', "'question' is there twice"),
        ('{"question": "a", "answer": NaN}', "NaN is no number"),
        ("[" * 500 + "]" * 500, "nested more than 100 levels"),
        ('{"question": " "}', "line 1"),
        ('{"question": "a", "answer": [1]}', "answer [1]"),
    ],
)
def test_bad_data_is_named_by_its_line(run, text, message):
    run.data.write_text(text)
    code, _, err = run(make_llm=no_llm)
    assert code == 2 and message in err


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_data_in_another_encoding_is_named(run, encoding):
    run.data.write_text(run.data.read_text(), encoding=encoding)
    code, _, err = run(make_llm=no_llm)
    assert code == 2 and encoding[:6].upper() in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_only_regular_files_are_read_and_written(run):
    run.data.unlink()
    os.mkfifo(run.data)
    code, _, err = run(make_llm=no_llm)
    assert code == 2 and "no regular file" in err
    for path in (run.output, run.evidence):
        os.mkfifo(path)
        code, _, err = run(make_llm=no_llm)
        assert code == 2 and f"--output {path} cannot be written" in err
        path.unlink()


def test_two_runs_do_not_collect_into_one_file(run):
    with GrowingFile(run.evidence, "evidence"):
        code, _, err = run(make_llm=no_llm)
    assert code == 1 and f"evidence {run.evidence} is being written by another run" in err
    assert run()[0] == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("is_closed", [True, False])
def test_what_stdout_does_not_take_is_an_error_and_the_gates_are_written(run, monkeypatch, is_closed):
    with open("/dev/full", "w") as full, monkeypatch.context() as context:
        context.setattr("sys.stdout", None if is_closed else full)
        code, _, err = run()
    assert code == 1 and "standard output" in err
    assert read_gates_file(run.output, run.model).gates.exact


def test_help_and_version_need_nothing(capsys):
    assert main(["--help"], no_llm) == 0
    assert "--budget" in capsys.readouterr().out
    assert main(["--version"], no_llm) == 0


def test_without_decode_exit_none_is_chosen(run, model):
    assert run("--decode-exit", "off", "--signal", "tail")[0] == 0
    gates = read_gates(run.output, model)
    assert gates.decode_exit == ()
    assert gates.signal == "tail"
