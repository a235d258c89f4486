"""The solver against a fake LLM of characters, which counts computed tokens and live branches."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from integrity import check_integrity

from minirksc.engine.signals import TokenSignals, mean_top1
from minirksc.errors import ChatTemplateError, ConfigError
from minirksc.llm import LLM
from minirksc.options import SamplingParams
from minirksc.rksc.solver import Solver, SolverConfig

EOS, BOS = 1, 2
BLOCK = 4
PROBLEM = "How many eggs are in a dozen of dozens?"


class FakeTokenizer:
    """Characters as tokens; `template` False: no chat template; "broken": one that fails."""

    eos_token_ids = frozenset({EOS})
    bos_token_id = BOS

    def __init__(self, template=True):
        self.has_chat_template = bool(template)
        self._template = template

    def encode(self, text, add_special_tokens=True):
        ids = [EOS if c == "$" else ord(c) for c in text.replace("<end>", "$")]
        return [BOS, *ids] if add_special_tokens else ids

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids if i not in (EOS, BOS))

    def render_chat(self, messages, add_generation_prompt=True):
        if self._template == "broken" and len(messages) > 1:
            raise ChatTemplateError("one turn only")
        turns = [f"<{m['role']}>{m['content'].strip()}<end>\n" for m in messages]
        return "".join(turns) + "<assistant>" * add_generation_prompt

    def encode_chat(self, messages):
        return self.encode(self.render_chat(messages))


class FakeBranch:
    """Each token's KV is a cell object; a fork has the same cells."""

    def __init__(self, llm, token_ids, cells, parent=None, index=None, seed=0):
        self.llm, self.token_ids, self.cells, self.parent, self.seed = (
            llm,
            token_ids,
            cells,
            parent,
            seed,
        )
        self.sequence = self
        self.path = () if parent is None else (*parent.path, index)
        self.depth = len(self.path)
        self.output_token_ids = list(parent.output_token_ids) if parent else []
        self.signals = parent.signals + TokenSignals() if parent else TokenSignals()
        self.exit_layer, self.num_saved_layer_rows, self.num_cached_tokens = None, 0, 0
        self.finish_reason, self.pruned, self.num_forks, self.hidden = None, False, 0, 0
        llm.live.append(self)
        llm.peak = max(llm.peak, len(llm.live))

    def fork(self, n):
        assert not self.pruned
        first = self.num_forks
        self.num_forks += n
        return [
            FakeBranch(self.llm, list(self.token_ids), list(self.cells), self, i, self.seed)
            for i in range(first, first + n)
        ]

    def append(self, tokens):
        assert not self.pruned
        self.token_ids += self.llm.fragment(tokens)

    def take_over(self, other):
        self.output_token_ids, self.signals = list(other.output_token_ids), other.signals + TokenSignals()

    def prune(self):
        if not self.pruned:
            self.pruned = True
            self.llm.live.remove(self)

    @property
    def num_tokens(self):
        return len(self.token_ids)

    @property
    def text(self):
        text = self.llm.decode(self.output_token_ids)
        return text[: len(text) - self.hidden]

    @property
    def confidence(self):
        return mean_top1(self.signals)

    @property
    def num_shared_tokens(self):
        others = {id(c) for b in self.llm.live if b is not self for c in b.cells}
        return sum(id(cell) in others for cell in self.cells)


class FakeCall:
    """Releases with its end what it was told of."""

    def __init__(self):
        self.sequences = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for branch in self.sequences:
            branch.prune()


