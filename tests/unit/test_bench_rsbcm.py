"""bench.rsbcm_eviction and what it is made of: the work, the engine without a model, the oracle, the report."""

import importlib.util
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integrity import check_integrity

ROOT = Path(__file__).resolve().parents[2]

# The repository's root is not on the path (see conftest.py), so that the package is loaded from its file.
_spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
sys.modules.setdefault("bench", importlib.util.module_from_spec(_spec))

from bench import rsbcm_eviction, rsbcm_report  # noqa: E402
from bench.belady import Belady, Recorder, digests  # noqa: E402
from bench.fake_engine import FakeEngine  # noqa: E402
from bench.tree_search import KINDS, Shape, plan  # noqa: E402
from minirksc.cache.eviction import POLICIES  # noqa: E402
from minirksc.cache.rsbcm import BlockManager  # noqa: E402
from minirksc.options import SamplingParams  # noqa: E402

SMALL = Shape(branches=4, depth=3, tokens=6, num_open=5, num_problems=3, concurrency=2)
OPTIONS = rsbcm_eviction.parse(["--prefix-tokens", "40", "--block-size", "4", "--seeds", "1"])


def small_work(kind, **options):
    return rsbcm_eviction.make_work(replace(SMALL, kind=kind, **options), OPTIONS)


@given(
    kind=st.sampled_from(KINDS),
    branches=st.integers(1, 9),
    beam=st.integers(1, 4),
    depth=st.integers(1, 5),
    num_open=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_search_expands_each_node_once_and_gives_everything_back(kind, branches, beam, depth, num_open, seed):
    shape = Shape(kind=kind, branches=branches, beam=beam, depth=depth, num_open=num_open, seed=seed)
    alive, known, expanded = {()}, {()}, set()
    rounds = plan(shape, problem=seed)
    for round_ in rounds:
        children = [child for _, paths in round_.expand for child in paths]
        assert 0 < len(round_.expand) <= beam and len(children) == len(set(children)) == branches
        for parent, paths in round_.expand:
            assert parent in known and parent not in expanded and len(parent) < depth
            assert parent in alive or kind == "regret"
            assert all(child[:-1] == parent for child in paths)
            expanded.add(parent)
        alive = (alive | set(children)) - expanded
        known |= set(children)
        assert set(round_.drop) <= alive
        alive -= set(round_.drop)
        assert len(alive) <= (num_open if kind == "best-first" else beam)
    assert not alive and rounds == plan(shape, problem=seed)


def test_best_first_goes_back_and_regret_begins_anew():
    back = anew = 0
    for problem in range(8):
        levels = [[len(parent) for parent, _ in r.expand] for r in plan(Shape(kind="best-first"), problem)]
        back += any(min(level) < max(before) for before, level in pairwise(levels))
        alive = {()}
        for round_ in plan(Shape(kind="regret"), problem):
            anew += sum(parent not in alive for parent, _ in round_.expand)
            alive |= {child for _, paths in round_.expand for child in paths}
            alive -= set(round_.drop)
    assert back > 4 and anew > 4


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    policy=st.sampled_from([*POLICIES, "belady"]),
    share=st.floats(0.3, 1.0),
    seed=st.integers(0, 9),
)
def test_tokens_are_the_same_for_every_policy_and_pool(kind, policy, share, seed):
    work = small_work(kind, seed=seed)
    reference, tokens, recorder = rsbcm_eviction.ample(work)
    assert reference.blocks.num_evicted_blocks == reference.scheduler.num_preemptions == 0
    num_blocks = max(30, round(share * reference.blocks.num_cached))
    engine, got = rsbcm_eviction.count(work, num_blocks, policy, recorder)
    check_integrity(engine.blocks)
    assert got == tokens and engine.blocks.num_used == 0
    assert engine.num_decoded_tokens == reference.num_decoded_tokens
    assert max(b.num_awaited for b in engine.blocks._pool._blocks) == 0


def test_with_the_whole_working_set_nothing_is_computed_again():
    for kind in KINDS:
        work = small_work(kind)
        reference, _, recorder = rsbcm_eviction.ample(work)
        for policy in [*POLICIES, "belady"]:
            engine, _ = rsbcm_eviction.count(work, reference.blocks.num_cached, policy, recorder)
            assert engine.num_prefilled_tokens == reference.num_prefilled_tokens


