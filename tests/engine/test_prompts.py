"""Prompts, ids and parameters in every form: taken as they are meant, or refused by name, alone."""

import array
import pickle
from collections import deque

import numpy as np
import pytest
import torch

from minirksc import LLM, SamplingParams
from minirksc.engine.request import Sequence
from minirksc.errors import BranchError, ConfigError, EngineClosedError, MinirkscError, PromptError

ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
IDS = [5, 6, 7, 8]

GOOD = {
    "list": lambda: IDS,
    "tuple": lambda: tuple(IDS),
    "range": lambda: range(5, 9),
    "deque": lambda: deque(IDS),
    "numpy array": lambda: np.array(IDS),
    "small numpy array": lambda: np.array(IDS, dtype=np.uint8),
    "tensor": lambda: torch.tensor(IDS),
    "int32 tensor": lambda: torch.tensor(IDS, dtype=torch.int32),
    "array.array": lambda: array.array("i", IDS),
    "list of numpy": lambda: list(np.array(IDS)),
    "list of 0-d tensors": lambda: list(torch.tensor(IDS)),
    "mixed": lambda: [5, np.int32(6), torch.tensor(7), np.uint8(8)],
}
BAD = {
    "bool": [5, True],
    "numpy bool": [5, np.True_],
    "bool tensor": torch.tensor([True, False]),
    "float": [5, 6.0],
    "float array": np.array([5.0, 6.0]),
    "float tensor": torch.tensor([5.0]),
    "text": [5, "6"],
    "bytes within": [5, b"6"],
    "None within": [5, None],
    "list within": [5, [6]],
    "complex": [5, 6j],
    "negative": [5, -1],
    "beyond": [5, 300],
    "numpy beyond": np.array([5, 300]),
    "far beyond": [5, 10**5000],
}
NO_PROMPT = {
    "None": None,
    "int": 7,
    "float": 1.5,
    "bool": True,
    "bytes": b"hi",
    "bytearray": bytearray(b"hi"),
    "memoryview": memoryview(b"hi"),
    "set": {5, 6},
    "object": object(),
    "type": np.ndarray,
    "no keys": {},
    "other keys": {"tokens": IDS},
    "more keys": {"prompt": "a", "prompt_token_ids": IDS},
    "keys of two kinds": {5: "a", "prompt": "b"},
    "None ids": {"prompt_token_ids": None},
    "text ids": {"prompt_token_ids": "56"},
    "ids for text": {"prompt": IDS},
    "0-d array": {"prompt_token_ids": np.array(5)},
    "2-d array": {"prompt_token_ids": np.array([IDS])},
    "half a surrogate": "\ud800",
    "too long": [5] * 1000,
    "nothing": [],
    "salt of a number": {"prompt": "a", "cache_salt": 5},
    "empty salt": {"prompt": "a", "cache_salt": ""},
}


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama(chat=True), block_size=4, kv_cache_bytes="1MiB") as llm:
        yield llm


@pytest.fixture()
def branch(llm):
    branch = llm.branch(IDS)
    yield branch
    branch.prune()
    assert llm.stats()["num_blocks_used"] == 0 and not llm.engine.has_work


def prompt_ids(llm, prompts, **options):
    return [result.prompt_token_ids for result in llm.generate(prompts, ONE, **options)]


def is_plain(ids):
    return all(type(i) is int for i in ids)


@pytest.mark.parametrize("form", GOOD)
def test_ids_are_taken_in_every_form_and_kept_as_int(llm, branch, form):
    make = GOOD[form]
    for prompts in (make(), [make()], {"prompt_token_ids": make()}, [{"prompt_token_ids": make()}]):
        assert prompt_ids(llm, prompts) == [IDS]
    assert prompt_ids(llm, [make(), "a", make()])[::2] == [IDS, IDS]
    root, other = llm.branches([make(), {"prompt_token_ids": make()}])
    assert root.token_ids == other.token_ids == IDS
    for piece in (make(), {"prompt_token_ids": make()}):
        branch.append(piece)
    assert branch.token_ids == IDS * 3 and is_plain(branch.token_ids)
    expected = llm.score([root], IDS, [[9], [10]])
    torch.testing.assert_close(llm.score([root], make(), np.array([[9], [10]])), expected)
    torch.testing.assert_close(llm.score([root, other], [make(), IDS], [[9], [10]])[:1], expected)
    torch.testing.assert_close(llm.logits(make()), llm.logits(IDS))
    assert llm.lens(make()) is llm.lens(IDS)
    assert llm.decode(make()) == llm.decode(IDS)
    params = SamplingParams(stop_token_ids=make(), logit_bias=dict.fromkeys(make(), 1.0), max_tokens=1)
    assert params.stop_token_ids == tuple(IDS) and params.logit_bias == dict.fromkeys(IDS, 1.0)
    assert is_plain(params.stop_token_ids) and is_plain(params.logit_bias)
    root.prune()
    other.prune()


