"""A JSONL batch: a line may be anything and harms no other; runs that end anywhere go on; samples are independent."""

import contextlib
import json
import os

import pytest

from minirksc import LLM, Solver
from minirksc.cli.batch import Batch
from minirksc.cli.files import MAX_TEXT_BYTES, read_stdin
from minirksc.cli.generate import main
from minirksc.cli.resumable import GrowingFile
from minirksc.errors import ConfigError
from minirksc.options import SamplingParams


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MINIRKSC_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama(tokenizer=True, chat=True, max_len=256), kv_cache_bytes="2MiB") as llm:
        yield llm


@pytest.fixture()
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


@pytest.fixture()
def run(llm, files, capsys):
    """Runs a batch on one loaded model; gives (code, records, stderr)."""

    def call(*arguments, make_llm=lambda **options: contextlib.nullcontext(llm)):
        line = ["--input", files[0], "--output", files[1], "--no-chat", "--ignore-eos", "--max-tokens", 2, *arguments]
        code = main([str(argument) for argument in line], make_llm=make_llm)
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        return code, records(files[1]) if files[1].exists() else [], err

    return call


@pytest.fixture()
def solve(llm, files):
    """Solves a batch; gives (code, records)."""

    def call(*arguments):
        line = ["--input", str(files[0]), "--output", str(files[1]), "--branches", "2", *arguments]
        return main(line, make_llm=lambda **options: contextlib.nullcontext(llm)), records(files[1])

    return call