class FakeLLM:
    """Says `say(path)` ("$" ends it), else random letters keyed by seed, path and position."""

    model_path = "fake"
    config = SimpleNamespace(model="fake")
    spec = SimpleNamespace(num_layers=4)

    def __init__(self, say=None, judge=None, tokenizer=None, no_tokenizer=False):
        self.say = say or (lambda path: None)
        self.judge = judge or (lambda text: 0.5)
        self.tokenizer = None if no_tokenizer else tokenizer or FakeTokenizer()
        self.live, self.peak, self.cache = [], 0, {}
        self.asked, self.params = [], []
        self.counts = {"num_prefilled_tokens": 0, "num_decoded_tokens": 0, "num_cached_tokens": 0}
        self.fail_in = None
        self.salts, self.num_seeds = [], 0
        self.engine = SimpleNamespace(
            max_model_len=10_000,
            next_seed=self.next_seed,
            check_token_ids=lambda ids, num_before: list(ids),
            call=FakeCall,
        )

    def next_seed(self):
        self.num_seeds += 1
        return 1000 + self.num_seeds

    def need_tokenizer(self, what):
        return self.tokenizer

    def encode_fragment(self, tokens):
        return self.fragment(tokens)

    def fragment(self, tokens):
        return self.tokenizer.encode(tokens, False) if isinstance(tokens, str) else list(tokens)

    def decode(self, ids):
        return "" if self.tokenizer is None else self.tokenizer.decode(ids)

    def stats(self):
        used = len({id(cell) for branch in self.live for cell in branch.cells})
        state = {"num_blocks_used": used, "block_size": BLOCK, "num_evicted_blocks": 0, "dtype": "float32"}
        return {**self.counts, **state}

    def evictions(self):
        return []

    def branches(self, prompts, *, share, seed, salt, seats=None):
        return [self.branch(prompt, share=share, seed=seed, salt=salt) for prompt in prompts]

    def branch(self, prompt, *, share, seed, salt):
        self._maybe_fail("branch")
        self.salts.append(salt)
        ids = list(prompt)
        cells = next((self.cache[k] for k in self._keys(ids)[::-1] if k in self.cache), []) if share else []
        self.counts["num_cached_tokens"] += len(cells)
        branch = FakeBranch(self, ids, list(cells), seed=seed)
        branch.num_cached_tokens = len(cells)
        self._compute(branch)
        if share:
            self.cache.update((key, branch.cells[: len(key)]) for key in self._keys(ids))
        return branch

    def extend(self, branches, params, on_step=None):
        self._maybe_fail("extend")
        self.params.append(params)
        for branch in branches:
            self._compute(branch)
            script = self.say(branch.path)
            start, done = len(branch.output_token_ids), params.max_tokens * (branch.depth - 1)
            branch.finish_reason = "length"
            for step in range(params.max_tokens):
                seed = branch.seed if params.seed is None else params.seed
                key = f"{seed} {branch.path} {len(branch.token_ids)}"
                rng = random.Random(key)
                token = ord(rng.choice("abcdefgh"))
                if script is not None:
                    token = self.fragment(script)[done + step] if done + step < len(script) else ord(".")
                branch.token_ids.append(token)
                branch.output_token_ids.append(token)
                branch.signals += TokenSignals([0.5 + rng.random() / 2], [rng.random()])
                self.counts["num_decoded_tokens"] += 1
                stop = next((x for x in params.stop if branch.text[start:].endswith(x)), "")
                if token == EOS or stop:
                    branch.finish_reason, branch.hidden = "stop", len(stop)
                    break

    def score(self, branches, question, choices, gate=None):
        self._maybe_fail("score")
        self.choices = ["".join(map(chr, ids)) for ids in choices]
        rows = []
        one_each = bool(question) and isinstance(question[0], list)
        questions = question if one_each else [question] * len(branches)
        for branch, asked in zip(branches, questions, strict=True):
            self.counts["num_prefilled_tokens"] += len(branch.token_ids) - len(branch.cells) + len(asked)
            ids = [*branch.token_ids, *self.fragment(asked)]
            self.asked.append("".join("$" if i == EOS else "^" if i == BOS else chr(i) for i in ids))
            yes = self.judge(self.decode(ids))
            rows.append([yes, 1 - yes])
        return torch.tensor(rows)

    def _compute(self, branch):
        new = [object() for _ in branch.token_ids[len(branch.cells) :]]
        self.counts["num_prefilled_tokens"] += len(new)
        branch.cells += new

    def _keys(self, ids):
        return [tuple(ids[:n]) for n in range(BLOCK, len(ids), BLOCK)]

    def _maybe_fail(self, where):
        if self.fail_in is not None and self.fail_in[0] == where:
            raise self.fail_in[1]


def solve(llm, problem=PROBLEM, phrasings=None, on_event=None, **options):
    return Solver(llm, SolverConfig(**{"verify": "always", **options})).solve(problem, phrasings, on_event)


