"""What a solve is given: every form of a prompt, salts and seeds; what is none of them is refused before any step."""

import numpy as np
import pytest
import torch
from integrity import check_integrity

from minirksc import LLM, SamplingParams, Solver, SolverConfig
from minirksc.errors import ConfigError, EngineClosedError, MinirkscError, PromptError
from minirksc.rksc.cgee import Gates, Lead
from minirksc.rksc.exits import MarginRule

PROBLEM = "how many eggs are in a dozen of dozens, and how many are left if one is eaten?"
SEEDED = SamplingParams(temperature=1.0, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(layers=2, tokenizer=True, max_len=256)


@pytest.fixture()
def llm(model):
    with LLM(model, block_size=8, kv_cache_bytes="2MiB") as llm:
        yield llm
        assert llm.stats()["num_blocks_used"] == 0
        check_integrity(llm.engine.blocks)


def solve(llm, problem=PROBLEM, phrasings=None, on_event=None, salt=None, **options):
    config = {"branches": 2, "tokens_per_step": 4, "verify": "never", "sampling": SEEDED} | options
    return Solver(llm, SolverConfig(**config)).solve(problem, phrasings, on_event, salt=salt)


def tokens(result):
    return [branch.token_ids for branch in result.branches]


WRONG_PROMPTS = [
    None, 5, 1.5, True, object(), b"abc", bytearray(b"abc"), {7, 8}, {}, {"text": "x"}, {"prompt": 5},
    {"prompt": ["x"]},
    {"prompt_token_ids": "abc"}, {"prompt_token_ids": b"abc"}, {"prompt": "x", "prompt_token_ids": [7]},
    [], "", " \n", [1.5], [True], [None], ["a"], [-1], [10**9], [10**5000], np.array([1.5]), np.array([[7, 8]]),
    np.array(7),
    torch.tensor([7.0]), [np.nan], list, {"prompt": PROBLEM, "cache_salt": ""}, {"prompt": PROBLEM, "cache_salt": 5},
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(WRONG_PROMPTS)))
@pytest.mark.parametrize("place", ["problem", "phrasing", "both"])
def test_what_is_no_prompt_is_refused_before_anything_is_computed(llm, index, place):
    wrong = WRONG_PROMPTS[index]
    problem = PROBLEM if place == "phrasing" else wrong
    phrasings = None if place == "problem" else [PROBLEM, wrong]
    for options in (dict(), dict(sharing="semantic", tau=0.5, uncalibrated=True), dict(sharing="none")):
        with pytest.raises((PromptError, ConfigError)) as caught:
            solve(llm, problem, phrasings, **options)
        assert len(str(caught.value)) < 600
    assert llm.stats()["num_steps"] == 0


IDS = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
RIGHT_PROMPTS = [
    tuple(IDS), np.array(IDS), np.array(IDS, dtype=np.uint8), torch.tensor(IDS), [np.int32(i) for i in IDS], range(7,
    17),
    {"prompt_token_ids": IDS}, {"prompt_token_ids": np.array(IDS)}, {"prompt_token_ids": IDS, "cache_salt": "mine"},
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(RIGHT_PROMPTS)))
def test_every_form_of_a_prompt_is_taken_whole(llm, index):
    expected = tokens(solve(llm, IDS))
    result = solve(llm, RIGHT_PROMPTS[index])
    assert tokens(result) == expected and result.trace["problem"] == IDS
    assert all(type(token) is int for token in result.trace["problem"])
    assert tokens(solve(llm, "x", iter([RIGHT_PROMPTS[index], iter(IDS)]))) == expected
    assert tokens(solve(llm, {"prompt": PROBLEM})) == tokens(solve(llm, PROBLEM))


@pytest.mark.parametrize("phrasings", ["ab", {"a": 1, "b": 2}, {"a", "b"}, 5, b"ab", [], ["a"], ["a"] * 3, iter(["a"])])
def test_wrong_phrasings_are_refused_by_name(llm, phrasings):
    with pytest.raises(ConfigError, match="phrasings"):
        solve(llm, PROBLEM, phrasings)
    assert llm.stats()["num_steps"] == 0


