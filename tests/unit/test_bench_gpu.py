"""bench.gpu without a GPU: everything but the calls of CUDA, with our kernels in Triton's interpreter.

The other libraries are stood in for by modules that have their functions, and do in plain torch what their
documentation says of the arguments.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]

# The repository's root is not on the path (see conftest.py), so that the package is loaded from its file.
_spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
sys.modules["bench"] = importlib.util.module_from_spec(_spec)

from bench import gpu, gpu_attention, gpu_device, gpu_rivals, gpu_small, peers  # noqa: E402
from bench.gpu_attention import AttentionCase, AttentionInputs  # noqa: E402
from bench.gpu_device import Peak  # noqa: E402
from bench.report import write_lines  # noqa: E402

CPU = torch.device("cpu")
PEAK = Peak(1e12, 1e14)


def tiny(kind, batch=2, num_queries=1, context_len=37, prefix_len=0, block_size=8, dtype=torch.float32):
    return AttentionCase(kind, batch, num_queries, context_len, prefix_len, 16, block_size, 4, 2, dtype)


CASES = {
    "decode": tiny("decode", batch=3),
    "prefix": tiny("prefix", batch=2, context_len=263, prefix_len=256),
    "prefill": tiny("prefill", batch=1, num_queries=20, context_len=37),
}


def counting_clock(call):
    call()
    return 10.0


def measure(only="", clock=counting_clock):
    return gpu.Measure(CPU, clock, PEAK, repeats=3, warmup=1, only=only)


def attend(q, k, v):
    """Causal, aligned at the end; q `[queries, heads, dim]`, k and v `[keys, kv_heads, dim]`."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def paged(cache, table, length):
    return cache[table.long()].flatten(0, 1)[:length]


def with_kvcache(q, k_cache, v_cache, cache_seqlens, causal, block_table=None, page_table=None):
    table = block_table if page_table is None else page_table
    assert causal and q.dim() == 4
    if page_table is None:
        assert k_cache.shape[1] % 256 == 0
    rows = [
        attend(q[i], paged(k_cache, table[i], n), paged(v_cache, table[i], n))
        for i, n in enumerate(cache_seqlens.tolist())
    ]
    return torch.stack(rows)


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, block_table):
    assert causal and max_q == (cu_q[1:] - cu_q[:-1]).max() and max_k == (cu_k[1:] - cu_k[:-1]).max()
    out = torch.empty_like(q)
    for i, row in enumerate(block_table):
        begin, end, n = cu_q[i], cu_q[i + 1], int(cu_k[i + 1] - cu_k[i])
        out[begin:end] = attend(q[begin:end], paged(k, row, n), paged(v, row, n))
    return out


class DecodeWrapper:
    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert layout == "NHD"

    def plan(self, indptr, indices, last, heads, kv_heads, head_dim, page_size, q_data_type=None):
        queries = torch.arange(len(indptr), dtype=torch.int32)
        self.levels = [(queries, indptr, indices, last)]

    def run(self, q, kv):
        return run_levels(self.levels, q, kv)


class PrefillWrapper(DecodeWrapper):
    def plan(self, qo, indptr, indices, last, heads, kv_heads, head_dim, page_size, causal=False, q_data_type=None):
        assert causal
        self.levels = [(qo, indptr, indices, last)]


class CascadeWrapper(DecodeWrapper):
    def __init__(self, num_levels, workspace, layout):
        super().__init__(workspace, layout)

    def plan(self, qo, indptr, indices, last, heads, kv_heads, head_dim, page_size, causal=False, q_data_type=None):
        self.levels = list(zip(qo, indptr, indices, last, strict=True))


def run_levels(levels, q, kv):
    """Attention of each query over its keys of all levels, in their order."""
    out = torch.empty_like(q)
    size = kv[0].shape[1]
    final = levels[-1][0]
    for i in range(len(final) - 1):
        parts = []
        for qo, indptr, indices, last in levels:
            row = int(torch.searchsorted(qo, final[i], right=True)) - 1
            table = indices[indptr[row] : indptr[row + 1]]
            parts.append([paged(x, table, (len(table) - 1) * size + int(last[row])) for x in kv])
        k, v = (torch.cat(x) for x in zip(*parts, strict=True))
        out[final[i] : final[i + 1]] = attend(q[final[i] : final[i + 1]], k, v)
    return out


def unified(q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, softmax_scale, causal, window_size, block_table):
    assert causal and window_size == (-1, -1) and softmax_scale == q.shape[2] ** -0.5
    for i, n in enumerate(seqused_k.tolist()):
        rows = slice(cu_seqlens_q[i], cu_seqlens_q[i + 1])
        out[rows] = attend(q[rows], paged(k, block_table[i], n), paged(v, block_table[i], n))