def one_of(*texts):
    """Branch k of the first round says text k."""
    return lambda path: texts[path[0] % len(texts)]


def test_one_prefill_for_all_and_each_branch_has_its_hint():
    llm = FakeLLM()
    result = solve(llm, branches=4, tokens_per_step=5, verify="never")
    prompt = llm.tokenizer.encode_chat([{"role": "user", "content": PROBLEM}])
    hints = ["Approach #1:", "Approach #2:", "Approach #3:", "Approach #4:"]
    assert [b.hint for b in result.branches] == hints
    assert result.stats["num_prefilled_tokens"] == len(prompt) + sum(map(len, hints))
    assert result.stats["num_decoded_tokens"] == 4 * 5
    assert {b.sharing for b in result.branches} == {"exact"}
    assert {b.num_shared_tokens for b in result.branches} == {len(prompt)}
    assert {b.num_own_tokens for b in result.branches} == {len(hints[0]) + 5}
    assert [b.path for b in result.branches] == [(0,), (1,), (2,), (3,)]
    assert len({b.text for b in result.branches}) == 4
    assert all(len(b.token_ids) == len(b.text) == 5 for b in result.branches)
    assert (llm.params[0].temperature, llm.params[0].top_p, llm.params[0].seed) == (0.8, 0.95, None)


@pytest.mark.parametrize("verify_style", ["append", "standalone"])
@pytest.mark.parametrize("depth", [1, 3])
def test_without_sharing_the_same_answers_cost_every_prefill(depth, verify_style):
    def judge(text):
        return random.Random(text).random()

    options = dict(branches=5, depth=depth, beam=2, tokens_per_step=4, verify_style=verify_style)
    shared, alone = FakeLLM(judge=judge), FakeLLM(judge=judge)
    exact = solve(shared, sharing="exact", **options)
    none = solve(alone, sharing="none", **options)
    for one, two in zip(exact.branches, none.branches, strict=True):
        assert (one.text, one.path, one.parsed, one.depth) == (
            two.text,
            two.path,
            two.parsed,
            two.depth,
        )
        assert one.score == pytest.approx(two.score)
        assert one.confidence == pytest.approx(two.confidence)
        assert (one.sharing, two.sharing, two.num_shared_tokens) == ("exact", "none", 0)
    assert exact.best == none.best
    assert shared.asked == alone.asked
    assert none.stats["num_cached_tokens"] == 0
    num_prompt = len(shared.tokenizer.encode_chat([{"role": "user", "content": PROBLEM}]))
    saved = none.stats["num_prefilled_tokens"] - exact.stats["num_prefilled_tokens"]
    assert saved >= (5 - 1) * num_prompt


def test_score_is_p_yes_times_root_of_confidence():
    llm = FakeLLM(one_of("1", "2", "3"), lambda text: 0.9 if "#2:2" in text else 0.3)
    result = solve(llm, branches=3, tokens_per_step=1, hints=["#1:", "#2:", "#3:"])
    for branch in result.branches:
        assert branch.score == pytest.approx(branch.verification * math.sqrt(branch.confidence))
    assert (result.answer, result.parsed, result.best) == ("2", "2", 1)


def test_without_verification_confidence_decides():
    llm = FakeLLM()
    result = solve(llm, branches=6, verify="never")
    assert all(b.verification is None and b.score == b.confidence for b in result.branches)
    assert result.branches[result.best].confidence == max(b.confidence for b in result.branches)
    assert llm.asked == []
    assert result.stats["verify_s"] == 0


@pytest.mark.parametrize(("select", "answer"), [("score", "7"), ("vote", "5"), ("weighted_vote", "7")])
def test_selection_rules(select, answer):
    llm = FakeLLM(one_of("5", "7", "5.0"), lambda text: 0.9 if ":7" in text else 0.1)
    result = solve(llm, branches=3, tokens_per_step=3, hints=["a:", "b:", "c:"], select=select)
    assert result.parsed == answer
    assert result.branches[result.best].parsed == answer