@pytest.mark.parametrize("form", BAD)
def test_wrong_ids_are_refused_by_name_wherever_they_are_taken(llm, branch, form):
    wrong = BAD[form]
    for use in (
        lambda: llm.generate([wrong], ONE),
        lambda: llm.generate({"prompt_token_ids": wrong}, ONE),
        lambda: llm.branch(wrong),
        lambda: llm.branches([IDS, wrong]),
        lambda: next(llm.stream(wrong, ONE)),
        lambda: branch.append(wrong),
        lambda: branch.append({"prompt_token_ids": wrong}),
        lambda: llm.score([branch], {"prompt_token_ids": wrong}, [[8], [9]]),
        lambda: llm.score([branch], IDS, [[8], wrong]),
        lambda: llm.logits(wrong),
        lambda: llm.lens(wrong),
        lambda: llm.engine.new_sequence(wrong),
    ):
        with pytest.raises(PromptError, match=r"token id .* is (no whole number|outside the vocabulary)"):
            use()
    with pytest.raises(ConfigError, match="stop_token_ids"):
        llm.generate([IDS], SamplingParams(stop_token_ids=wrong))
    if all(type(i).__hash__ for i in wrong):
        with pytest.raises(ConfigError, match="logit_bias"):
            llm.generate([IDS], SamplingParams(logit_bias=dict.fromkeys(list(wrong), 1.0)))
    assert branch.token_ids == IDS
    assert llm.stats()["num_blocks_used"] == 1 and not llm.engine.has_work


@pytest.mark.parametrize("kind", NO_PROMPT)
def test_what_is_no_prompt_harms_no_other(llm, branch, kind):
    wrong = NO_PROMPT[kind]
    (expected,) = llm.generate("good", ONE)
    results = llm.generate(["good", wrong, "good"], ONE, return_errors=True)
    assert [r.outputs[0].token_ids for r in results[::2]] == [expected.outputs[0].token_ids] * 2
    assert isinstance(results[1].error, MinirkscError) and not results[1].outputs
    assert results[0].error is results[2].error is None
    for use in (
        lambda: llm.generate(["good", wrong], ONE),
        lambda: llm.branches(["good", wrong]),
    ):
        with pytest.raises(MinirkscError, match="prompt 1: "):
            use()
    for use in (lambda: next(llm.stream(wrong, ONE)), lambda: llm.branch(wrong)):
        with pytest.raises(MinirkscError):
            use()
    if kind != "int":  # [7] is a prompt of one token
        with pytest.raises(MinirkscError):
            llm.generate([wrong], ONE)
    if kind not in ("nothing", "too long"):  # fine as a piece of something
        with pytest.raises(MinirkscError):
            branch.append(wrong)
        with pytest.raises(MinirkscError):
            llm.score([branch], "?", ["a", wrong])
    assert branch.token_ids == IDS


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_token": 1},
        {"n": 0},
        {"n": 2, "temperature": 0},
        "hot",
        7,
        SamplingParams,
        {"stop_token_ids": [300]},
        {"logit_bias": {10**6: 1.0}},
        {"max_tokens": 10**6},
        {"stop": "x", "detokenize": False},
    ],
    ids=str,
)
def test_parameters_that_do_not_fit_harm_no_other_prompt(llm, branch, wrong):
    results = llm.generate(["a", "b", "c"], [ONE, wrong, {"max_tokens": 2, "ignore_eos": True}], return_errors=True)
    assert [len(r.outputs) for r in results] == [1, 0, 1]
    assert isinstance(results[1].error, ConfigError | PromptError)
    assert len(results[2].outputs[0].token_ids) == 2
    for use in (
        lambda: llm.generate("a", wrong),
        lambda: llm.extend([branch], wrong),
        lambda: next(llm.stream("a", wrong)),
    ):
        with pytest.raises((ConfigError, PromptError)):
            use()
    assert branch.finish_reason is None and branch.output_token_ids == []