def records(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def never(**options):
    raise AssertionError("the model was loaded")


def nested(levels):
    return b"[" * levels + b"]" * levels


BAD = {
    b'{"id": ' + nested(500) + b', "prompt": "x"}': "nested more than 100 levels",
    b'{"id": ' + nested(98) + b"1": "not JSON",
    nested(100_000): "nested too deeply",
    b'{"messages": ' + nested(2000) + b"}": "nested",
    b"\0\0\0\0": "not JSON",
    b'"\0a\0"\0': "not JSON",
    '"wide"'.encode("utf-16"): "'utf-8' codec can't decode",
    b'"\xed\xa0\x80"': "'utf-8' codec can't decode",
    b'\xef\xbb\xbf"marked"': "BOM",
    b'"\xff"': "'utf-8' codec can't decode byte 0xff in position 1",
    b'{"prompt": "a", "prompt": "b"}': "'prompt' is there twice",
    b'{"prompt": "a", "params": {"n": 1, "n": 2}}': "'n' is there twice",
    b'{"prompt": "a", "id": NaN}': "NaN is no number",
    b'{"prompt": "a", "id": -Infinity}': "-Infinity is no number",
    b'{"prompt": "a", "params": {"temperature": 1e999}}': "1e999",
    b'{"prompt": "a", "id": ' + b"1" * 5000 + b"}": "not JSON",
    b'{"prompt_token_ids": [1' + b"0" * 400 + b"]}": "",
    b'{"prompt_token_ids": {"a": 1}}': "whole number",
    b'{"messages": {"role": "user", "content": "x"}}': "messages must be",
    b'{"messages": [{"role": 5, "content": 7}]}': "",
    b'{"prompt": ["a"]}': "prompt must be",
    b'{"prompt": "a", "params": [1]}': "params must be an object",
    b'{"prompt": "a", "params": {"stop": [["a"]]}}': "stop",
    b'{"prompt": "a", "params": {"seed": "1"}}': "seed",
    b'{"prompt": "a", "params": {"n": 1e2}}': "n 100.0",
    b'{"prompt": "a", "params": {"logit_bias": {"x": 1}}}': "logit_bias",
    b'{"prompt": "a", "salt": 5}': "salt 5 must be a text",
    b'{"prompt": "a", "cache_salt": ""}': "must be a text that is not empty",
    b'{"prompt": "a", "salt": "x", "cache_salt": "x"}': "takes one of",
    b'{"prompt": "a", "' + b"k" * 100_000 + b'": 1}': "more characters",
    b'{"prompt": "' + b"a" * 100_000 + b'"}': "max_model_len",
    b"null": "string or an object",
    b"[]": "string or an object",
    b"1e5": "string or an object",
}


def test_a_line_may_be_anything_and_harms_no_other(run, files):
    lines = [part for bad in BAD for part in (bad, json.dumps({"prompt": "ok", "id": {"a": [None, 1.5]}}).encode())]
    files[0].write_bytes(b"\n".join(lines))
    code, found, err = run()
    assert code == 1 and [record["line"] for record in found] == list(range(1, len(lines) + 1))
    for record, (line, message) in zip(found[::2], BAD.items(), strict=True):
        assert message in record["error"] and len(record["error"]) < 2100, line[:80]
    for record in found[1::2]:
        assert len(record["token_ids"]) == 2 and record["id"] == {"a": [None, 1.5]}
    assert max(map(len, err.splitlines())) < 2200
    again, after, _ = run(make_llm=never)  # nothing is left to do, and nothing is in the way
    assert again == 1 and after == found


def test_a_line_that_is_no_problem_harms_no_other(solve, files):
    files[0].write_bytes(b'{"id": ' + nested(500) + b', "prompt": "x"}\n"good"\n{"prompt": "a", "salt": 1}\n')
    code, found = solve("--tokens-per-step", "2")
    assert code == 1 and ["error" in record for record in found] == [True, False, True]


class Panic(BaseException):
    """As compiled Rust raises it."""


@pytest.mark.parametrize("error", [Panic("it panicked"), RuntimeError("odd"), MemoryError(), RecursionError("deep")])
@pytest.mark.parametrize("where", ["encode", "generate"])
def test_a_prompt_that_breaks_a_call_breaks_it_for_itself_alone(run, files, llm, monkeypatch, error, where):
    files[0].write_text('"one"\n"bad"\n"three"\n')
    if where == "encode":
        encode = llm.tokenizer.encode
        monkeypatch.setattr(
            llm.tokenizer, "encode", lambda text, **options: fail(error) if text == "bad" else encode(text, **options)
        )
    else:
        generate, bad = llm.generate, llm.tokenizer.encode("bad")

        def breaking(prompts, *arguments, **options):
            return fail(error) if bad in prompts else generate(prompts, *arguments, **options)

        monkeypatch.setattr(llm, "generate", breaking)
    code, found, _ = run()
    assert code == 1 and ["error" in record for record in found] == [False, True, False], found
    assert type(error).__name__ in found[1]["error"]


def fail(error):
    raise error


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_a_file_in_another_encoding_is_refused_by_name(run, files, encoding):
    files[0].write_text('"hello"\n{"prompt": "bye"}\n', encoding=encoding)
    code, _, err = run(make_llm=never)
    assert code == 2 and encoding[:6].upper() in err and "UTF-8" in err and err.count("\n") == 1


def test_samples_that_nobody_seeded_are_independent_and_follow_from_their_line(run, files):
    files[0].write_text('{"prompt": "Once", "params": {"n": 4}}\n' * 4)
    more = ("--temperature", 1, "--max-tokens", 12)
    code, found, _ = run(*more)
    samples = [[output["token_ids"] for output in record["outputs"]] for record in found]
    assert code == 0 and len({tuple(ids) for some in samples for ids in some}) == 16
    lines = files[1].read_bytes().splitlines(keepends=True)
    files[1].write_bytes(b"".join(lines[:2]))
    assert [[o["token_ids"] for o in record["outputs"]] for record in run(*more)[1]] == samples
    files[1].unlink()
    other = run(*more, "--seed", 1)[1]
    assert len({tuple(o["token_ids"]) for record in [*found, *other] for o in record["outputs"]}) == 32


def test_problems_that_nobody_seeded_are_solved_independently_and_alike_in_a_resumed_run(solve, files):
    files[0].write_text('"2+2?"\n' * 3)
    code, found = solve("--tokens-per-step", "12")
    branches = [[branch["token_ids"] for branch in record["branches"]] for record in found]
    assert code == 0 and len({tuple(ids) for some in branches for ids in some}) == 6
    files[1].write_bytes(b"".join(files[1].read_bytes().splitlines(keepends=True)[:1]))
    assert [[b["token_ids"] for b in record["branches"]] for record in solve("--tokens-per-step", "12")[1]] == branches


def test_a_lines_own_seed_is_its_seed(run, files, llm):
    files[0].write_text('{"prompt": "Once", "params": {"seed": 7}}\n' * 2)
    _, found, _ = run("--temperature", 1, "--max-tokens", 12, "--seed", 3)
    params = SamplingParams(temperature=1, max_tokens=12, seed=7, ignore_eos=True)
    (expected,) = llm.generate("Once", params)
    assert [record["token_ids"] for record in found] == [expected.outputs[0].token_ids] * 2


def test_the_salt_of_a_line_reaches_the_model(run, files, llm, monkeypatch):
    files[0].write_text('"a"\n{"prompt": "a", "salt": "x"}\n{"prompt_token_ids": [5], "cache_salt": "y"}\n')
    given, generate = [], llm.generate

    def spy(prompts, *arguments, **options):
        given.extend(prompts)
        plain = [p["prompt_token_ids"] if isinstance(p, dict) else p for p in prompts]
        return generate(plain, *arguments, **options)

    monkeypatch.setattr(llm, "generate", spy)
    assert run()[0] == 0
    ids = llm.tokenizer.encode("a")
    assert given == [
        ids, {"prompt_token_ids": ids, "cache_salt": "x"}, {"prompt_token_ids": [5], "cache_salt": "y"},
    ]  # fmt: skip


def test_the_salt_of_a_problem_reaches_the_solver(solve, files, monkeypatch):
    files[0].write_text('"a"\n{"prompt": "a", "salt": "x"}\n')
    given, unsalted = [], Solver.solve

    def spy(self, problem, *arguments, salt=None, **options):
        given.append(salt)
        return unsalted(self, problem, *arguments, **options)

    monkeypatch.setattr(Solver, "solve", spy)
    assert solve("--tokens-per-step", "2")[0] == 0
    assert given == [None, "x"]


def test_lines_share_what_is_cached_within_their_salt_alone(run, files, llm):
    llm.reset_prefix_cache()
    prompt = "a prompt that is longer than one block of the cache, so that it can be found there"
    lines = [{"prompt": prompt, "salt": "x"}, {"prompt": prompt, "salt": "y"}, {"prompt": prompt, "salt": "x"}]
    for index, cached in enumerate([False, False, True]):
        files[0].write_text(json.dumps(lines[index]) + "\n")
        files[1].unlink(missing_ok=True)
        code, (record,), _ = run()
        assert code == 0 and (record["num_cached_tokens"] > 0) == cached


def test_a_run_goes_on_after_an_end_at_any_byte(run, files):
    files[0].write_bytes(b'"one"\n{"prompt": 5}\n{"prompt": "three", "id": "\\ud800\xc3\xa9"}\n')
    run()
    whole = files[1].read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        files[1].write_bytes(whole[:cut])
        with Batch(*files) as batch:
            assert [line.number for line in batch.todo] == [n for n, end in enumerate(ends, start=1) if cut < end]
        assert files[1].read_bytes() == whole[:cut]


def test_two_runs_do_not_write_one_file(run, files):
    files[0].write_text('"one"\n')
    with GrowingFile(files[1], "--output"):
        code, _, err = run(make_llm=never)
    assert code == 2 and f"--output {files[1]} is being written by another run" in err
    assert run()[0] == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("option", ["--input", "--output", "--hints", "--phrasings", "--gates", "--trace"])
@pytest.mark.parametrize("kind", ["fifo", "zero", "folder"])
def test_what_is_no_regular_file_is_refused_by_name(tmp_path, capsys, option, kind):
    path = tmp_path / "special.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    (tmp_path / "in").write_text('"a"\n')
    batch = {"--input": str(tmp_path / "in"), "--output": str(tmp_path / "out")}
    arguments = {**batch, option: str(path)} if option in batch else {"--branches": "2", option: str(path)}
    line = [part for pair in arguments.items() for part in pair]
    assert main([*line, *(() if option in batch else ["x"])], make_llm=never) == 2
    assert str(path) in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
@pytest.mark.parametrize("option", ["--hints", "--phrasings", "-"])
def test_texts_in_another_encoding_are_refused_by_name(tmp_path, capsys, monkeypatch, option, encoding):
    raw = "caf\u00e9\nth\u00e9\n".encode(encoding)
    (tmp_path / "text").write_bytes(raw)
    if option == "-":
        with (tmp_path / "text").open() as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            assert main(["-"], make_llm=never) == 2
    else:
        assert main(["x", "--branches", "2", option, str(tmp_path / "text")], make_llm=never) == 2
    expected = "not UTF-8" if encoding == "latin-1" else encoding.upper()
    assert expected in (err := capsys.readouterr().err)
    assert ("standard input" if option == "-" else option) in err


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_a_prompt_without_end_is_refused(monkeypatch):
    with open("/dev/zero") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(ConfigError, match=f"more than {MAX_TEXT_BYTES} bytes"):
            read_stdin()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a\udcffb"], "PROMPT is not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 1"),
        (["x", "--system", "\udce9"], "--system is not UTF-8 text"),
        (["x", "--stop", "ab\udc80"], "--stop is not UTF-8 text"),
        (["x", "--chat-template-kwargs", '{"a": "\udcff"}'], "is not UTF-8 text"),
        (["a\ud800"], "PROMPT is not UTF-8 text"),
        (["x", "--branches", "2", "--hints", "no/such\udcff"], "cannot be read"),  # a name of a file may be anything
    ],
)
def test_an_argument_that_is_no_text_is_wrong_usage(arguments, message, capsys):
    assert main(arguments, make_llm=never) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