def by_slot_decode(
    q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, num_kv_splits, max_kv_splits, sm_scale
):
    assert attn_logits.shape == (*q.shape[:2], max_kv_splits, q.shape[2])
    for i in range(len(q)):
        slots = kv_indices[kv_indptr[i] : kv_indptr[i + 1]]
        o[i : i + 1] = attend(q[i : i + 1], k_buffer[slots], v_buffer[slots])


def by_slot_extend(q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices):
    for i in range(len(qo_indptr) - 1):
        rows = slice(qo_indptr[i], qo_indptr[i + 1])
        slots = kv_indices[kv_indptr[i] : kv_indptr[i + 1]]
        k, v = torch.cat((k_buffer[slots], k_extend[rows])), torch.cat((v_buffer[slots], v_extend[rows]))
        o_extend[rows] = attend(q_extend[rows], k, v)


STAND_INS = {
    "flash-attn": SimpleNamespace(flash_attn_with_kvcache=with_kvcache, flash_attn_varlen_func=varlen),
    "flash-attn 3": SimpleNamespace(flash_attn_with_kvcache=with_kvcache),
    "flashinfer": SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=DecodeWrapper, BatchPrefillWithPagedKVCacheWrapper=PrefillWrapper
    ),
    "flashinfer cascade": SimpleNamespace(MultiLevelCascadeAttentionWrapper=CascadeWrapper),
    "vllm triton": SimpleNamespace(unified_attention=unified),
    "sglang triton, decode": SimpleNamespace(decode_attention_fwd=by_slot_decode),
    "sglang triton": SimpleNamespace(extend_attention_fwd=by_slot_extend),
}
ON_CASES = [
    (rival.name, kind)
    for rival in gpu_rivals.RIVALS
    for kind in rival.kinds
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), ON_CASES)
def test_what_a_rival_is_given_is_the_case(name, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    (rival,) = [rival for rival in gpu_rivals.RIVALS if rival.name == name]
    inputs = AttentionInputs(CASES[kind], CPU)
    call = gpu_rivals.FoundRival(rival, STAND_INS[name], "0").prepare(inputs)
    assert inputs.error(call()) < 1e-5
    assert inputs.error(call()) < 1e-5


@pytest.mark.parametrize("kind", CASES)
def test_rows_of_a_case(kind):
    found = [gpu_rivals.FoundRival(rival, STAND_INS[rival.name], "1.2") for rival in gpu_rivals.RIVALS[:1]]
    rows = list(measure().attention(CASES[kind], found))
    assert [row["arm"] for row in rows] == ["minirksc", "minirksc int8", "flash-attn"]
    for row in rows:
        assert "failed" not in row, row
        assert row["us"] == 10.0 and row["repeats"] == 3
        assert row["bandwidth_share"] == pytest.approx(row["bytes"] / 10e-6 / 1e12)
        assert row["flop_share"] == pytest.approx(CASES[kind].flops / 10e-6 / 1e14)
    assert rows[0]["best_rival"] == "flash-attn" and rows[0]["ratio"] == 1.0
    assert rows[1]["bytes"] < rows[0]["bytes"] and rows[2]["version"] == "1.2" and "ratio" not in rows[2]
    page = str(gpu.make_page(json.loads(json.dumps(rows))))
    assert "## attention" in page and page.count("| minirksc |") == 1


def test_a_rival_that_fails_or_is_wrong_is_a_row_with_its_reason():
    def rival(name, prepare):
        return gpu_rivals.FoundRival(gpu_rivals.Rival(name, "none", (), prepare), None, "1")

    def refuse(module, inputs):
        raise gpu_rivals.Unsupported("no kernel for this")

    def crash(module, inputs):
        return lambda: 1 / 0

    found = [
        rival("refuses", refuse),
        rival("crashes", crash),
        rival("wrong", lambda module, inputs: lambda: inputs.q * 0.5),
        rival("shapeless", lambda module, inputs: lambda: inputs.q[:1]),
        rival("poisoned", lambda module, inputs: lambda: inputs.q * float("nan")),
    ]
    rows = {row["arm"]: row for row in measure().attention(CASES["decode"], found)}
    assert rows["refuses"]["failed"] == "Unsupported: no kernel for this"
    assert rows["crashes"]["failed"].startswith("ZeroDivisionError")
    assert all("wrong result" in rows[name]["failed"] for name in ("wrong", "shapeless", "poisoned"))
    assert "us" in rows["minirksc"] and "best_rival" not in rows["minirksc"]
    assert all(len(gpu.cells(row)) <= len(gpu.HEADINGS) for row in rows.values())


def test_an_error_while_timing_is_a_row_of_each_arm():
    def broken(call):
        raise RuntimeError("device lost")

    rows = list(measure(clock=broken).attention(CASES["decode"], []))
    assert len(rows) == 2 and all("device lost" in row["failed"] for row in rows)


def test_only_what_is_asked_for_is_measured():
    rows = list(measure(only="decode 3 x 37 d16 b8: minirksc$").attention(CASES["decode"], []))
    assert [row["arm"] for row in rows] == ["minirksc"]
    assert list(measure(only="prefill").attention(CASES["decode"], [])) == []


def test_a_case_too_large_for_the_device_is_skipped(monkeypatch):
    def too_large(case, device):
        raise torch.OutOfMemoryError("tried to allocate 200.00 GiB")

    monkeypatch.setattr(gpu_attention, "AttentionInputs", too_large)
    (row,) = measure().attention(CASES["decode"], [])
    assert "GiB" in row["skipped"] and row["kind"] == "decode"


def test_bytes_and_flops():
    case = AttentionCase("prefix", 2, 1, 24, 16, head_dim=64, block_size=8, num_heads=4, num_kv_heads=2)
    assert case.num_stored == 16 + 2 * 8
    assert case.kv_bytes() == 32 * 2 * 2 * 64 * 2
    assert case.kv_bytes(int8=True) == 32 * 2 * 2 * (64 + 4)
    assert case.min_bytes() == case.kv_bytes() + 2 * (2 * 1 * 4 * 64 * 2)
    assert case.flops == 2 * 24 * 4 * 4 * 64
    prompt = AttentionCase("prefill", 1, 3, 5, 0, head_dim=64, block_size=8, num_heads=1, num_kv_heads=1)
    assert prompt.flops == (3 + 4 + 5) * 4 * 64


@given(
    queries=st.integers(1, 9),
    before=st.integers(0, 40),
    batch=st.integers(1, 3),
)
@settings(max_examples=30)
def test_flops_are_those_of_the_visible_pairs(queries, before, batch):
    case = AttentionCase("prefill", batch, queries, before + queries, 0, 64, 16)
    pairs = sum(position + 1 for position in range(before, before + queries))
    assert case.flops == batch * pairs * 4 * 64 * 32


def test_cases_cover_what_is_promised():
    cases = gpu_attention.all_cases(quick=False)
    assert {(c.batch, c.context_len) for c in cases if c.kind == "decode"} == {
        (b, n) for b in (1, 8, 64) for n in (1024, 8192, 32768)
    }
    assert {(c.batch, c.prefix_len, c.context_len) for c in cases if c.kind == "prefix"} == {
        (8, 4096, 4352),
        (16, 8192, 8448),
    }
    assert {(c.num_queries, c.context_len) for c in cases if c.kind == "prefill"} == {(2048, 2048), (512, 8704)}
    assert {(c.head_dim, c.block_size) for c in cases} == {(d, b) for d in (64, 128, 256) for b in (16, 64)}
    assert len({case.name for case in cases}) == len(cases)
    assert set(gpu_attention.all_cases(quick=True)) <= set(cases)


@given(
    batch=st.integers(1, 3),
    own_len=st.integers(1, 70),
    shared=st.integers(0, 2),
    size=st.sampled_from((8, 16, 32)),
)
@settings(max_examples=25)
def test_larger_blocks_hold_the_same_tokens(batch, own_len, shared, size):
    case = tiny("decode", batch, 1, shared * size + own_len, shared * size, block_size=8)
    inputs = AttentionInputs(case, CPU)
    small, large = inputs.blocks, inputs.in_blocks_of(size)
    assert len({block for table in small.tables for block in table}) == len(inputs.cache.kv)
    for ours, theirs in zip(small.tables, large.tables, strict=True):
        for a, b in ((small.k, large.k), (small.v, large.v)):
            before = a[ours].flatten(0, 1)[: case.context_len]
            assert torch.equal(before, b[theirs].flatten(0, 1)[: case.context_len])
    assert len({tuple(table[:shared]) for table in large.tables}) == 1


SMALL = (
    gpu_small.add_rms_norm_case(2, 48, torch.float32),
    gpu_small.gated_act_case(2, 40, torch.float32),
    gpu_small.kv_store_case(3, 4, 2, 16, torch.float32),
    gpu_small.confidence_case(2, 1000),
)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_kernels(case):
    rows = list(measure(only="minirksc|torch$").small(case))
    assert [row["arm"] for row in rows] == ["minirksc", "torch"]
    assert all(row["error"] < 1e-4 and row["bandwidth_share"] > 0 for row in rows)
    assert rows[0]["best_rival"] == "torch"


def test_sizes_of_small_cases_are_those_of_their_tensors():
    hidden, update, _, weight, _ = SMALL[0].make(CPU)
    assert SMALL[0].num_bytes == (2 * hidden.nbytes + update.nbytes + hidden.nbytes + weight.nbytes)
    gate_up, _ = SMALL[1].make(CPU)
    assert SMALL[1].num_bytes == gate_up.nbytes * 3 // 2


def test_a_peak_is_what_the_fastest_copy_and_product_reach(monkeypatch):
    monkeypatch.setattr(gpu_device, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(gpu_device, "PRODUCT_SIZE", 8)
    times = iter([*range(20, 10, -1), *range(10, 0, -1)])
    peak = gpu_device.measured_peak(CPU, lambda call: call() is None or next(times))
    assert peak == Peak(2 * 1024 / 11 * 1e6, 2 * 8**3 / 1 * 1e6)


def test_what_nvidia_smi_prints():
    read = gpu_device.parse_smi("580.65.06, 1980 MHz, 2619 MHz, 1980 MHz, [N/A], 41\n")
    assert read["driver_version"] == "580.65.06" and read["clocks.sm"] == "1980 MHz" and "power.limit" not in read
    assert gpu_device.parse_smi("No devices were found") == {}


def test_a_ratio_is_taken_within_a_repetition_against_the_best_other_arm():
    rows = {arm: {} for arm in ("minirksc", "slow", "fast")}
    seconds = {"minirksc": [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "fast": [2.0, 4.0, 8.0]}
    times = [{"arm": arm, "repeat": r, "us": us} for arm, some in seconds.items() for r, us in enumerate(some)]
    gpu.add_times(rows, times)
    assert rows["minirksc"]["us"] == 2.0 and rows["fast"]["us"] == 4.0 and "ratio" not in rows["slow"]
    assert rows["minirksc"]["best_rival"] == "fast"
    assert rows["minirksc"]["ratio"] == rows["minirksc"]["ratio_p10"] == rows["minirksc"]["ratio_p90"] == 2.0


def test_rivals_are_found_where_they_are():
    def rival(name, *modules):
        return gpu_rivals.Rival(name, "torch", modules, lambda module, inputs: None)

    found, missing = gpu_rivals.discover([rival("a", "no_such_module_1", "json"), rival("b", "no_such_module_2")])
    assert [(one.rival.name, one.module.__name__) for one in found] == [("a", "json")]
    assert found[0].version.startswith(torch.__version__.split("+")[0])
    assert "no_such_module_2" in missing["b"]
    assert gpu_rivals.accepted(lambda a, b=1: None, a=2, c=3) == {"a": 2}
    assert gpu_rivals.accepted(lambda **any_of_them: None, a=2, c=3) == {"a": 2, "c": 3}


def test_lines_are_complete(tmp_path):
    file = tmp_path / "sub" / "out.jsonl"
    rows = [{"part": "small", "case": "x", "arm": "minirksc", "us": 1.0}]
    common = {"bench": "gpu", "environment": {"device": "d"}}
    assert list(write_lines(file, iter(rows), common)) == rows
    assert json.loads(file.read_text()) == {**common, **rows[0]}


def test_engines_are_measured_by_peers_with_what_is_installed_here(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(peers, "run", lambda options: asked.append(options) or [{"workload": "solve", "arm": "x"}])
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name == "vllm" or None)
    options = SimpleNamespace(only="solve", model="m", kv_cache_bytes="1GiB", repeats=30, quick=True)
    assert gpu.run_engines(options, tmp_path) == [{"workload": "solve", "arm": "x"}]
    (given,) = asked
    assert (given.device, given.modes, given.repeats, given.prefill) == ("cuda", ["recorded", "eager"], 3, [1024])
    assert given.vllm == sys.executable and given.sglang is None and given.output == tmp_path

    def no_arm(options):
        raise SystemExit("--only leaves no arm")

    monkeypatch.setattr(peers, "run", no_arm)
    assert gpu.run_engines(options, tmp_path) == [] and "leaves no arm" in capsys.readouterr().err


def test_without_a_gpu_there_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--quick"])
    assert gpu.main() == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["everything"], ["--only", "("], ["--repeats", "0"]])
def test_wrong_options(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.gpu", *wrong])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 2 and wrong[-1] in capsys.readouterr().err


def test_importing_it_imports_nothing_heavy():
    code = "import sys, bench.gpu; print(sorted({'torch', 'triton', 'transformers', 'minirksc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
