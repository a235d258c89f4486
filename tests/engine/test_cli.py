"""The command line: what goes where, which exit code, and nothing silently ignored."""

import json
import os
import signal
import subprocess
import sys

import pytest

from minirksc import LLM
from minirksc.generate import main


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
        code = main([str(a) for a in arguments], make_llm=lambda model, **options: Kept())
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
    assert code == 0 and err == ""
    assert "P(YES)" in out and "Branch " in out and "3 branches in" in out
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
        (["x", "--depth", "2"], "--depth needs --branches"), (["x", "--trace", "f"], "--trace needs --branches"),
        (["x", "--branches", "2", "--n", "2"], "--n does not go with --branches"),
        (["x", "--branches", "2", "--max-tokens", "9"], "use --tokens-per-step"),
        (["x", "--branches", "0"], "branches"), (["x", "--branches", "2", "--beam", "3"], "beam"),
        (["x", "--logprobs", "2"], "--json"), (["x", "--input", "f"], "go together"),
        ([""], "empty"), (["  "], "empty"),
        (["x", "--temperature", "-1"], "temperature"), (["x", "--top-p", "2"], "top_p"),
        (["x", "--top-k", "a"], "invalid int"),
        (["x", "--kv-cache-bytes", "lots"], "not a size"), (["x", "--dtype", "int3"], "invalid choice"),
        (["x", "--min-tokens", "9", "--max-tokens", "3"], "min_tokens 9"),
        (["x", "--n", "2", "--temperature", "0"], "equal samples"),
        (["x", "--hints", "no/such", "--branches", "2"], "no/such"), (["x", "y"], "unknown option 'y'"),
        (["--input", "no/such", "--output", "o"], "no/such"), (["x", "--eviction", "none"], "invalid choice"),
    ],
)  # fmt: skip
def test_wrong_command_lines_exit_with_2_before_a_model_is_loaded(arguments, message, capsys):
    def never(model, **options):
        raise AssertionError("the model was loaded")

    assert main(arguments, make_llm=never) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


def test_the_environment_fills_in_and_the_command_line_wins(run, monkeypatch):
    monkeypatch.setenv("MINIRKSC_MAX_TOKENS", "3")
    monkeypatch.setenv("MINIRKSC_JSON", "1")
    monkeypatch.setenv("MINIRKSC_IGNORE_EOS", "yes")
    assert len(json.loads(run("hi")[1])["token_ids"]) == 3
    assert len(json.loads(run("hi", "--max-tokens", 2)[1])["token_ids"]) == 2
    monkeypatch.setenv("MINIRKSC_MAX_TOKENS", "many")
    code, _, err = run("hi")
    assert code == 2 and "MINIRKSC_MAX_TOKENS" in err


def test_runtime_errors_exit_with_1_in_one_line(run, tiny_llama, capsys):
    code, out, err = run("x" * 500)
    assert code == 1 and out == "" and "max_model_len 256" in err and err.count("\n") == 1
    assert main(["hi", "--model", "/no/such/folder"]) == 1
    assert "smollm2-135m" in capsys.readouterr().err
    bare = str(tiny_llama())
    assert main(["hi", "--model", bare]) == 1
    assert "no tokenizer" in capsys.readouterr().err
    no_template = str(tiny_llama(tokenizer=True))
    assert main(["hi", "--model", no_template, "--chat"]) == 1
    assert "--no-chat" in capsys.readouterr().err
    assert main(["hi", "--model", no_template, "--max-tokens", "2"]) == 0


def write_jsonl(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def test_batch_answers_every_line_and_says_which_failed(run, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        json.dumps("plain text"), {"prompt": "hi", "id": "a", "params": {"max_tokens": 2}}, "not json",
        {"messages": [{"role": "user", "content": "hi"}]}, {"prompt_token_ids": [5, 6, 7]}, {"prompt": ""},
        {"promt": "x"}, {"prompt": "x" * 600}, {"prompt": "hi", "params": {"top_q": 1}},
    ]  # fmt: skip
    write_jsonl(source, *lines)
    code, out, err = run("--input", source, "--output", target, "--max-tokens", 4, "--temperature", 0, "--ignore-eos")
    records = {r["line"]: r for r in map(json.loads, target.read_text().splitlines())}
    assert code == 1 and out == "" and len(records) == len(lines)
    assert [n for n, r in records.items() if "error" in r] and {n for n in records if "error" in records[n]} == {
        3,
        6,
        7,
        8,
        9,
    }
    assert "line 3 is not JSON" in records[3]["error"] and "minirksc: line 3" in err and "5 of 9 lines failed" in err
    assert records[2]["id"] == "a" and len(records[2]["token_ids"]) == 2
    assert len(records[5]["token_ids"]) == 4 and records[5]["prompt_token_ids"] == [5, 6, 7]
    assert "did you mean" in records[9]["error"]


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
    write_jsonl(source, *[{"prompt": f"changed {i}"} for i in range(6)])
    code, _, err = run(*arguments)
    assert code == 2 and "another line" in err
    target.write_text("my notes\n")
    code, _, err = run(*arguments)
    assert code == 2 and "no result of this program" in err and target.read_text() == "my notes\n"


def test_batch_with_the_solver_and_an_output_that_cannot_be_written(run, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, "broken", {"prompt": "2+2?"})
    code, _, _ = run("--input", source, "--output", target, "--branches", 2, "--tokens-per-step", 3)
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert code == 1 and "error" in records[0] and len(records[1]["branches"]) == 2
    code, _, err = run("--input", source, "--output", tmp_path)
    assert code == 2 and "cannot be written" in err


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
    assert code == 130 and "32 of 40 done" in err
    assert len(target.read_text().splitlines()) == 32
    monkeypatch.undo()
    assert run("--input", source, "--output", target, "--max-tokens", 1)[0] == 0
    assert len(target.read_text().splitlines()) == 40


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
    usage = subprocess.run(command(folder, "x", "--nope"), capture_output=True, text=True, check=False)
    assert usage.returncode == 2 and "Traceback" not in usage.stderr
    code = "import sys; from minirksc.generate import main; main(['--help']); assert 'torch' not in sys.modules"
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
