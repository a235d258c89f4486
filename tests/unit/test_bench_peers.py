"""bench.peers without any other engine: workers of a few lines that speak the protocol stand in for them."""

import argparse
import ast
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The repository's root is not on the path (see conftest.py), so that the package is loaded from its file.
_spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
sys.modules.setdefault("bench", importlib.util.module_from_spec(_spec))

from bench import peer_gguf, peer_plan, peer_report, peer_worker, peers  # noqa: E402
from bench.peer_plan import Peer, Workload  # noqa: E402
from bench.peer_process import PeerError, PeerProcess, python_of  # noqa: E402
from minirksc.text.tokenizer import Tokenizer  # noqa: E402

WORKER = """
import os, sys, time
sys.path.insert(0, {folder!r})
from peer_worker import serve, solve_in_phases

class Fake:
    def __init__(self, options):
        os.system("echo a library prints")  # by file descriptor, as compiled code does
        print("and so does Python")
        if options.get("refuse"):
            raise ModuleNotFoundError("No module named 'engine'")
        if options.get("compile", True) is False:
            options["shift"] = 1
        elif "compile" in options:
            raise RuntimeError("the compiler\\nis missing")
        self.options = options
        self.facts = dict(dtype="bfloat16", versions=dict(engine="1.2"), settings=dict(depth=3))

    def tokens(self, n):
        if self.options.get("die"):
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(3)
        time.sleep(0.002 * n * self.options.get("slow", 1))
        return [i + self.options.get("shift", 0) * (i >= 2) for i in range(n - self.options.get("lazy", 0))]

    def solve(self, work, setting):
        return {{**solve_in_phases(self, work, setting), "num_computed_tokens": 7}}

    def generate(self, prompts, n):
        return [self.tokens(n) for _ in prompts]

    def continue_branches(self, prompt, hints, n, share):
        return [self.tokens(n) for _ in hints]

    def ask_appended(self, prompt, answers, question, choices, share):
        return [[0.0, 1.0] for _ in answers]

    def ask_anew(self, common, endings, choices, share):
        return [[1.0, 1.0] for _ in endings]

serve(Fake)
"""
NO_TIME = 60.0
WORK = {
    "prompt": [1, 2, 3],
    "hints": [[4], [5]],
    "num_tokens": 4,
    "before": [6],
    "between": [7],
    "question": [8, 9],
    "choices": [1, 2],
}
WORKLOADS = [
    Workload("solve", {"do": "solve", "work": WORK}, (2, 4)),
    Workload("decode 2", {"do": "decode", "prompts": [[1], [2]], "num_tokens": 5}, (2, 6)),
    Workload("prefill 9", {"do": "prefill", "prompt": [1] * 9}, (1, 1)),
]


@pytest.fixture
def fake(tmp_path):
    """Makes peers; further options go to the worker."""
    file = tmp_path / "worker.py"
    file.write_text(WORKER.format(folder=str(ROOT / "bench")))

    def make(name, fallback=None, **options):
        return Peer(name, [sys.executable, "-S", str(file)], options, fallback or {})

    return make


@pytest.fixture
def raw(tmp_path):
    """Starts a process that runs the given text."""
    started = []

    def start(text, timeout_s=NO_TIME):
        started.append(PeerProcess("raw", [sys.executable, "-S", "-c", text], 1, timeout_s))
        return started[-1]

    yield start
    for one in started:
        one.close(now=True)


def options_of(**more):
    return argparse.Namespace(**{**vars(peers.parse([])), "repeats": 3, "warmup": 1, "timeout": NO_TIME, **more})


def measured(made, **more):
    arms = peer_plan.chosen(WORKLOADS, made, more.get("only", ""))
    return peers.measure(WORKLOADS, arms, options_of(**more))