def test_a_branch_that_stopped_is_not_extended_and_others_are():
    llm = FakeLLM(one_of("12$", "345678"), lambda text: 0.9 if "12" in text else 0.5)
    result = solve(llm, branches=2, depth=2, beam=2, tokens_per_step=3, hints=["", ""])
    assert [b.text for b in result.branches] == ["12", "345678"]
    assert [b.finish_reason for b in result.branches] == ["stop", "length"]
    assert [b.depth for b in result.branches] == [1, 2]
    assert result.stats["num_decoded_tokens"] == 3 + 3 + 3
    # The finished one is not asked about again.
    assert len(llm.asked) == 3


def test_finished_branches_end_the_search_early():
    llm = FakeLLM(one_of("12$", "9$", "345678"), lambda text: 0.1 if "345" in text else 0.8)
    result = solve(llm, branches=3, depth=5, beam=2, tokens_per_step=3, hints=["", "", ""])
    assert len(llm.params) == 1
    assert [b.text for b in result.branches] == ["12", "9", "345"]


def test_deeper_rounds_fork_the_best():
    llm = FakeLLM(judge=lambda text: 0.9 if "#2:" in text or "#4:" in text else 0.1)
    result = solve(llm, branches=5, depth=3, beam=2, tokens_per_step=4, hints=[f"#{k}:" for k in range(1, 6)])
    nodes = result.trace["nodes"]
    assert [len([n for n in nodes if n["depth"] == depth]) for depth in (1, 2, 3)] == [5, 5, 5]
    second = [n for n in nodes if n["depth"] == 2]
    assert {nodes[n["parent"]]["hint"] for n in second} == {"#2:", "#4:"}
    kids = sorted([n["parent"] for n in second].count(p) for p in {n["parent"] for n in second})
    assert kids == [2, 3]
    for branch in result.branches:
        assert len(branch.token_ids) == 12 and branch.depth == len(branch.path) == 3
        assert branch.sharing == "exact"
    for node in nodes:
        if node["parent"] is not None:
            assert node["text"].startswith(nodes[node["parent"]]["text"])
            assert node["path"][:-1] == nodes[node["parent"]]["path"]
    assert result.stats["num_decoded_tokens"] == 3 * 5 * 4
    # Roots and what did not go on are gone before a round is decoded.
    assert llm.peak <= 5 + 5 + 1


def test_verification_does_not_change_what_is_decoded():
    never = solve(FakeLLM(), branches=4, depth=1, verify="never")
    asked = solve(FakeLLM(), branches=4, depth=1, verify="always")
    assert [b.text for b in never.branches] == [b.text for b in asked.branches]


def test_append_question_is_the_next_turn_and_closes_open_ones():
    llm = FakeLLM(one_of("12$", "345"))
    solve(llm, branches=2, tokens_per_step=3, hints=["a", "b"])
    root = f"^<user>{PROBLEM}$\n<assistant>"
    turn = "\n<user>Is this answer correct? YES or NO.$\n<assistant>"
    assert sorted(llm.asked) == sorted([f"{root}a12${turn}", f"{root}b345${turn}"])


def test_choices_are_scored_by_first_tokens_where_these_differ():
    llm = FakeLLM()
    solve(llm, branches=1)
    assert llm.choices == ["Y", "N"]
    solve(llm, branches=1, chat=False)  # " YES" and " NO": the same first token here
    assert llm.choices == [" YES", " NO"]


def test_append_question_in_plain_text():
    llm = FakeLLM(one_of("345"))
    solve(llm, branches=1, tokens_per_step=3, hints=[" a"], chat=False)
    question = "\n\nIs this answer correct? YES or NO.\nAnswer:"
    assert llm.asked == [f"^{PROBLEM} a345{question}"]
    broken = FakeLLM(one_of("345"), tokenizer=FakeTokenizer("broken"))
    solve(broken, branches=1, tokens_per_step=3, hints=[" a"])
    assert broken.asked == [f"^<user>{PROBLEM}$\n<assistant> a345{question}"]


