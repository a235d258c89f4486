"""`Branch.text`: what `generate` shows of the same tokens, for good; and branches without what ended them."""

import json
import random
import shutil

import pytest
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.errors import BranchError, ConfigError

PROMPT = "Tell me."


@pytest.fixture(scope="module")
def llm(tiny_llama, tmp_path_factory):
    """Its tokenizer has tokens of several letters, among them halves of characters, and special ones."""
    folder = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(tiny_llama(tokenizer=True), folder)
    file = json.loads((folder / "tokenizer.json").read_text())
    vocab, merges = file["model"]["vocab"], file["model"]["merges"]
    # Ã is 0xC3 of UTF-8 as this alphabet spells it, and © its 0xA9: together they are é.
    for left, right in ("ab", "cd", ("ab", "c"), ("cd", "."), ("Ġ", "a"), (".", "Ã"), ("©", "."), ("©", "e"), ".."):
        merges.append([left, right])
        vocab[left + right] = len(vocab)
    (folder / "tokenizer.json").write_text(json.dumps(file))
    with LLM(folder, block_size=4, kv_cache_bytes="2MiB") as llm:
        yield llm
        check_integrity(llm.engine.blocks)
        assert llm.stats()["num_blocks_used"] == 0


@pytest.fixture()
def say(llm, monkeypatch):
    """Makes the model say these tokens, one after the other, in each generation."""
    sample = llm.engine._sample

    def make(tokens):
        def saying(logits, wanted):
            return [
                (r, one._replace(token_id=tokens[len(r.output_token_ids) % len(tokens)]))
                for r, one in sample(logits, wanted)
            ]

        monkeypatch.setattr(llm.engine, "_sample", saying)

    return make


def ids(llm, *pieces):
    tokenizer = llm.tokenizer
    known = {tokenizer.token(i): i for i in range(tokenizer.vocab_size)}
    return [known[piece] for piece in pieces]


def greedy(**options):
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **options})


def both(llm, params, **options):
    """A branch that was extended, and what `generate` gives."""
    branch = llm.branch(PROMPT)
    llm.extend([branch], params, **options)
    return branch, llm.generate(PROMPT, params)[0].outputs[0]