@settings(max_examples=60)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=2), min_size=1, max_size=25),
    num_blocks=st.integers(4, 8),
)
def test_belady_is_never_beaten_where_requests_come_one_at_a_time(prompts, num_blocks):
    """Each is gone before the next comes: plain demand paging, where the rule is optimal."""

    def run(policy, num_blocks, on_finish=None):
        engine = FakeEngine(BlockManager(num_blocks, 1, policy), on_finish=on_finish)
        for index, prompt in enumerate(prompts):
            sequence = engine.new_sequence([*prompt, 100 + index])  # the last token is always computed
            engine.add_request(sequence, SamplingParams(max_tokens=1), prefill_only=True)
            while engine.scheduler.has_work:
                engine.step()
        return engine.num_prefilled_tokens

    recorder = Recorder(1)
    ample = run("lru", 200, recorder.finished)
    oracle = Belady(recorder)
    least = run(oracle.belady, num_blocks, oracle.finished)
    assert ample <= least
    for policy in POLICIES:
        assert least <= run(policy, num_blocks), policy


def test_digests_are_those_of_the_block_manager():
    blocks = BlockManager(8, 4)
    blocks.add(0, list(range(11)))
    blocks.reserve(0, 11)
    blocks.commit(0, list(range(11)))
    assert digests(list(range(11)), 4) == [blocks._pool[i].digest for i in blocks.block_table(0)[:2]]


def test_a_pool_that_one_request_does_not_fit_into_is_a_row_with_its_reason():
    options = rsbcm_eviction.parse(["--prefix-tokens", "40", "--block-size", "4", "--seeds", "1", "--policies", "lru"])
    options.shares = (0.01,)
    rows = rsbcm_eviction.count_all([SMALL], options)
    assert [row["policy"] for row in rows] == ["lru", "belady"]
    assert all("raise kv_cache_bytes" in row["failed"] for row in rows)
    assert "too small" in str(rsbcm_report.make_page(rows, options))


def test_the_page_compares_seed_by_seed_and_not_where_lru_loses_little():
    def row(policy, tokens, share, seed):
        common = {"kind": "beam", "working_set_blocks": 9, "peak_held_blocks": 5, "num_prefilled_tokens_ample": 7}
        return common | {"policy": policy, "num_recomputed_tokens": tokens, "share": share, "seed": seed}

    rows = [row("lru", 1000, 0.25, 0), row("lru", 200, 0.25, 1), row("rksc", 500, 0.25, 0), row("rksc", 180, 0.25, 1)]
    rows += [row("lru", 99, 0.5, 0), row("lru", 500, 0.5, 1), row("rksc", 0, 0.5, 0), row("rksc", 5, 0.5, 1)]
    assert rsbcm_report.relative(rows, "beam", 0.25, "rksc") == "340, -30% (-50% .. -10%)"
    assert rsbcm_report.relative(rows, "beam", 0.25, "lru") == "600"
    assert rsbcm_report.relative(rows, "beam", 0.5, "rksc") == "2"
    assert rsbcm_report.relative(rows, "beam", 0.75, "rksc") == "-"


def test_unknown_names_are_usage_errors(capsys):
    for arguments in (["--policies", "rksc,best"], ["--kinds", "wide"], ["--parts", "all"], ["--beam", "-1"]):
        with pytest.raises(SystemExit) as error:
            rsbcm_eviction.parse(arguments)
        assert error.value.code == 2
    assert "there are rksc, lru, lfu, cost" in capsys.readouterr().err


def test_a_run_leaves_rows_and_a_page(tmp_path, capsys):
    arguments = ["--quick", "--kinds", "beam", "--prefix-tokens", "16", "--tokens", "8", "--policies", "lru,cost"]
    rsbcm_eviction.main([*arguments, "--output", str(tmp_path)])
    (jsonl,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert {(row["share"], row["policy"]) for row in rows} == {
        (share, policy) for share in rsbcm_eviction.SHARES for policy in ("lru", "cost", "belady")
    }
    (page,) = tmp_path.glob("*.md")
    assert "## beam: tokens computed again" in page.read_text() and page.read_text() in capsys.readouterr().out


def test_times_come_from_the_same_work_on_a_model(tiny_llama, tmp_path):
    folder = tiny_llama(tokenizer=True)
    small = ["--quick", "--parts", "times", "--kinds", "best-first", "--policies", "lru,cost", "--branches", "2"]
    more = ["--beam", "1", "--open", "2", "--prefix-tokens", "24", "--threads", "1", "--block-size", "8"]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in ("a b?", "c d?")))
    where = ["--model", str(folder), "--data", str(data), "--output", str(tmp_path)]
    rsbcm_eviction.main([*small, *more, *where])
    (jsonl,) = tmp_path.glob("rsbcm*.jsonl")
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    by_setting = {row["arm"]: row for row in rows}
    assert {"best-first 125% lru", "best-first 50% lru", "best-first 50% cost"} <= set(by_setting)
    whole = by_setting["best-first 125% lru"]
    assert whole["num_evicted_blocks"] == 0 and by_setting["best-first 50% lru"]["num_evicted_blocks"] > 0
    assert all(row["token_ids"] == whole["token_ids"] for row in rows)
    (page,) = tmp_path.glob("*.md")
    assert "## Seconds on the model" in page.read_text()