def test_all_peers_do_all_work_in_turns(fake, capsys):
    rows, facts, missing = measured([fake("minirksc auto"), fake("engine", slow=4, shift=1)])
    assert not missing and not any("failed" in row for row in rows)
    assert len(rows) == 3 * 2 * (len(peer_plan.SETTINGS) + 2)
    assert facts["engine"]["versions"] == {"engine": "1.2"} and facts["engine"]["load_s"] > 0
    solved = [row for row in rows if row["workload"] == "solve" and row["arm"] == "engine exact append"]
    assert [row["repeat"] for row in solved] == [0, 1, 2]
    assert solved[0]["token_ids"] == [[0, 1, 3, 4]] * 2 and solved[0]["p_yes"] == [pytest.approx(0.2689, abs=1e-4)] * 2
    assert solved[0]["total_s"] == pytest.approx(solved[0]["generate_s"] + solved[0]["verify_s"])
    (decoded, *_) = [row for row in rows if row["workload"] == "decode 2"]
    assert decoded["decode_tokens_per_s"] == pytest.approx(2 * 5 / decoded["decode_s"])
    assert [len(ids) for ids in decoded["token_ids"]] == [6, 6]
    assert capsys.readouterr().err.count("engine exact append") == 3


def test_what_is_missing_is_a_line_and_the_others_run(fake):
    nowhere = Peer("nowhere", ["/no/such/python", "worker.py"], {})
    rows, facts, missing = measured([nowhere, fake("bare", refuse=True), fake("there")], only="prefill")
    assert [row["arm"] for row in rows] == ["there"] * 3 and list(facts) == ["there"]
    assert "nowhere is left out: /no/such/python cannot be started" in missing[0]
    assert missing[1] == "bare is left out: ModuleNotFoundError: No module named 'engine'"
    assert len(missing) == 2


def test_a_fallback_is_used_and_told(fake):
    rows, facts, missing = measured([fake("engine", {"compile": False}, compile=True)], only="prefill", repeats=1)
    assert not missing and len(rows) == 1
    assert facts["engine"]["note"].endswith("since without: RuntimeError: the compiler is missing")
    assert "'compile': False" in facts["engine"]["note"]
    (_, _, missing) = measured([fake("engine", {"more": 1}, compile=True)], only="prefill", repeats=1)
    assert missing == ["engine is left out: RuntimeError: the compiler is missing"]


def test_a_worker_that_dies_is_a_clear_line_and_nobody_else_stops(fake, capsys):
    rows, facts, _ = measured([fake("mortal", die=True), fake("other")], only="prefill|decode", warmup=0)
    died = [row["failed"] for row in rows if row["peer"] == "mortal"]
    assert died[0] == "ended with exit code 3 during 'decode'; last on stderr: out of memory"
    assert set(died[1:]) == {"its worker has ended"} and len(died) == 6
    assert not any("failed" in row for row in rows if row["peer"] == "other")
    assert "mortal, decode 2: ended with exit code 3" in capsys.readouterr().err
    page = str(peer_report.make_page(rows, facts, [], options_of()))
    assert "mortal: no result in 3 repetitions: ended with exit code 3" in page


def test_less_work_is_no_result(fake):
    rows, _, _ = measured([fake("lazy", lazy=1)], only="decode", repeats=1, warmup=0)
    assert rows[0]["failed"] == "lazy generated [5, 5] tokens, not 2 x 6"