@pytest.mark.parametrize("as_ids", [False, True])
def test_standalone_question(as_ids):
    llm = FakeLLM(one_of("12$", "345"))
    problem = llm.tokenizer.encode(PROBLEM) if as_ids else PROBLEM
    result = solve(
        llm,
        problem,
        branches=2,
        tokens_per_step=3,
        hints=["a", "b"],
        verify_style="standalone",
        chat=not as_ids,
    )
    head = f"Problem:\n{PROBLEM}\n\nProposed answer:\n"
    tail = "\n\nIs this answer correct? YES or NO."
    before, after = ("^", "\nAnswer:") if as_ids else ("^<user>", "$\n<assistant>")
    assert llm.asked == [f"{before}{head}{answer}{tail}{after}" for answer in ("a12", "b345")]
    # The part with the problem is computed once.
    num_head, num_rest = len(before + head), sum(len(a + tail + after) for a in ("a12", "b345"))
    num_prompt = len(problem if as_ids else llm.tokenizer.encode_chat([{"role": "user", "content": PROBLEM}]))
    expected = num_head + num_rest + num_prompt + 2 - result.stats["num_cached_tokens"]
    assert result.stats["num_prefilled_tokens"] == expected


def test_phrasings_share_what_they_have_in_common():
    llm = FakeLLM()
    wordings = [PROBLEM, PROBLEM, PROBLEM[:20] + "?!", "Eggs: 12 * 12"]
    result = solve(llm, PROBLEM, wordings, branches=4, verify="never", chat=False)
    shared = [b.num_shared_tokens for b in result.branches]
    whole = len(PROBLEM) + 1
    assert shared == [whole, whole, 20, 0]  # BOS and 20 characters, down to a whole block
    assert [b.sharing for b in result.branches] == ["exact", "exact", "exact", "none"]
    assert [b.path for b in result.branches] == [(0,), (1,), (2,), (3,)]
    assert result.trace["phrasings"] == wordings
    with pytest.raises(ConfigError, match="2 phrasings for 4 branches"):
        solve(llm, PROBLEM, wordings[:2], branches=4)


def test_one_branch_shares_with_nobody_but_the_cache():
    llm = FakeLLM()
    options = dict(branches=1, verify="never", chat=False, sampling=SamplingParams(seed=0))
    first, again = (solve(llm, **options) for _ in range(2))
    assert (first.branches[0].sharing, first.branches[0].num_shared_tokens) == ("none", 0)
    assert again.branches[0].sharing == "exact"
    assert again.branches[0].num_shared_tokens == again.stats["num_cached_tokens"] > 0
    assert first.answer == again.answer


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("lost")])
@pytest.mark.parametrize("where", ["branch", "extend", "score", "on_event"])
@pytest.mark.parametrize("verify_style", ["append", "standalone"])
@pytest.mark.parametrize("sharing", ["none", "exact"])
def test_nothing_is_left_whatever_happens(where, error, verify_style, sharing):
    llm = FakeLLM()
    options = dict(branches=3, depth=2, verify_style=verify_style, sharing=sharing)
    solve(llm, **options)
    assert llm.live == []
    num_events = 0

    def on_event(event):
        nonlocal num_events
        num_events += 1
        if where == "on_event" and num_events == 3:
            raise error
        if event["event"] == "extend" and where != "on_event":
            llm.fail_in = (where, error)

    if (where, sharing, verify_style) == ("branch", "exact", "append"):
        llm.fail_in = (where, error)  # the only branch() call comes first
    with pytest.raises(type(error)):
        solve(llm, on_event=on_event, **options)
    assert llm.live == []


def test_trace_is_json_and_events_are_in_order():
    heard = []
    llm = FakeLLM()
    result = solve(llm, branches=3, depth=2, on_event=heard.append, answer_parser=lambda text: text[:1])
    assert json.loads(json.dumps(result.trace, allow_nan=False)) == result.trace
    as_dict = result.to_dict()
    assert json.loads(json.dumps(as_dict, allow_nan=False)) == as_dict
    assert heard == result.trace["events"]
    names = [event["event"] for event in heard]
    assert names == ["prefill", "extend", "verify", "fork", "extend", "verify", "select"]
    starts = [event["at_s"] for event in heard]
    assert starts == sorted(starts)
    stats = result.stats
    phases = stats["prefill_s"] + stats["decode_s"] + stats["verify_s"]
    assert 0 < phases <= stats["total_s"]
    assert stats["blocks_used_peak"] > 0
    assert [n["id"] for n in result.trace["nodes"]] == list(range(6))
    best = result.trace["nodes"][result.trace["best"]]
    assert best["text"] == result.answer and best["score"] == result.branches[result.best].score
    assert {(b.similarity, b.exit_layer) for b in result.branches} == {(None, None)}