def test_many_prompts_come_in_any_order_keeping_form(llm):
    texts = ["Water", "The sky", "Fire"]
    for prompts in (texts, tuple(texts), iter(texts), (t for t in texts), np.array(texts), dict.fromkeys(texts).keys()):
        if isinstance(prompts, type({}.keys())):
            with pytest.raises(PromptError, match="must be text"):  # a set, as far as anybody can tell
                llm.generate(prompts, ONE)
            continue
        assert [r.prompt for r in llm.generate(prompts, ONE)] == texts
    assert prompt_ids(llm, np.array([IDS, IDS])) == prompt_ids(llm, (i for i in [IDS, iter(IDS)])) == [IDS, IDS]
    assert prompt_ids(llm, iter(IDS)) == [IDS]
    assert llm.generate([], ONE) == [] and llm.branches([]) == []
    assert [r.prompt for r in llm.generate({"prompt": "Fire"}, {"max_tokens": 1})] == ["Fire"]
    for params in (iter([ONE, {"max_tokens": 2}]), (ONE, {"max_tokens": 2})):
        (first, second) = llm.generate(texts[:2], params)
        assert len(first.outputs[0].token_ids) == 1 and len(second.outputs[0].token_ids) <= 2
    with pytest.raises(ConfigError, match="2 sampling parameters for 3"):
        llm.generate(texts, [ONE, ONE], return_errors=True)
    branches = llm.branches("one text")  # and not a branch a letter
    assert [b.token_ids for b in branches] == [llm.tokenizer.encode("one text")]
    branches[0].prune()


def test_conversations_in_every_form(llm):
    message = {"role": "user", "content": "hi"}
    (expected,) = llm.chat([message], ONE)
    for form in (message, (message,), iter([message]), [[message]], ((message,),), [iter([message])], ([message],)):
        (result,) = llm.chat(form, ONE)
        assert result.prompt_token_ids == expected.prompt_token_ids
    assert llm.chat([], ONE) == []
    for wrong in ("hi", None, 7, [7], [None], ["hi"], [[]], [["hi"]], [message, "hi"], [[message], message], b"hi"):
        with pytest.raises(PromptError, match="a conversation must be"):
            llm.chat(wrong, ONE)
    results = llm.chat([[message], "hi", [message, None], [message]], ONE, return_errors=True)
    assert [r.error is None for r in results] == [True, False, False, True]


def test_what_is_no_branch_question_or_choice_is_refused(llm, branch):
    for wrong in (None, 5, "x", branch, [None], [branch, "x"], {branch}):
        with pytest.raises(BranchError, match="branches must be a list"):
            llm.extend(wrong, ONE)
        with pytest.raises(BranchError, match="branches must be a list"):
            llm.score(wrong, "?", ["a", "b"])
    llm.extend(iter([branch]), ONE)
    for choices in (None, "yes", 5, {"a", "b"}, b"ab", [], ["a"], ["a", ""]):
        with pytest.raises(ConfigError):
            llm.score([branch], "?", choices)
    for choices in ([5, 6], ["a", None], ["a", 5], [b"a", b"b"]):
        with pytest.raises(PromptError, match="must be text"):
            llm.score([branch], "?", choices)
    for question in (None, 5, b"?", {5}):
        with pytest.raises(PromptError):
            llm.score([branch], question, ["a", "b"])
    torch.testing.assert_close(
        llm.score([branch, branch], ["?", [9]], ["a", "b"])[0], llm.score([branch], "?", ["a", "b"])[0]
    )
    for question in (["?", "!"], [[5], [6]]):
        with pytest.raises(ConfigError, match="2 questions for 1"):
            llm.score([branch], question, ["a", "b"])
    for n in (0, -1, 1.5, True, "2", None):
        with pytest.raises(ConfigError, match="at least 1"):
            branch.fork(n)
    with pytest.raises(ConfigError, match="its own salt"):
        branch.append({"prompt": "a", "cache_salt": "x"})
    for answer in ({7: "stop"}, {"0": "stop"}, {-1: "stop"}, {0: None}, {0: 5}, [0], "stop", 0):
        with pytest.raises(ConfigError, match="on_step"):
            llm.extend([branch], {"max_tokens": 3, "ignore_eos": True}, lambda progress, answer=answer: answer)
    llm.extend([branch], ONE, lambda progress: None)