def test_bad_replies_and_silence_end_the_worker(raw):
    for text, message in (
        ("input(); print('hello'); input()", "no reply to 'load': 'hello'"),
        ("input(); print('[1]'); input()", "no reply to 'load'"),
        ('input(); print(\'{"error": "too big"}\'); input()', "too big"),
        ("import sys; sys.exit(4)", "exit code 4"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
    ):
        process = raw(text)
        with pytest.raises(PeerError, match=message.replace("[", r"\[")):
            process.ask("load")
        assert process.is_alive == (message == "too big")
    begin = time.perf_counter()
    silent = raw("input(); input()", timeout_s=0.1)
    with pytest.raises(PeerError, match=r"no reply to 'load' within 0.1 s"):
        silent.ask("load")
    assert time.perf_counter() - begin < 10 and not silent.is_alive


def test_a_worker_ends_when_its_stdin_does(fake):
    running = peers.start(fake("engine"), options_of())
    running.process.close()
    assert not running.process.is_alive and running.process._process.returncode == 0


def test_a_worker_does_not_see_our_path(raw, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    text = "import os, json; input(); print(json.dumps({'result': dict(os.environ)}))"
    variables = raw(text).ask("load")
    assert "PYTHONPATH" not in variables and variables["OMP_NUM_THREADS"] == "1"


def test_a_worker_does_not_see_our_folders(raw):
    """Where it starts Python again with -m, "kernels" would be ours."""
    text = "import os, json; input(); print(json.dumps({'result': {'found': os.path.exists('kernels')}}))"
    assert raw(text).ask("load") == {"found": False}


def test_an_environment_is_its_folder_or_its_interpreter(tmp_path):
    assert python_of(sys.executable) == sys.executable and python_of("none/python") == "none/python"
    assert Path(python_of(str(tmp_path))).parent.parent == tmp_path


def test_rivals_workers_need_the_standard_library_and_the_rival_alone():
    allowed = {"peer_worker", "numpy", "torch", "vllm", "llama_cpp", "sglang", *sys.stdlib_module_names}
    for name in ("peer_worker", "peer_vllm", "peer_llamacpp", "peer_sglang"):
        tree = ast.parse((ROOT / "bench" / f"{name}.py").read_text())
        found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {module.split(".")[0] for module in found} <= allowed, name
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        assert not top & {"numpy", "torch", "vllm", "llama_cpp", "sglang"}, (
            "libraries print: not before stdout is taken"
        )


def test_agreement_with_the_reference():
    reference = {"solve": {"token_ids": [[1, 2, 3], [4, 5, 6]], "p_yes": [0.5, 0.25]}, "decode 8": {"failed": "no"}}
    same = {"workload": "solve", "setting": "exact append", "token_ids": [[1, 2, 3], [4, 9, 6]], "p_yes": [0.4, 0.9]}
    other = {"workload": "solve", "setting": "exact standalone", "token_ids": [[1]], "p_yes": [0.4]}
    rest = [{"workload": "decode 8", "setting": "", "token_ids": [[1]]}, {**same, "failed": "died"}]
    peers.add_agreement([same, other, *rest], reference)
    assert (same["same_tokens"], same["agreeing_tokens"]) == (1, 2.0) and same["p_yes_error"] == pytest.approx(0.1)
    assert not any("same_tokens" in row for row in (other, *rest))
    assert peers.common_length([1, 2], [1, 2, 3]) == 2 and peers.common_length([], [1]) == 0


def solved(arm, setting, seconds, **more):
    return [
        {
            "workload": "solve", "peer": arm, "setting": setting, "arm": f"{arm} {setting}", "repeat": repeat,
            "generate_s": one / 2, "verify_s": one / 2, "total_s": one, "token_ids": [[1, 2]] * 2,
            "same_tokens": 2, "agreeing_tokens": 2.0, **more,
        }
        for repeat, one in enumerate(seconds)
    ]  # fmt: skip


def cells_of(page, arm):
    (line,) = [line for line in str(page).splitlines() if line.startswith(f"| {arm} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_taken_within_a_repetition():
    rows = solved("minirksc auto", "exact append", [1.0, 10.0, 2.0])
    rows += solved("minirksc auto", "exact standalone", [4.0, 40.0, 8.0])
    rows += solved("vllm bfloat16", "exact standalone", [2.0, 20.0, 4.0], num_computed_tokens=99, p_yes_error=0.0625)
    rows += solved("minirksc auto", "rksc", [1.0, 10.0, 2.0], gates="calibrated")
    facts = {"vllm bfloat16": {"dtype": "bfloat16", "versions": {"vllm": "1"}, "settings": {"a": 1}, "load_s": 2.0}}
    page = peer_report.make_page(rows, facts, ["llama.cpp is left out: no reason"], options_of())
    assert cells_of(page, "vllm bfloat16 exact standalone") == [
        "vllm bfloat16 exact standalone", "2 (1.2 .. 8.4)", "2 (1.2 .. 8.4)", "4 (2.4 .. 16.8)",
        "2 (2 .. 2)", "0.5 (0.5 .. 0.5)", "2/2", "2.0/2", "0.062", "99",
    ]  # fmt: skip
    assert cells_of(page, "minirksc auto exact append")[4:6] == ["1", "1"]
    assert cells_of(page, "vllm bfloat16")[1:] == ["bfloat16", "vllm 1", "2.0", "a=1"]
    assert "- llama.cpp is left out: no reason" in str(page) and "- minirksc auto rksc: calibrated" in str(page)


def test_a_page_without_ours_has_no_ratios_and_one_without_results_no_table():
    page = str(peer_report.make_page(solved("vllm", "exact append", [1.0]), {}, [], options_of()))
    assert "times as fast |" not in page
    failed = [{"workload": "decode 8", "arm": "vllm", "peer": "vllm", "setting": "", "failed": "no room"}]
    page = str(peer_report.make_page(failed, {}, [], options_of()))
    assert "vllm: no result in 1 repetitions: no room" in page and "Decode: 8 x 128-token prompts" in page


def test_peers_of_the_options(tmp_path):
    gguf = tmp_path / "own.gguf"
    made, missing = peer_plan.known_peers(peers.parse([]), tmp_path)
    assert [peer.name for peer in made] == ["minirksc auto", "transformers bfloat16"]
    assert [line.split(":")[0] for line in missing] == ["vLLM is left out", "llama.cpp is left out"]
    options = ["--vllm", "v", "--llamacpp", "l", "--gguf", str(gguf), "--gates", "g.json", "--transformers-dtypes", ""]
    made, missing = peer_plan.known_peers(peers.parse(options), tmp_path)
    assert [peer.name for peer in made] == ["minirksc auto", "vllm bfloat16", "llama.cpp own"] and not missing
    assert made[0].settings[-1] == "rksc" and "rksc" not in made[1].settings
    assert made[1].fallback == {"engine": {"enforce_eager": True}} and made[1].command[0] == "v"
    assert made[2].options["max_len"] > 4096 and made[2].options["num_sequences"] == 8
    made, missing = peer_plan.known_peers(peers.parse(["--llamacpp", "l", "--model", str(tmp_path)]), tmp_path)
    assert len(made) == 2 and "comes with no GGUF file to convert; name one: --gguf FILE" in missing[1]
    for wrong in (["--llamacpp-types", "q3"], ["--only", "("], ["--vllm-arguments", "x"]):
        with pytest.raises(SystemExit):
            peers.parse(wrong)


def test_only_filters_arms_of_workloads(fake):
    made = [fake("a"), fake("b")]
    kept = peer_plan.list_arms(peer_plan.chosen(WORKLOADS, made, "solve: a exact|decode"))
    assert kept == {"solve": ["a exact append", "a exact standalone"], "decode 2": ["a", "b"]}
    with pytest.raises(SystemExit, match="prefill 9"):
        peer_plan.chosen(WORKLOADS, made, "nothing")


def test_the_whole_run_writes_its_files(fake, tiny_llama, tmp_path, monkeypatch, capsys):
    folder = tiny_llama(layers=2, chat=True, max_len=2048)
    made = [fake("minirksc auto"), fake("engine", slow=2)]
    monkeypatch.setattr(peers, "known_peers", lambda options, folder: (made, ["vLLM is left out: no reason"]))

    def reference(options, folder, workloads):
        assert [one.name for one in workloads] == ["solve", "decode 2", "prefill 50"]
        answers = {"token_ids": [list(range(4))] * 3}
        return {"solve": answers, "solve standalone": answers, "decode 2": {"token_ids": [list(range(7))] * 2}}

    monkeypatch.setattr(peers, "reference_rows", reference)
    sizes = ["--branches", "3", "--branch-tokens", "4", "--batch-sizes", "2", "--tokens", "6", "--prefill", "50"]
    sizes += ["--prefix-tokens", "90", "--prompt-tokens", "20"]
    peers.main(["--model", str(folder), "--output", str(tmp_path / "out"), "--repeats", "2", "--warmup", "0", *sizes])
    files = {file.suffix: file for file in (tmp_path / "out").iterdir()}
    assert {".jsonl", ".md"} <= set(files)
    rows = [json.loads(line) for line in files[".jsonl"].read_text().splitlines()]
    assert len(rows) == 2 * 2 * (3 + 1 + 1)
    one = rows[0]
    assert one["bench"] == "peers" and one["environment"]["versions"]["torch"] and one["options"]["branches"] == 3
    assert one["versions"] == {"engine": "1.2"} and one["settings"] == {"depth": 3} and one["dtype"] == "bfloat16"
    assert {row["same_tokens"] for row in rows if row["workload"] == "solve"} == {3}
    page = files[".md"].read_text()
    assert "vLLM is left out: no reason" in page and "| engine exact append |" in page and "3/3" in page
    assert "vLLM is left out" in capsys.readouterr().out


def test_work_that_is_sent_is_that_of_the_options(tiny_llama):
    tokenizer = Tokenizer.from_folder(tiny_llama(layers=2, chat=True, max_len=2048))
    options = peers.parse(["--prefix-tokens", "100", "--branches", "2", "--branch-tokens", "5", "--prefill", "70"])
    made = peer_plan.make_workloads(tokenizer, options)
    assert [one.name for one in made] == ["solve", "decode 1", "decode 8", "prefill 70"]
    work = json.loads(json.dumps(made[0].request))["work"]
    assert len(work["prompt"]) == 100 and [len(hint) for hint in work["hints"]] == [20, 20] and work["num_tokens"] == 5
    assert [len(prompt) for prompt in made[2].request["prompts"]] == [128] * 8 and made[2].shape == (8, 129)
    assert made[0].shape == (2, 5) and made[3].shape == (1, 1)


def test_a_busy_machine_is_no_rate():
    class Late:
        def generate(self, prompts, num_tokens):
            time.sleep(0.02 if num_tokens == 1 else 0)
            return [[0] * num_tokens for _ in prompts]

    with pytest.raises(RuntimeError, match="too busy"):
        peer_worker.decode(Late(), [[1]], 3)


def test_a_converted_gguf_holds_the_weights_rounded_to_bfloat16(tmp_path):
    gguf = pytest.importorskip("gguf")
    import numpy
    import torch

    draw = numpy.random.default_rng(0)
    matrix = draw.standard_normal((6, 64), numpy.float32)
    norm = draw.standard_normal(64, numpy.float32)
    source = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(7)
    writer.add_token_list(["a", "b"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("blk.0.attn_q.weight", gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def rounded(values):
        return torch.from_numpy(values.copy()).bfloat16().float().numpy()

    expected = rounded(gguf.dequantize(gguf.quantize(matrix, kind), kind))
    for name, error in (("bf16", 0), ("q8_0", 0.02)):
        peer_gguf.convert(source, tmp_path / f"{name}.gguf", name)
        reader = gguf.GGUFReader(tmp_path / f"{name}.gguf")
        fields = {key: field.contents() for key, field in reader.fields.items()}
        assert fields["llama.block_count"] == 7 and fields["tokenizer.ggml.tokens"] == ["a", "b"]
        found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        assert [tensor.tensor_type.name for tensor in reader.tensors] == [name.upper(), "F32"]
        assert abs(found["blk.0.attn_q.weight"] - expected).max() <= error
        assert numpy.array_equal(found["blk.0.attn_norm.weight"], rounded(norm))
