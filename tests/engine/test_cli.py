"""The command line: what goes where, which exit code, and nothing silently ignored."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from minirksc import LLM
from minirksc.cli.generate import DEFAULT_TOKENS_PER_STEP, Job, build_parser, main
from minirksc.cli.output import print_json, print_solve, print_stats, to_json
from minirksc.engine.host import Cpus
from minirksc.options import ConfigError, SamplingParams
from minirksc.rksc.solver import DEFAULT_SAMPLING, BranchResult, SolveResult


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MINIRKSC_")]:
        monkeypatch.delenv(name)


def never(**options):
    raise AssertionError("the model was loaded")


def job(*arguments):
    """A command line as it was understood."""
    return Job(build_parser().parse([str(a) for a in arguments]))


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama(tokenizer=True, chat=True, max_len=256)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, kv_cache_bytes="2MiB") as llm:
        yield llm


@pytest.fixture()
def run(llm, capsys, monkeypatch):
    """Runs a command line on one loaded model; gives (code, stdout, stderr)."""

    class Kept:
        def __enter__(self):
            return llm

        def __exit__(self, *error):
            return None

    def call(*arguments):
        code = main([str(a) for a in arguments], make_llm=lambda **options: Kept())
        out, err = capsys.readouterr()
        assert llm.stats()["num_blocks_used"] == 0
        return code, out, err

    return call


def test_text_goes_to_stdout_and_everything_else_to_stderr(run):
    code, out, err = run("hello", "--max-tokens", 5, "--temperature", 0, "--ignore-eos", "--stats")
    assert code == 0 and out.endswith("\n") and "cut at 5 tokens" in err and "tokens/s" in err
    again = run("hello", "--max-tokens", 5, "--temperature", 0, "--ignore-eos")
    assert again[1] == out and "tokens/s" not in again[2]


def test_json_has_the_promised_fields(run, llm):
    code, out, err = run("hello", "--json", "--max-tokens", 4, "--temperature", 0, "--ignore-eos", "--logprobs", 2)
    record = json.loads(out)
    assert code == 0 and err == ""
    fields = {"text", "token_ids", "finish_reason", "prompt_token_ids", "num_cached_tokens", "stats", "logprobs"}
    assert set(record) == fields
    assert record["finish_reason"] == "length" and len(record["token_ids"]) == 4
    assert record["prompt_token_ids"] == llm.tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    plain = json.loads(run("hello", "--json", "--no-chat", "--max-tokens", 4, "--system", "")[1])
    assert plain["prompt_token_ids"] == llm.tokenizer.encode("hello")
    several = json.loads(run("hello", "--json", "--n", 3, "--seed", 1, "--max-tokens", 4)[1])
    assert [o["index"] for o in several["outputs"]] == [0, 1, 2]


def test_system_message_and_samples(run, llm):
    record = json.loads(run("hi", "--json", "--system", "Be brief.", "--max-tokens", 2)[1])
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert record["prompt_token_ids"] == llm.tokenizer.encode_chat(chat)
    code, out, _ = run("hi", "--n", 2, "--seed", 1, "--max-tokens", 3)
    assert code == 0 and "--- sample 1" in out and "--- sample 2" in out


def test_solver_prints_a_table_and_an_answer(run, tmp_path):
    trace = tmp_path / "trace.json"
    code, out, err = run("2+2?", "--branches", 3, "--tokens-per-step", 6, "--trace", trace, "--seed", 3)
    assert code == 0 and all("the answer was cut at 6 tokens" in line for line in err.splitlines())
    assert "P(YES)" in out and "Branch " in out and "3 branches in" in out and "\x1b" not in out
    assert [node["path"] for node in json.loads(trace.read_text())["nodes"]] == [[0], [1], [2]]
    record = json.loads(run("2+2?", "--branches", 3, "--depth", 2, "--tokens-per-step", 4, "--json")[1])
    assert {"answer", "parsed", "branches", "stats", "best"} <= set(record)
    wanted = {"text", "token_ids", "score", "confidence", "sharing", "similarity", "exit_layer", "finish_reason"}
    assert len(record["branches"]) == 3 and wanted <= set(record["branches"][0])
    assert record["branches"][0]["sharing"] == "exact"


def test_hints_and_phrasings_come_from_files(run, tmp_path):
    (tmp_path / "hints").write_text("First:\n\nSecond:\n")
    (tmp_path / "phrasings").write_text("What is 2+2?\nAdd 2 and 2.\n")
    arguments = ("2+2?", "--branches", 2, "--tokens-per-step", 3, "--json", "--verify", "never")
    record = json.loads(run(*arguments, "--hints", tmp_path / "hints", "--phrasings", tmp_path / "phrasings")[1])
    assert [b["hint"] for b in record["branches"]] == ["First:", "Second:"]
    code, _, err = run("x", "--branches", 3, "--phrasings", tmp_path / "phrasings")
    assert code == 2 and "2 lines for 3 branches" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--brnches", "2"], "did you mean --branches"), (["x", "--temp", "1"], "unknown option '--temp'"),
        (["x", "--max-num-seqs", "2"], "vLLM calls it so, here it is --max-batch-requests"),
        (["x", "--tensor-parallel-size=2"], "one process on one device"), (["x", "--enable-prefix-caching"], "unknown"),
        (["x", "--nochat"], "--no-chat"), (["x", "y"], "into quotes"), (["x", "--stats=1"], "--stats"),
        (["x", "--depth", "2"], "--depth needs --branches"), (["x", "--trace", "f"], "--trace needs --branches"),
        (["x", "--hints", "f"], "--hints needs"), (["x", "--select", "vote"], "--select needs"),
        (["x", "--branches", "2", "--n", "2"], "--n does not go with --branches"),
        (["x", "--branches", "2", "--logprobs", "2", "--json"], "--logprobs does not go with --branches"),
        (["x", "--branches", "2", "--max-tokens", "9"], "use --tokens-per-step"),
        (["x", "--branches", "2", "--system", "s"], "--system does not go with --branches"),
        (["x", "--branches", "0"], "branches"), (["x", "--branches", "2", "--tokens-per-step", "0"], "tokens_per_step"),
        (["x", "--branches", "2", "--depth", "2", "--beam", "3"], "beam"),
        (["x", "--branches", "4", "--beam", "2"], "--beam needs --depth"),
        (["x", "--branches", "2", "--verify", "never", "--verify-style", "append"], "--verify-style does not go"),
        (["x", "--branches", "2", "--min-tokens", "200"], f"--tokens-per-step {DEFAULT_TOKENS_PER_STEP}"),
        (["x", "--branches", "2", "--trace", "no/such/t.json"], "--trace no/such/t.json cannot be written"),
        (["x", "--branches", "2", "--sharing", "fuzzy"], "invalid choice"),
        (["x", "--branches", "2", "--tau", "0.9"], "needs sharing='semantic'"),
        (["x", "--branches", "2", "--sharing", "semantic"], "give them with --phrasings"),
        (["x", "--branches", "2", "--policy", "paper", "--gates", "g"], "leave gates out"),
        (["x", "--branches", "2", "--verify", "never", "--decode-exit", "off"], "needs verify='auto'"),
        (["x", "--uncalibrated"], "needs --branches"), (["x", "--gates", "g.json"], "needs --branches"),
        (["x", "--hints", "no/such", "--branches", "2"], "no/such"),
        (["x", "--logprobs", "2"], "--json"), (["x", "--input", "f"], "go together"),
        (["x", "--output", "f"], "go together"), (["x", "--input", "f", "--output", "o"], "does not go with PROMPT"),
        (["--input", "f", "--output", "o", "--branches", "2", "--trace", "t"], "does not go with --trace"),
        (["--input", "no/such", "--output", "o"], "no/such"),
        (["x", "--no-chat", "--system", "s"], "--system does not go with --no-chat"),
        ([""], "empty"), (["  "], "empty"), (["x", "--stop", ""], "stop"),
        (["x", "--temperature", "-1"], "temperature"), (["x", "--temperature", "nan"], "temperature"),
        (["x", "--top-p", "2"], "top_p"), (["x", "--top-k", "a"], "invalid int value: 'a'"),
        (["x", "--max-tokens", "0"], "max_tokens"), (["x", "--seed", "-1"], "seed"), (["x", "--n"], "expected one"),
        (["x", "--kv-cache-bytes", "lots"], "not a size"), (["x", "--dtype", "int3"], "invalid choice"),
        (["x", "--device", "tpu"], "device"), (["x", "--threads", "0"], "threads"),
        (["x", "--min-tokens", "9", "--max-tokens", "3"], "min_tokens 9"),
        (["x", "--n", "2", "--temperature", "0"], "equal samples"), (["x", "--eviction", "none"], "invalid choice"),
    ],
)  # fmt: skip
def test_wrong_command_lines_exit_with_2_before_a_model_is_loaded(arguments, message, capsys):
    assert main(arguments, make_llm=never) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert err.startswith("minirksc: error: ") and err.count("\n") == 1


def test_options_reach_what_they_are_for(tmp_path):
    flags = "--temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty -1"
    flags += " --frequency-penalty 0.5 --seed 3 --min-tokens 2 --max-tokens 9 --n 2 --logprobs 4 --ignore-eos --json"
    params = job("x", *flags.split(), "--stop", "a", "--stop", "b c").params
    wanted = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1, presence_penalty=-1.0,
        frequency_penalty=0.5, seed=3, min_tokens=2, max_tokens=9, n=2, logprobs=4, ignore_eos=True, stop=("a", "b c"),
    )  # fmt: skip
    assert params == wanted
    engine = "--dtype float32 --device cpu --backend torch --threads 2 --kv-cache-bytes 2GiB --block-size 8"
    engine += " --max-model-len 99 --max-batch-tokens 64 --eviction lru --model some/folder"
    assert job("x", *engine.split()).engine_options == {
        "dtype": "float32", "device": "cpu", "backend": "torch", "threads": 2, "kv_cache_bytes": "2GiB",
        "block_size": 8, "max_model_len": 99, "max_batch_tokens": 64, "eviction": "lru", "model": "some/folder",
    }  # fmt: skip
    rules = "--branches 4 --depth 3 --beam 3 --tokens-per-step 11 --sharing none --verify-style standalone"
    config = job("x", *rules.split(), "--select", "vote", "--no-chat").solver_config
    assert (config.branches, config.depth, config.beam, config.tokens_per_step) == (4, 3, 3, 11)
    assert (config.sharing, config.verify_style, config.select, config.chat) == ("none", "standalone", "vote", False)


def test_a_sampling_option_leaves_the_solvers_other_ones_alone():
    plain, seeded = (job("x", "--branches", 2, *more).solver_config for more in ((), ("--seed", 9)))
    assert plain.tokens_per_step == seeded.tokens_per_step == DEFAULT_TOKENS_PER_STEP
    for config, seed in ((plain, DEFAULT_SAMPLING.seed), (seeded, 9)):
        sampling = config.step_sampling
        assert (sampling.temperature, sampling.top_p) == (DEFAULT_SAMPLING.temperature, DEFAULT_SAMPLING.top_p)
        assert sampling.seed == seed and sampling.max_tokens == DEFAULT_TOKENS_PER_STEP
    wide = job("x", "--branches", 2, "--tokens-per-step", 600, "--min-tokens", 300).solver_config.step_sampling
    assert (wide.min_tokens, wide.max_tokens) == (300, 600)


def test_the_environment_fills_in_and_the_command_line_wins(run, monkeypatch):
    monkeypatch.setenv("MINIRKSC_MAX_TOKENS", "3")
    monkeypatch.setenv("MINIRKSC_JSON", "1")
    monkeypatch.setenv("MINIRKSC_IGNORE_EOS", "yes")
    assert len(json.loads(run("hi")[1])["token_ids"]) == 3
    assert len(json.loads(run("hi", "--max-tokens", 2)[1])["token_ids"]) == 2
    monkeypatch.setenv("MINIRKSC_MAX_TOKENS", "")
    assert len(json.loads(run("hi", "--max-tokens", 4)[1])["token_ids"]) == 4
    monkeypatch.setenv("MINIRKSC_JSON", "0")
    assert not run("hi", "--max-tokens", 2)[1].startswith("{")


@pytest.mark.parametrize(
    ("name", "value", "arguments", "message"),
    [
        ("MAX_TOKENS", "many", [], "invalid int"), ("TEMPERATURE", "-1", [], "temperature -1.0"),
        ("KV_CACHE_BYTES", "lots", [], "not a size"), ("DTYPE", "int3", [], "invalid choice"),
        ("JSON", "perhaps", [], "must be 1 or 0"), ("DEPTH", "2", [], "needs --branches"),
        ("MAX_TOKENS", "5", ["--branches", "2"], "does not go with --branches"),
        ("CHAT", "0", ["--system", "s"], "go with"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_environment_is_named(name, value, arguments, message, monkeypatch, capsys):
    monkeypatch.setenv(f"MINIRKSC_{name}", value)
    assert main(["x", *arguments], make_llm=never) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"MINIRKSC_{name}" in err and message in err and err.count("\n") == 1


def test_every_flag_has_a_variable_and_other_variables_do_no_harm(monkeypatch):
    monkeypatch.setenv("MINIRKSC_VERSION", "1.0")
    monkeypatch.setenv("MINIRKSC_PROMPT", "not a flag")
    monkeypatch.setenv("MINIRKSC_STOP", "end here")
    monkeypatch.setenv("MINIRKSC_CHAT", "no")
    understood = job("mine", "--seed", 1)
    assert understood.prompt == "mine" and understood.params.stop == ("end here",)
    assert understood.options.chat is False and set(understood.options.variables) == {"stop", "chat"}
    assert job("mine", "--stop", "a", "--chat").params.stop == ("a",)


def test_runtime_errors_exit_with_1_in_one_line(run, tiny_llama, capsys):
    code, out, err = run("x" * 500)
    assert code == 1 and out == "" and "max_model_len 256" in err and err.count("\n") == 1
    assert main(["hi", "--model", "/no/such/folder"]) == 1
    assert "smollm2-135m" in capsys.readouterr().err
    bare = str(tiny_llama())
    assert main(["hi", "--model", bare]) == 1
    assert "no tokenizer" in capsys.readouterr().err
    no_template = str(tiny_llama(tokenizer=True))
    for arguments in (["--chat"], ["--chat", "--branches", "2"], ["--system", "s"]):
        assert main(["hi", "--model", no_template, *arguments]) == 1
        assert "--no-chat" in capsys.readouterr().err
    assert main(["hi", "--model", no_template, "--max-tokens", "2"]) == 0


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), MemoryError(), OSError("disk"), ConfigError("late")])
def test_no_error_shows_a_traceback_unless_asked(error, monkeypatch, capsys):
    def fail(**options):
        raise error

    assert main(["x"], make_llm=fail) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minirksc: error: ") and err.count("\n") == 1
    monkeypatch.setenv("MINIRKSC_DEBUG", "1")
    assert main(["x"], make_llm=fail) == 1
    assert "Traceback" in capsys.readouterr().err


def result_with(text, finish_reason="stop"):
    branch = BranchResult(
        text, [1, 2], 0.5, float("nan"), None, "exact", None, None, finish_reason, text, 1, (0,), "", 3, 4, 0.0, None
    )  # fmt: skip
    stats = dict.fromkeys(("total_s", "prefill_s", "decode_s", "verify_s"), 0.0)
    stats |= {"num_prefilled_tokens": 1, "num_decoded_tokens": 2}
    return SolveResult(text, text, 0, [branch], stats, "exact", {"gates": []})


@pytest.mark.parametrize("text", [r"\[/b] x", r"a \[x^2\] b", "[red]x[/red]", "[/]", ""])
def test_a_models_text_is_no_markup(text, capsys):
    print_solve(result_with(text))
    out, err = capsys.readouterr()
    assert err == "" and out.count(text) >= 3 and f"Branch 1: {text}" in out


def test_a_models_text_cannot_break_the_table_and_a_cut_answer_is_said(capsys):
    print_solve(result_with("a\x1b[2J\nb", "length"))
    out, err = capsys.readouterr()
    table, _, answer = out.partition("Branch 1:")
    assert "\x1b" not in table and "a [2J b" in table and answer == " a\x1b[2J\nb\n"
    assert "cut at 2 tokens" in err


def test_json_is_valid_whatever_it_holds(monkeypatch):
    assert json.loads(to_json({"a": float("nan"), "b": [float("-inf"), {"c": (1.5,)}]})) == {
        "a": None, "b": [None, {"c": [1.5]}],
    }  # fmt: skip
    assert to_json({"a": "é\u2028"}) == '{"a": "é\u2028"}'
    assert to_json({"a": "é\ud800"}).isascii()
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", narrow)
    print_json({"a": "é"})
    assert json.loads(narrow.buffer.getvalue()) == {"a": "é"}


def write_jsonl(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_batch_answers_every_line_and_says_which_failed(run, llm, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = [
        json.dumps("plain text"), {"prompt": "hi", "id": "a", "params": {"max_tokens": 2}},
        {"messages": [{"role": "user", "content": "hi"}]}, {"prompt_token_ids": [5, 6, 7]},
        {"prompt": "hi", "params": {"max_new_tokens": 3}, "id": ["\ud800", 1]},
    ]  # fmt: skip
    bad = {
        "not json": "not JSON", json.dumps(5): "string or an object", json.dumps({"prompt": ""}): "not empty",
        json.dumps({"promt": "x"}): "['promt']", json.dumps({"prompt": "x", "messages": []}): "takes one of",
        json.dumps({"prompt": "x" * 600}): "max_model_len", json.dumps({"prompt": "\ud800"}): "ud800",
        json.dumps({"prompt": 5}): "prompt must be", json.dumps({"messages": [1, 2]}): "messages must be",
        json.dumps({"messages": [{"role": "x"}]}): "content", json.dumps({"prompt_token_ids": [1.5]}): "whole number",
        json.dumps({"prompt_token_ids": [True]}): "whole number",
        json.dumps({"prompt_token_ids": ["1"]}): "whole number",
        json.dumps({"prompt_token_ids": [10**9]}): "1000000000",
        json.dumps({"prompt_token_ids": [{"role": "user", "content": "x"}]}): "whole number",
        json.dumps({"prompt": "x", "params": "y"}): "params must be an object",
        json.dumps({"prompt": "x", "params": {"top_q": 1}}): "did you mean",
        json.dumps({"prompt": "x", "params": {"stop": 5}}): "", json.dumps({"prompt": "x", "params": {"n": 0}}): "n 0",
    }  # fmt: skip
    write_jsonl(source, *good, *bad)
    code, out, err = run("--input", source, "--output", target, "--max-tokens", 4, "--temperature", 0, "--ignore-eos")
    records = read_jsonl(target)
    num_lines = len(good) + len(bad)
    assert code == 1 and out == "" and "Traceback" not in err
    assert [record["line"] for record in records] == list(range(1, num_lines + 1))
    assert [len(record["token_ids"]) for record in records[: len(good)]] == [4, 2, 4, 4, 3]
    assert "id" not in records[0] and records[1]["id"] == "a" and records[4]["id"] == ["\ud800", 1]
    assert records[3]["prompt_token_ids"] == [5, 6, 7]
    assert records[2]["prompt_token_ids"] == llm.tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    for record, (line, message) in zip(records[len(good) :], bad.items(), strict=True):
        assert message in record["error"], line
        assert f"minirksc: line {record['line']}: " in err
    assert f"{len(bad)} of {num_lines} lines failed" in err


def test_batch_reads_bytes_that_are_no_text_and_marks_of_other_editors(run, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'\xef\xbb\xbf"one"\r\n\r\n"\xff"\n"three"')
    code, _, _ = run("--input", source, "--output", target, "--max-tokens", 2)
    records = read_jsonl(target)
    assert code == 1 and [(r["line"], "error" in r) for r in records] == [(1, False), (3, True), (4, False)]


def test_system_message_and_template_in_a_batch(run, llm, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    user, own, ours = ({"role": r, "content": c} for r, c in (("user", "hi"), ("system", "own"), ("system", "ours")))
    write_jsonl(source, {"messages": [user]}, {"messages": [own, user]}, {"prompt": "hi"})
    assert run("--input", source, "--output", target, "--max-tokens", 1, "--system", "ours")[0] == 0
    wanted = [llm.tokenizer.encode_chat(chat) for chat in ([ours, user], [own, user], [ours, user])]
    assert [record["prompt_token_ids"] for record in read_jsonl(target)] == wanted
    target.unlink()
    assert run("--input", source, "--output", target, "--max-tokens", 1, "--no-chat")[0] == 1
    records = read_jsonl(target)
    assert ["error" in record for record in records] == [True, True, False] and "--no-chat" in records[0]["error"]
    assert records[2]["prompt_token_ids"] == llm.tokenizer.encode("hi")


def results(text):
    """Records without what depends on the cache."""
    return [{**json.loads(line), "num_cached_tokens": None} for line in text.splitlines()]


def test_batch_goes_on_where_it_was(run, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, *[{"prompt": f"number {i}"} for i in range(6)])
    arguments = ("--input", source, "--output", target, "--max-tokens", 3, "--temperature", 0)
    assert run(*arguments)[0] == 0
    whole = target.read_text()
    torn = whole.splitlines(keepends=True)
    target.write_text("".join(torn[:3]) + torn[3][:20])  # killed while it wrote the fourth
    assert run(*arguments)[0] == 0
    assert results(target.read_text()) == results(whole)
    done = target.read_bytes()
    assert main([str(a) for a in arguments], make_llm=never) == 0  # nothing is left to do
    write_jsonl(source, *[{"prompt": f"changed {i}"} for i in range(6)])
    code, _, err = run(*arguments)
    assert code == 2 and "another line 1" in err and "choose another file" in err and target.read_bytes() == done


@pytest.mark.parametrize("cut", [1, 12, 30, 60])
def test_a_torn_result_is_computed_again(run, tmp_path, cut):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, "one", "two")
    source.write_text('"one"\n"two"\n')
    assert run("--input", source, "--output", target, "--max-tokens", 3, "--temperature", 0)[0] == 0
    whole = target.read_text()
    for kept in (0, 1):
        lines = whole.splitlines(keepends=True)
        target.write_text("".join(lines[:kept]) + lines[kept][:cut])
        assert run("--input", source, "--output", target, "--max-tokens", 3, "--temperature", 0)[0] == 0
        assert results(target.read_text()) == results(whole)


FOREIGN = ("my notes\n", "my notes", '{"line": 1}', '{"line": 1}\n', "[]\n", "\n", '{"line": [], "input_hash": ""}\n')


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, capsys, content):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, {"prompt": "hi"})
    target.write_text(content)
    assert main(["--input", str(source), "--output", str(target)], make_llm=never) == 2
    assert "no result of this program" in capsys.readouterr().err and target.read_text() == content


@pytest.mark.parametrize("content", ['"hi"', '"hi"\n'])
def test_the_input_is_not_taken_for_the_output(tmp_path, capsys, content):
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    assert main(["--input", str(source), "--output", str(source)], make_llm=never) == 2
    assert "same file" in capsys.readouterr().err and source.read_text() == content


def test_batch_with_the_solver_and_an_output_that_cannot_be_written(run, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    others = ({"messages": [{"role": "user", "content": "2+2?"}]}, {"prompt_token_ids": [5, 6, 7]})
    write_jsonl(source, "broken", {"prompt": "2+2?"}, {"prompt": "2+2?", "params": {"seed": 1}}, *others)
    code, _, _ = run("--input", source, "--output", target, "--branches", 2, "--tokens-per-step", 3)
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert code == 1 and "error" in records[0] and len(records[1]["branches"]) == 2
    assert records[0]["line"] == 1 and "params" in records[2]["error"]
    assert [len(record["branches"]) for record in records[3:]] == [2, 2]
    for wrong in (tmp_path / "no" / "such", tmp_path):
        assert main(["--input", str(source), "--output", str(wrong)], make_llm=never) == 2
        err = capsys.readouterr().err
        assert "cannot be written" in err or "no result of this program" in err


def test_an_interrupted_batch_keeps_what_it_has(run, llm, tmp_path, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, *[{"prompt": f"number {i}"} for i in range(40)])
    generate, calls = llm.generate, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(llm, "generate", interrupted)
    code, _, err = run("--input", source, "--output", target, "--max-tokens", 1)
    assert code == 130 and err.endswith("interrupted\n")
    assert "32 of 40 done" in err and "the same command goes on" in err
    assert len(target.read_text().splitlines()) == 32
    monkeypatch.undo()
    assert run("--input", source, "--output", target, "--max-tokens", 1)[0] == 0
    assert len(target.read_text().splitlines()) == 40


@pytest.mark.parametrize("arguments", [["-"], []])
@pytest.mark.parametrize(
    ("raw", "code", "expected"),
    [
        ("héllo\n".encode(), 0, "héllo"), (b"\xef\xbb\xbfhi\r\n", 0, "hi"), (b"a\n\n", 0, "a\n"),
        (b"", 2, "the prompt is empty"), (b"\n", 2, "the prompt is empty"), (b"\xff", 2, "not UTF-8"),
        (None, 2, "PROMPT"),
    ],
)  # fmt: skip
def test_standard_input_is_a_prompt(arguments, raw, code, expected, monkeypatch, capsys):
    stdin = None if raw is None else io.TextIOWrapper(io.BytesIO(raw), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    if code == 0:
        assert job(*arguments).prompt == expected
    else:
        assert main(arguments, make_llm=never) == code
        assert expected in capsys.readouterr().err


def test_an_interruption_while_reading_and_while_loading(monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    assert main(["x"], make_llm=interrupt) == 130
    monkeypatch.setattr("minirksc.cli.files.read_stdin", interrupt)
    assert main(["-"], make_llm=never) == 130
    assert capsys.readouterr().err == "minirksc: interrupted\n" * 2


def test_help_and_version(capsys):
    assert main(["--help"], make_llm=never) == 0
    text = capsys.readouterr().out
    assert "default: 512" in text and f"default: {DEFAULT_TOKENS_PER_STEP}" in text
    assert text.count("\n  python -m ") == 3
    assert main(["--version"], make_llm=never) == 0
    assert capsys.readouterr().out.startswith("minirksc ")


def command(folder, *arguments):
    return [sys.executable, "-m", "minirksc.generate", "--model", str(folder), "--threads", "1", *arguments]


def test_as_a_process(folder):
    piped = subprocess.run(
        command(folder, "-", "--max-tokens", "3"), input="héllo", capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert piped.stdout.endswith("\n")
    closed = subprocess.run(
        f"{' '.join(command(folder, 'x', '--max-tokens', '50', '--ignore-eos'))} | true",
        shell=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in closed.stderr and "BrokenPipe" not in closed.stderr
    if os.path.exists("/dev/full"):
        line = " ".join(command(folder, "x", "--max-tokens", "2")) + " > /dev/full"
        full = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        assert full.returncode == 1 and full.stderr.startswith("minirksc: error: ") and full.stderr.count("\n") == 1
    usage = subprocess.run(command(folder, "x", "--nope"), capture_output=True, text=True, check=False)
    assert usage.returncode == 2 and "Traceback" not in usage.stderr
    code = "import sys; from minirksc.cli.generate import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_stops_cleanly_with_130(folder):
    endless = command(folder, "hi", "--max-tokens", "150", "--ignore-eos", "--block-size", "1")
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)  # it is generating
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been done already
        assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err


def test_statistics_speak_of_windows_where_there_are_some(llm, capsys):
    print_stats(llm.stats())
    assert "windows" not in capsys.readouterr().err
    windows = {"num_window_blocks_total": 9, "num_window_blocks_used": 2, "kv_bytes_used_window": 3 << 20}
    print_stats({**llm.stats(), **windows})
    assert "windows: 2 blocks used" in (err := capsys.readouterr().err) and "3.0 MiB" in err


def test_statistics_say_where_seconds_and_memory_went(run, llm):
    stats = llm.stats()
    assert 0 < stats["pack_s"] < stats["load_s"] and stats["peak_resident_bytes"] >= stats["resident_bytes"] > 50e6
    plain = run("hi", "--max-tokens", 2, "--stats")[2]
    assert f"loaded in {stats['load_s']:.2f} s ({stats['pack_s']:.2f} s of it packing)" in plain
    assert "MiB resident, at most" in plain and "steps of decoding" in plain and "solver:" not in plain
    solved = run("2+2?", "--branches", 2, "--tokens-per-step", 4, "--verify", "always", "--stats", "--json")
    (line,) = [line for line in solved[2].splitlines() if line.startswith("solver: ")]
    seconds = json.loads(solved[1])["stats"]
    phases = ("prefill_s", "for prompts"), ("decode_s", "decoding"), ("verify_s", "verifying")
    assert line == "solver: " + ", ".join(f"{seconds[name]:.2f} s {text}" for name, text in phases)


def test_statistics_of_a_batch_add_its_problems_up(llm, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, {"prompt": "one"}, {"prompt": "two"})
    understood = job("--input", source, "--output", target, "--branches", 2, "--tokens-per-step", 3)
    assert understood.run(lambda **options: contextlib.nullcontext(llm)) == 0
    seconds = sum(record["stats"]["decode_s"] for record in read_jsonl(target))
    assert understood.solver_s["decode_s"] == pytest.approx(seconds) and seconds > 0


def test_warnings_are_lines_on_stderr(folder, monkeypatch, capsys):
    before = torch.get_num_threads()
    monkeypatch.setattr("minirksc.llm.read_cpus", lambda: Cpus(frozenset({0})))
    assert main(["hi", "--model", str(folder), "--max-tokens", "1", "--threads", "2"]) == 0
    (warning, _) = capsys.readouterr().err.splitlines()
    assert warning.startswith("minirksc: warning: threads 2 is more than the 1 CPU ") and "--threads" in warning
    assert torch.get_num_threads() == before


def test_loading_shows_progress_to_a_person_who_waits(folder, monkeypatch, capsys):
    arguments = ["hi", "--model", str(folder), "--max-tokens", "1"]
    monkeypatch.setattr("minirksc.cli.generate.is_terminal", lambda stream: stream is sys.stderr)
    assert main(arguments) == 0
    assert "layer" not in capsys.readouterr().err  # it took no time
    monkeypatch.setattr("minirksc.engine.loading.SILENT_S", 0)
    assert main(arguments) == 0
    assert "layer" in capsys.readouterr().err
    monkeypatch.setattr("minirksc.cli.generate.is_terminal", lambda stream: False)
    assert main(arguments) == 0
    LLM(folder).close()
    assert "layer" not in capsys.readouterr().err