def test_a_branch_that_generated_nothing_has_no_confidence_and_does_not_win():
    class Stopped(FakeLLM):
        def extend(self, branches, params, on_step=None):
            super().extend(branches[1:], params, on_step)
            branches[0].finish_reason = "consensus"

    for verify in ("auto", "always", "never"):
        result = solve(Stopped(one_of("1", "1", "2")), branches=3, tokens_per_step=2, verify=verify)
        first, node = result.branches[0], result.trace["nodes"][0]
        assert (first.text, first.confidence, node["confidence"]) == ("", None, None)
        assert set(node["signals"].values()) == {None}
        assert result.best != 0
        json.dumps([result.to_dict(), result.trace], allow_nan=False)


@pytest.mark.parametrize("sharing", ["none", "exact"])
def test_signals_are_of_all_rounds(sharing):
    result = solve(FakeLLM(), branches=3, depth=3, tokens_per_step=4, sharing=sharing)
    last = [node for node in result.trace["nodes"] if node["depth"] == 3]
    assert [node["signals"]["mean_top1"] for node in last] == [node["confidence"] for node in last]
    other = solve(FakeLLM(), branches=3, depth=3, tokens_per_step=4)
    assert [node["signals"] for node in result.trace["nodes"]] == [node["signals"] for node in other.trace["nodes"]]


def test_sampling_is_taken_over():
    llm = FakeLLM()
    sampling = SamplingParams(temperature=1.5, stop=["\n"], max_tokens=7, min_tokens=6, seed=4)
    solve(llm, branches=2, tokens_per_step=5, sampling=sampling)
    (params,) = llm.params
    assert (params.temperature, params.seed, params.max_tokens, params.stop) == (1.5, 4, 5, ("\n",))


def test_a_solve_without_a_seed_takes_one_of_the_llm_for_all_its_branches():
    llm = FakeLLM()
    wordings = [PROBLEM, PROBLEM + "?"]
    first, second = (
        solve(llm, PROBLEM, wordings, branches=2, verify_style="standalone", sharing=sharing)
        for sharing in ("exact", "none")
    )
    assert (first.trace["seed"], second.trace["seed"], llm.num_seeds) == (1001, 1002, 2)
    assert [b.text for b in first.branches] != [b.text for b in second.branches]
    again = solve(FakeLLM(), PROBLEM, wordings, branches=2, sampling=SamplingParams(seed=1001))
    assert [b.text for b in again.branches] == [b.text for b in first.branches]
    assert again.trace["seed"] == 1001


@pytest.mark.parametrize("sharing", ["none", "exact"])
def test_a_stop_string_is_not_part_of_the_text(sharing):
    llm = FakeLLM(one_of("123456;;", "12345678"))
    sampling = SamplingParams(stop=";;")
    result = solve(llm, branches=2, depth=2, tokens_per_step=5, sampling=sampling, sharing=sharing)
    (stopped,) = [b for b in result.branches if b.finish_reason == "stop"]
    assert (stopped.text, stopped.parsed) == ("123456", "123456")
    assert llm.decode(stopped.token_ids) == "123456;;"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(branches=0), "branches=0"),
        (dict(branches=1025), "1..1024"),
        (dict(branches=True), "branches=True"),
        (dict(branches=2.0), "whole number"),
        (dict(depth=0), "depth=0"),
        (dict(beam=0), "beam=0"),
        (dict(branches=4, beam=5), "beam=5"),
        (dict(tokens_per_step=0), "tokens_per_step=0"),
        (dict(hints=["a"] * 7), "one entry a branch, 8"),
        (dict(branches=3, hints="abc"), "one entry a branch"),
        (dict(sharing="fuzzy"), "use one of none, exact, semantic"),
        (dict(verify="sometimes"), "use one of auto, always, never"),
        (dict(verify="always", policy="paper"), "policy='paper' needs verify='auto'"),
        (dict(verify="never", decode_exit="stop_all"), "decode_exit='stop_all' needs verify='auto'"),
        (dict(verify="always", gates="g.json"), "gates='g.json' needs verify='auto'"),
        (dict(verify="auto", policy="paper", gates="g.json"), "leave gates out"),
        (dict(verify="auto", decode_exit="all"), "use one of auto, off, keep_leader, stop_all"),
        (dict(sharing_mode="aligned"), "sharing_mode='aligned' needs sharing='semantic'"),
        (dict(sharing="semantic", tau=float("nan")), "tau=nan must be a number"),
        (dict(verify_style="both"), "append, standalone"),
        (dict(select="best"), "weighted_vote"),
        (dict(answer_parser="numbers"), "number"),
        (dict(sampling=SamplingParams(n=2)), "n=2"),
    ],
)
def test_bad_config_is_a_clear_error(options, message):
    with pytest.raises(ConfigError, match=message.replace("..", r"\.\.")):
        SolverConfig(**options)