def test_append_takes_text_in_both_forms(llm, branch):
    branch.append({"prompt": "ab"})
    branch.append("ab")
    assert branch.token_ids == IDS + 2 * llm.tokenizer.encode("ab", add_special_tokens=False)


def test_a_closed_llm_says_so_whatever_is_returned(tiny_llama):
    llm = LLM(tiny_llama(), kv_cache_bytes="1MiB")
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate([IDS], ONE, return_errors=True)


def test_an_llm_cannot_be_pickled_and_parameters_can_be_hashed(llm, branch):
    for one in (llm, branch):
        with pytest.raises(TypeError, match="make one in each process"):
            pickle.dumps(one)
    params = SamplingParams(logit_bias={5: 1.0}, stop=["a"], stop_token_ids=[5])
    assert hash(params) == hash(SamplingParams(logit_bias={5: 1.0}, stop=("a",), stop_token_ids=(5,)))
    assert len({params, SamplingParams(logit_bias={5: 2.0}), params}) == 2
    assert pickle.loads(pickle.dumps(params)) == params


# Requests, as a service makes them


def test_a_request_refuses_what_it_cannot_do(llm, branch, tiny_llama):
    engine = llm.engine
    for params, message in (
        (SamplingParams(n=2), "n=2"),
        (SamplingParams(prompt_logprobs=1), "prompt_logprobs 1"),
        (SamplingParams(logit_bias={300: 1.0}), "300"),
        (SamplingParams(stop_token_ids=[300]), "300"),
        ("hot", "'hot'"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.add_request(engine.new_sequence(IDS), params)
    sequence = engine.new_sequence(IDS)
    request = engine.add_request(sequence, ONE)
    with pytest.raises(BranchError, match=f"request {request.request_id}, which has not finished"):
        engine.add_request(sequence, ONE)
    engine.abort(request)
    engine.abort(engine.add_request(sequence, ONE))
    pruned = llm.branch(IDS)
    pruned.prune()
    with pytest.raises(BranchError, match="was released"):
        engine.add_request(pruned.sequence, ONE)
    for wrong in (None, 5, branch, Sequence(0, IDS)):
        with pytest.raises(BranchError, match=r"no sequence|by hand"):
            engine.add_request(wrong, ONE)
    with LLM(tiny_llama(), kv_cache_bytes="1MiB") as other, pytest.raises(BranchError, match="another engine"):
        other.engine.add_request(sequence, ONE)
    assert not engine.has_work


def test_a_request_takes_open_values_from_the_checkpoint(llm, branch, monkeypatch):
    engine = llm.engine
    monkeypatch.setattr(engine, "sampling_defaults", {"temperature": 0.0, "top_k": 3})
    request = engine.add_request(engine.new_sequence(IDS), SamplingParams(max_tokens=4, ignore_eos=True, top_k=5))
    assert (request.params.temperature, request.params.top_k, request.params.top_p) == (0.0, 5, 1.0)
    while engine.has_work:
        engine.step()
    assert request.output_token_ids == llm.generate([IDS], {**GREEDY, "max_tokens": 4})[0].outputs[0].token_ids


# Seeds

GREEDY = {"temperature": 0, "ignore_eos": True}
SAMPLED = {"temperature": 1.0, "max_tokens": 6, "ignore_eos": True, "detokenize": False}


def samples(llm, **options):
    return [tuple(o.token_ids) for r in llm.generate([IDS] * 4, {**SAMPLED, **options}) for o in r.outputs]


def all_calls(llm):
    """Samples of every entry, on one and the same prompt, in one and the same order."""
    found = samples(llm, n=8) + samples(llm) + samples(llm, n=8)
    roots = [*llm.branches([IDS] * 4), llm.branch(IDS)]
    branches = roots + [child for root in roots for child in root.fork(3)]
    llm.extend(branches, SAMPLED)
    found += [tuple(b.output_token_ids) for b in branches]
    engine = llm.engine
    requests = [engine.add_request(engine.new_sequence(IDS), SamplingParams(**SAMPLED)) for _ in range(4)]
    while engine.has_work:
        engine.step()
    found += [tuple(r.output_token_ids) for r in requests]
    for b in branches:
        b.prune()
    return found


def test_what_nobody_seeded_is_independent_and_an_llm_repeats_itself(tiny_llama):
    runs = {}
    for seed in (None, 0, 5, 6):
        for turn in range(2):
            options = {} if seed is None else {"seed": seed}
            with LLM(tiny_llama(), kv_cache_bytes="1MiB", **options) as llm:
                runs[seed, turn] = all_calls(llm)
    for seed in (None, 0, 5, 6):
        assert runs[seed, 0] == runs[seed, 1]
        assert len(set(runs[seed, 0])) == len(runs[seed, 0])  # 92 samples of 6 tokens among 300: chance is no excuse
    assert runs[None, 0] == runs[0, 0]
    assert not set(runs[0, 0]) & set(runs[5, 0]) and not set(runs[5, 0]) & set(runs[6, 0])


def test_a_seeded_sample_is_that_of_its_own_seed(llm):
    together = samples(llm, n=3, seed=2**64 - 2)
    assert together == together[:3] * 4
    assert together[:3] == [samples(llm, seed=seed)[0] for seed in (2**64 - 2, 2**64 - 1, 0)]


# Salts

SECRET = list(range(5, 26))  # five blocks of four, and a token


def num_cached(llm, prompt, **options):
    (result,) = llm.generate([prompt], ONE, **options)
    return result.num_cached_tokens


@pytest.fixture()
def fresh(llm):
    llm.reset_prefix_cache()
    return llm


@pytest.mark.parametrize("owner", [None, "a", b"b", "private 0"], ids=repr)
@pytest.mark.parametrize("entry", ["generate", "prompt", "chat", "stream", "branch", "branches", "fork", "logits"])
def test_nothing_crosses_salts(fresh, owner, entry):
    llm = fresh
    message = [{"role": "user", "content": "a secret that nobody else may find"}]
    prompt = llm.tokenizer.encode_chat(message) if entry == "chat" else SECRET
    given = {"prompt_token_ids": prompt, **({} if owner is None else {"cache_salt": owner})}
    branches = []
    if entry == "generate":
        llm.generate([prompt], ONE, salt=owner)
    elif entry == "prompt":
        llm.generate([given], ONE)
    elif entry == "chat":
        llm.chat(message, ONE, salt=owner)
    elif entry == "stream":
        list(llm.stream(prompt, ONE, salt=owner))
    elif entry == "logits":
        llm.logits(prompt, salt=owner)
    elif entry == "branch":
        branches = [llm.branch(given)]
    elif entry == "branches":
        branches = llm.branches([prompt], salt=owner)
    else:
        branches = llm.branch([5], salt=owner).fork(1)
        branches[0].append(prompt[1:])
        llm.extend(branches, ONE)
    for other in (None, "a", b"b", "private 0", "ab", b"a long", "c"):
        is_same = other == owner or (isinstance(owner, bytes) and other == owner.decode())
        found = num_cached(llm, prompt, salt=other)
        is_found = is_same and not (entry == "logits" and owner is None)
        assert found == (len(prompt[:-1]) // 4 * 4 if is_found else 0), other
        if not is_same:
            stranger = llm.branch(prompt, salt=other)
            assert stranger.num_cached_tokens > 0  # its own, from right before
            assert not set(llm.engine.blocks.block_table(stranger.seq_id)) & {
                block for b in branches for block in llm.engine.blocks.block_table(b.seq_id)
            }
            stranger.prune()
    for b in branches:
        if b.parent is not None:
            b.parent.prune()
        b.prune()
    assert llm.stats()["num_blocks_used"] == 0


def test_only_whole_blocks_are_counted(fresh):
    llm = fresh
    llm.generate([SECRET], ONE, salt="a")
    for known in range(1, len(SECRET)):
        guess = [*SECRET[:known], 200, 201]
        assert num_cached(llm, guess, salt="a") == known // 4 * 4
        branch = llm.branch(guess, salt="a")
        assert branch.num_cached_tokens % 4 == 0
        branch.prune()


def test_salts_have_one_spelling_and_one_place(llm):
    for wrong in ("", b"", 5, ["a"], object()):
        with pytest.raises(ConfigError, match="salt"):
            llm.generate([IDS], ONE, salt=wrong)
        with pytest.raises(ConfigError, match="salt"):
            llm.branch(IDS, salt=wrong)
    mine = {"prompt_token_ids": IDS, "cache_salt": "a"}
    assert llm.generate([mine], ONE, salt=b"a")[0].error is None
    with pytest.raises(ConfigError, match="cache_salt 'a' is not the salt"):
        llm.generate([mine], ONE, salt="b")
    results = llm.generate([mine, IDS], ONE, salt="b", return_errors=True)
    assert [r.error is None for r in results] == [False, True]