@pytest.mark.parametrize(
    "hints",
    [
        "ab",
        b"ab",
        5,
        {"a": 1, "b": 2},
        ["a"],
        ["a", None],
        ["a", b"b"],
        ["a", 5],
        ["a", [1.5]],
        ["a", [True]],
        ["a", {}],
    ],
)
def test_wrong_hints_are_refused_by_name(hints):
    with pytest.raises(ConfigError, match="hints="):
        SolverConfig(branches=2, hints=hints)


def test_hints_are_taken_in_every_form_and_outside_the_vocabulary_refused(llm):
    expected = tokens(solve(llm, hints=[[7, 8], "ab"]))
    assert tokens(solve(llm, hints=iter([np.array([7, 8]), "ab"]))) == expected
    assert tokens(solve(llm, hints=(torch.tensor([7, 8]), "ab"))) == expected
    num_steps = llm.stats()["num_steps"]
    with pytest.raises(PromptError, match="outside the vocabulary"):
        solve(llm, hints=["a", [10**7]])
    assert llm.stats()["num_steps"] == num_steps


@pytest.mark.parametrize(
    "options",
    [
        dict(chat="false"), dict(chat=None), dict(uncalibrated="no", sharing="semantic"), dict(sharing=None),
        dict(verify=np.array(["auto", "never"])), dict(select=["vote"]), dict(verify=True), dict(answer_parser=None),
        dict(answer_parser=7), dict(gates=5), dict(gates=b"g.json"), dict(gates={"skip": []}), dict(sampling="greedy"),
        dict(sampling=5), dict(sampling={"temperatur": 1}), dict(sampling=SamplingParams(logprobs=2)),
        dict(sampling=SamplingParams(n=2)), dict(sharing="semantic", tau=True), dict(sharing="semantic", tau="0.5"),
        dict(sharing="semantic", tau=10**400), dict(branches="4"), dict(branches=None), dict(depth=1.0),
        dict(tokens_per_step=10**5000, branches=0), dict(beam=np.float32(1)),
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_an_option_of_a_wrong_kind_is_refused_by_name(options):
    with pytest.raises(ConfigError, match="|".join([*options, "unknown option"])) as caught:
        SolverConfig(**options)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "options",
    [
        dict(signal="top"), dict(signal=None), dict(skip=Lead()), dict(skip=("x",)), dict(skip=5),
        dict(decode_exit=(0.3,)),
        dict(skip=(Lead(gap=float("nan")),)), dict(decode_exit=(Lead(top=float("nan")),)),
        dict(skip=(Lead(gap="0.2"),)),
        dict(decode_min_tokens=-1), dict(decode_min_tokens=1.5), dict(exact="yes"), dict(compares_answers=None),
        dict(layer_exit=3.0), dict(layer_exit=MarginRule(float("nan"))), dict(layer_exit=MarginRule(1.0, patience=0)),
        dict(layer_exit=MarginRule(1.0, correction=((1.0, float("nan")),))),
        dict(layer_exit=MarginRule(1.0, start="2")),
        dict(source=5),
    ],
    ids=str,
)  # fmt: skip
def test_gates_that_are_none_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Gates(**options)


def test_gates_of_a_model_with_fewer_layers_are_refused(llm):
    gates = Gates(layer_exit=MarginRule(1.0, correction=()))
    with pytest.raises(ConfigError, match="corrects 0 layers of 2"):
        solve(llm, verify="auto", gates=gates)


def test_a_session_does_for_an_llm(llm):
    config = SolverConfig(branches=2, tokens_per_step=4, verify="never", sampling=SEEDED)
    assert tokens(Solver(llm.session(), config).solve(PROBLEM)) == tokens(solve(llm))


def test_params_may_be_a_dict(llm):
    values = {"temperature": 1.0, "seed": 5, "ignore_eos": True}
    assert tokens(solve(llm, sampling=values)) == tokens(solve(llm))


def test_what_is_no_llm_no_config_or_no_callback_is_refused(llm):
    with pytest.raises(ConfigError, match="works on an LLM"):
        Solver("smollm2-135m")
    with pytest.raises(ConfigError, match="works on an LLM"):
        Solver(llm.tokenizer)  # nor is everything that has a tokenizer, or is one
    with pytest.raises(ConfigError, match="SolverConfig"):
        Solver(llm, {"branches": 4})
    with pytest.raises(ConfigError, match="on_event"):
        solve(llm, on_event=5)


@pytest.mark.parametrize("options", [dict(), dict(verify="always"), dict(verify="always", verify_style="standalone")])
def test_what_could_not_be_computed_to_its_end_is_refused_at_the_beginning(llm, options):
    prompt = [7] * 150
    with pytest.raises(PromptError, match=r"3 x tokens_per_step 40.*lower tokens_per_step"):
        solve(llm, prompt, depth=3, tokens_per_step=40, **options)
    assert llm.stats()["num_steps"] == 0
    if options:  # the question needs room too
        with pytest.raises(PromptError, match="to ask about it"):
            solve(llm, prompt, depth=1, tokens_per_step=256 - 150 - 13, hints=[[], []], **options)
    assert llm.stats()["num_steps"] == 0
    solve(llm, prompt[:100], depth=1, tokens_per_step=10, **options)


@pytest.mark.parametrize("sharing", ["none", "exact"])
def test_penalties_count_all_rounds_however_it_is_shared(llm, sharing):
    options = dict(branches=3, depth=3, tokens_per_step=5, beam=2)
    sampling = SamplingParams(temperature=1.0, seed=5, ignore_eos=True, presence_penalty=2.0, frequency_penalty=2.0)
    expected = solve(llm, sampling=sampling, **options)
    result = solve(llm, sampling=sampling, sharing=sharing, **options)
    assert tokens(result) == tokens(expected) and [b.text for b in result.branches] == [
        b.text for b in expected.branches
    ]


# Seeds


def free(llm, **options):
    return solve(llm, branches=4, sampling=SamplingParams(temperature=1.0, ignore_eos=True), **options)


def test_solves_that_nobody_seeded_are_independent_and_an_llm_repeats_itself_as_a_whole(model):
    params = SamplingParams(temperature=1.0, max_tokens=4, ignore_eos=True)
    runs = []
    for _ in range(2):
        with LLM(model, block_size=8, kv_cache_bytes="2MiB", seed=3) as llm:
            found = [
                tokens(free(llm)),
                tokens(free(llm)),
                tokens(free(llm, verify="always", verify_style="standalone")),
            ]
            found += [[out.outputs[0].token_ids] for out in llm.generate([PROBLEM] * 4, params)]
            runs.append([*found, tokens(free(llm))])
    assert runs[0] == runs[1]
    samples = [tuple(ids) for found in runs[0] for ids in found]
    assert len(set(samples)) == len(samples)


def test_all_wordings_of_a_solve_have_one_seed(llm):
    wordings = ["one two three", "one two three four"]
    together = free(llm, phrasings=[wordings[0], wordings[1], wordings[0], wordings[1]])
    seed = together.trace["seed"]
    sampling = SamplingParams(temperature=1.0, ignore_eos=True, seed=seed)
    again = solve(llm, branches=4, sampling=sampling, phrasings=[wordings[0], wordings[1], wordings[0], wordings[1]])
    assert tokens(again) == tokens(together) and len({tuple(ids) for ids in tokens(again)}) == 4


# Salts


@pytest.mark.parametrize("options", [
    dict(), dict(sharing="semantic", tau=-9.0, uncalibrated=True), dict(verify="always"),
    dict(verify="always", verify_style="standalone"), dict(depth=2, verify="always"),
])  # fmt: skip
def test_nothing_crosses_salts(llm, options):
    phrasings = [PROBLEM, f"please: {PROBLEM}"]
    first = solve(llm, PROBLEM, phrasings, salt="a", **options)
    fresh = first.stats["num_cached_tokens"]
    for salt in ("b", b"c", None):
        other = solve(llm, PROBLEM, phrasings, salt=salt, **options)
        assert other.stats["num_cached_tokens"] == fresh
        assert tokens(other) == tokens(first)
        assert other.stats["num_prefilled_tokens"] == first.stats["num_prefilled_tokens"]
    again = solve(llm, PROBLEM, phrasings, salt=b"a", **options)
    # The first wording of a probe is computed whole, whatever is cached.
    assert again.stats["num_cached_tokens"] > fresh or "tau" in options
    assert tokens(again) == tokens(first)


def test_a_prompt_may_bring_the_salt_and_all_must_agree(llm):
    salted = {"prompt": PROBLEM, "cache_salt": "a"}
    first = solve(llm, salted)
    assert solve(llm, PROBLEM).stats["num_cached_tokens"] == first.stats["num_cached_tokens"]
    assert solve(llm, PROBLEM, salt="a").stats["num_cached_tokens"] > first.stats["num_cached_tokens"]
    assert solve(llm, salted, salt=b"a").stats["num_cached_tokens"] > first.stats["num_cached_tokens"]
    num_steps = llm.stats()["num_steps"]
    for problem, phrasings, salt in ((salted, None, "b"), (salted, [PROBLEM, {**salted, "cache_salt": "b"}], None)):
        with pytest.raises(ConfigError, match="one solve has one salt"):
            solve(llm, problem, phrasings, salt=salt)
    for salt in ("", b"", 5, ["a"]):
        with pytest.raises(ConfigError, match="salt"):
            solve(llm, PROBLEM, salt=salt)
    assert llm.stats()["num_steps"] == num_steps


# Callbacks


EVENTS = ["prefill", "extend", "verify", "fork", "select"]
OPTIONS = dict(branches=3, depth=2, verify="always")


@pytest.mark.parametrize("sharing", ["none", "exact"])
@pytest.mark.parametrize("verify_style", ["append", "standalone"])
@pytest.mark.parametrize("event", EVENTS)
def test_a_callback_that_raises_leaves_nothing_behind(llm, event, verify_style, sharing):
    if sharing == "none" and event == "fork":
        pytest.skip("its rounds begin with prefills")

    def on_event(one):
        if one["event"] == event:
            raise MemoryError(event)

    with pytest.raises(MemoryError) as caught:
        solve(llm, on_event=on_event, verify_style=verify_style, sharing=sharing, **OPTIONS)
    assert llm.stats()["num_blocks_used"] == 0, caught  # while the error and its frames live
    assert solve(llm, verify_style=verify_style, sharing=sharing, **OPTIONS).answer is not None


def test_a_callback_may_use_the_llm_and_changes_nothing(llm):
    expected = solve(llm, **OPTIONS)
    seen = []

    def on_event(one):
        seen.append(one["event"])
        llm.generate(PROBLEM, SamplingParams(max_tokens=3))
        branch = llm.branch(PROBLEM)
        for one in (*branch.fork(2), branch):
            one.prune()
        llm.reset_prefix_cache()
        solve(llm, verify="always")

    result = solve(llm, on_event=on_event, **OPTIONS)
    assert set(seen) == set(EVENTS) and tokens(result) == tokens(expected)
    assert [b.score for b in result.branches] == pytest.approx([b.score for b in expected.branches], abs=1e-5)


def test_a_callback_that_closes_the_llm_ends_the_solve_by_name(model):
    with LLM(model, block_size=8, kv_cache_bytes="2MiB") as llm, pytest.raises(EngineClosedError):
        solve(llm, on_event=lambda event: llm.close(), **OPTIONS)


@pytest.mark.parametrize("answer", [7, ["7"], b"7"])
def test_a_parser_that_gives_no_text_ends_the_solve_by_name(llm, answer):
    with pytest.raises(MinirkscError, match="answer_parser gave"):
        solve(llm, answer_parser=lambda text: answer)