SAID = ["a", "<|im_end|>", "b", ".", "<|im_start|>", "c", "ab", "cd.", "Ã", "©", "Ã", "x"]
CASES = [
    {},
    {"stop": "."},
    {"stop": ["bc", "cab"]},
    {"stop": "cd", "include_stop_str_in_output": True},
    {"stop": "d."},
    {"stop": "é"},
    {"skip_special_tokens": False},
    {"skip_special_tokens": False, "stop": "<|im_start|>"},
    {"skip_special_tokens": False, "stop": "im_start|>ca"},
    {"stop_token_ids": [4]},
    {"stop_token_ids": [4], "skip_special_tokens": False},
    {"ignore_eos": False, "skip_special_tokens": False},
    {"max_tokens": 9},
    {"max_tokens": 11},
    {"detokenize": False},
    {"detokenize": False, "stop_token_ids": [3]},
    {"stop": ".", "min_tokens": 5},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("last", ["x", "</s>"])
def test_it_is_what_generate_shows(llm, say, options, last):
    say(ids(llm, *SAID[:-1], last))
    branch, shown = both(llm, greedy(**options))
    assert branch.output_token_ids == shown.token_ids
    assert branch.text == shown.text
    # And stays, whatever follows.
    before = branch.text.removesuffix("\ufffd")
    child = branch.fork(1)[0]
    assert child.text == branch.text
    child.append("ab")
    assert child.text == branch.text
    say(ids(llm, "x", "y"))
    for one in (branch, child):
        llm.extend([one], greedy(max_tokens=2))
        assert one.text.startswith(before) and one.text.endswith("xy")
        assert one.finish_reason == "length"
    branch.prune()
    child.prune()


@pytest.mark.parametrize("seed", range(12))
def test_pieces_of_a_generation_read_as_the_whole(llm, seed):
    """Characters, spaces and half characters alike, wherever max_tokens cuts."""
    rng = random.Random(seed)
    params = {"temperature": 1.0, "seed": seed, "ignore_eos": True, "skip_special_tokens": seed % 2 == 0}
    branch = llm.branch(PROMPT)
    for _ in range(8):
        llm.extend([branch], SamplingParams(**params, max_tokens=rng.randint(1, 4)))
        (whole,) = llm.generate(PROMPT, SamplingParams(**params, max_tokens=len(branch.output_token_ids)))
        assert branch.output_token_ids == whole.outputs[0].token_ids
        assert branch.text == whole.outputs[0].text
    branch.prune()


def test_half_a_character_that_something_else_follows_remains_one(llm, say):
    branch = llm.branch(PROMPT)
    say(ids(llm, "Ã", "©"))
    llm.extend([branch], greedy(max_tokens=1))
    twin, other = branch.fork(2)
    assert branch.text == "\ufffd"
    other.append("!")
    say(ids(llm, "©"))
    llm.extend([twin, other], greedy(max_tokens=1))
    assert (branch.text, twin.text, other.text) == ("\ufffd", "é", "\ufffd\ufffd")
    for one in (branch, twin, other):
        one.prune()


@pytest.mark.parametrize("num_tokens", range(1, 8))
def test_a_fork_of_a_branch_under_way_goes_on_from_there(llm, say, num_tokens):
    said = ["ab", "Ã", "©", "a", "b", "x", "Ã", "©"]
    say(ids(llm, *said))
    root, made = llm.branch(PROMPT), []

    def on_step(progress):
        if progress[0].num_tokens == num_tokens and not made:
            made.extend(root.fork(1))
            assert root.text == made[0].text

    llm.extend([root], greedy(max_tokens=8, stop="abc"), on_step)
    (child,) = made
    (cut,) = llm.generate(PROMPT, greedy(max_tokens=num_tokens))
    assert child.text == cut.outputs[0].text and child.output_token_ids == cut.outputs[0].token_ids
    say(ids(llm, *said[num_tokens:]))
    llm.extend([child], greedy(max_tokens=8 - num_tokens))
    assert child.text == root.text == "abéabxé"
    child.prune()
    root.prune()


def test_progress_ends_as_the_branch_does(llm, say):
    branch, kept = llm.branch(PROMPT), []
    for said in (["a", "Ã"], ["©", "ab", "."]):
        say(ids(llm, *said))
        llm.extend([branch], greedy(max_tokens=len(said), stop="b"), kept.extend)
        assert kept[-1].text == branch.text
        assert kept[-1].num_tokens == len(branch.output_token_ids)
        assert kept[-1].signals == branch.signals
    assert branch.text == "aéa"
    branch.prune()


KEPT = [
    # said, options, text, output tokens that stay, what is appended in place of part of one
    (["a", ".", "."], {"stop": ".."}, "a", ["a"], []),
    (["a", "b", "cd.", "x"], {"stop": "."}, "abcd", ["a", "b"], ["cd"]),
    (["a", "abc", "x"], {"stop": "bc"}, "aa", ["a"], ["a"]),
    (["abc", "x"], {"stop": "abc"}, "", [], []),
    (["a", "Ã", "©.", "x"], {"stop": "."}, "aé", ["a"], ["Ã", "©"]),
    (["a", "Ã", "©", "x"], {"stop": "é"}, "a", ["a"], []),
    (["a", "Ã", "©", ".", "x"], {"stop": "."}, "aé", ["a", "Ã", "©"], []),
    (["a", "<|im_end|>", ".", "x"], {"stop": "."}, "a", ["a", "<|im_end|>"], []),
    (["a", "<|im_end|>", "x"], {"stop": "im_", "skip_special_tokens": False}, "a<|", ["a"], ["<", "|"]),
    (["a", "b", "x"], {"stop_token_ids": [5 + 83]}, None, None, []),
    (["a", "b", "</s>", "x"], {"ignore_eos": False}, "ab", ["a", "b"], []),
    (["a", "Ã", "</s>", "x"], {"ignore_eos": False}, "a\ufffd", ["a", "Ã"], []),
    (["a", "b", "x"], {"max_tokens": 2}, "ab", ["a", "b"], []),
]


@pytest.mark.parametrize(("said", "options", "text", "stays", "again"), KEPT)
@pytest.mark.parametrize("share", [True, False])
def test_without_its_stop_a_branch_goes_on_as_if_that_had_never_been(
    llm, say, monkeypatch, said, options, text, stays, again, share
):
    if "stop_token_ids" in options:
        options, text, stays = {"stop_token_ids": ids(llm, "b")}, "a", ["a"]
    prompt = llm.tokenizer.encode(PROMPT)
    branch = llm.branch(PROMPT, share=share)
    sibling = branch.fork(1)[0]
    say(ids(llm, *said))
    llm.extend([branch], greedy(**options), keep_stop=False)
    monkeypatch.undo()
    assert branch.text == text
    assert branch.output_token_ids == ids(llm, *stays)
    assert branch.token_ids == [*prompt, *ids(llm, *stays, *again)]
    assert len(branch.logprobs) == len(branch.signals.top1) == len(branch.signals.self_certainty) == len(stays)
    check_integrity(llm.engine.blocks)
    # Its KV is that of the tokens that are left.
    fresh = llm.branch([*branch.token_ids], share=False)
    llm.extend([branch, sibling], greedy(detokenize=False))
    llm.extend([fresh], greedy(detokenize=False))
    assert branch.token_ids == fresh.token_ids
    check_integrity(llm.engine.blocks)
    for one in (branch, sibling, fresh):
        one.prune()


def test_what_keep_stop_cannot_do_is_refused(llm):
    branch = llm.branch(PROMPT)
    with pytest.raises(ConfigError, match="include_stop_str_in_output"):
        llm.extend([branch], greedy(stop="a", include_stop_str_in_output=True), keep_stop=False)
    assert branch.token_ids == llm.tokenizer.encode(PROMPT) and branch.finish_reason is None
    with pytest.raises(BranchError, match="is being extended"):
        llm.extend([branch], greedy(), lambda progress: branch.append("x"))
    branch.prune()


@pytest.mark.parametrize("penalties", [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}], ids=str)
def test_penalties_count_all_that_a_branch_and_its_ancestors_generated(llm, penalties):
    bias = {token: 12.0 - 0.5 * token / 10 for token in range(100, 140)}  # without penalties, always the same token
    params = {**penalties, "logit_bias": bias}
    (whole,) = llm.generate(PROMPT, greedy(max_tokens=24, **params))
    assert len(set(whole.outputs[0].token_ids)) > 3 and len(llm.tokenizer.encode(PROMPT)) > 1
    branches = [llm.branch(PROMPT)]
    for num_tokens in (1, 5, 2, 10, 6):
        llm.extend(branches[-1:], greedy(max_tokens=num_tokens, **params))
        branches += branches[-1].fork(1)
    assert branches[-1].output_token_ids == whole.outputs[0].token_ids
    for branch in branches:
        branch.prune()