def test_branches_1_needs_no_beam():
    assert SolverConfig(branches=1).beam == 1


def test_without_tokenizer_token_ids_work_and_text_is_a_clear_error():
    llm = FakeLLM(no_tokenizer=True)
    with pytest.raises(ConfigError, match=r"hints as token ids.*verify='never'"):
        Solver(llm)
    with pytest.raises(ConfigError, match="select='score'"):
        Solver(llm, SolverConfig(branches=2, hints=[(), ()], verify="never", select="vote"))
    solver = Solver(llm, SolverConfig(branches=2, depth=2, hints=[[7], [8, 9]], verify="never"))
    result = solver.solve([5, 6, 7])
    assert (result.answer, result.parsed) == ("", None)
    assert all(len(b.token_ids) == 64 for b in result.branches)
    assert json.loads(json.dumps(result.trace)) == result.trace
    with pytest.raises(ConfigError, match="as token ids"):
        solver.solve("text")


def test_on_the_engine_sharing_changes_the_cost_alone(tiny_llama):
    prompt = [(7 * i) % 89 + 5 for i in range(100)]
    sampling = SamplingParams(temperature=1.0, ignore_eos=True, seed=3)
    results = {}
    with LLM(tiny_llama(), block_size=8, kv_cache_bytes="2MiB") as llm:
        for sharing in ("none", "exact"):
            config = SolverConfig(
                branches=4,
                depth=3,
                tokens_per_step=6,
                hints=[[10 + k] * 3 for k in range(4)],
                sampling=sampling,
                sharing=sharing,
                verify="never",
            )
            results[sharing] = Solver(llm, config).solve(prompt)
            check_integrity(llm.engine.blocks)
            assert llm.stats()["num_blocks_used"] == 0
    none, exact = results["none"], results["exact"]
    assert [b.token_ids for b in none.branches] == [b.token_ids for b in exact.branches]
    assert [b.path for b in none.branches] == [b.path for b in exact.branches]
    confidences = [b.confidence for b in none.branches]
    assert confidences == pytest.approx([b.confidence for b in exact.branches], abs=1e-4)
    assert {b.num_shared_tokens for b in none.branches} == {0}
    assert min(b.num_shared_tokens for b in exact.branches) >= 100
    # 100 once, 3 hint tokens each, and the last token of each child's parent.
    assert exact.stats["num_prefilled_tokens"] <= 100 + 4 * 3 + 2 * 4
    assert none.stats["num_prefilled_tokens"] >= 3 * 4 * 100


@pytest.mark.parametrize("style", ["append", "standalone"])
def test_where_all_end_before_the_last_round_each_is_asked_about_once(tiny_llama, style):
    ends_at_once = SamplingParams(temperature=1.0, seed=3, logit_bias={2: 50.0})
    config = SolverConfig(branches=3, depth=2, verify="always", verify_style=style, sampling=ends_at_once)
    with LLM(tiny_llama(chat=True), block_size=8, kv_cache_bytes="2MiB") as llm:
        result = Solver(llm, config).solve(PROBLEM)
    asked = [event["nodes"] for event in result.trace["events"] if event["event"] == "verify"]
    assert asked == [[0, 1, 2]]
    assert all(branch.score is not None for branch in result.branches)
