"""Streams: each gives its own text exactly once, whoever steps the engine meanwhile."""

import pytest

from minirksc import LLM, SamplingParams, Solver, SolverConfig
from minirksc.errors import NumericalError

SOLVER = SolverConfig(branches=2, tokens_per_step=3, verify="never")
PROMPTS = ["a stream", "another stream of text", "and a third"]
OTHERS = {
    "nothing": lambda llm, branch: None,
    "generate": lambda llm, branch: llm.generate("in between", SamplingParams(temperature=0, max_tokens=5)),
    "score": lambda llm, branch: llm.score([branch], "?", ["y", "n"]),
    "extend": lambda llm, branch: llm.extend([branch], SamplingParams(temperature=0, max_tokens=3)),
    "branch": lambda llm, branch: llm.branch("one more prompt").prune(),
    "solve": lambda llm, branch: Solver(llm, SOLVER).solve("a problem"),
    "to the end": lambda llm, branch: llm.generate("in between", SamplingParams(max_tokens=60, ignore_eos=True)),
}


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama(tokenizer=True), block_size=8, kv_cache_bytes="1MiB") as llm:
        yield llm


def params(**options):
    return SamplingParams(**{"temperature": 1.0, "seed": 3, "max_tokens": 20, "ignore_eos": True, **options})


def finish(chunks, result, expected):
    """Checks what came of a stream against what `generate` gives."""
    for sample in expected.outputs:
        own = [chunk for chunk in chunks if chunk.index == sample.index]
        assert "".join(chunk.text for chunk in own) == sample.text
        assert [token for chunk in own for token in chunk.token_ids] == sample.token_ids
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + [sample.finish_reason]
    assert [(o.text, o.token_ids) for o in result.outputs] == [(o.text, o.token_ids) for o in expected.outputs]


def drain(stream, between=lambda: None):
    chunks = []
    while True:
        try:
            chunks.append(next(stream))
        except StopIteration as end:
            return chunks, end.value
        between()


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("options", [{}, {"n": 3}, {"detokenize": False}, {"stop": "T"}], ids=str)
def test_a_stream_around_other_calls_gives_what_generate_gives(llm, options, other):
    (expected,) = llm.generate(PROMPTS[0], params(**options))
    branch = llm.branch("a branch")
    stream = llm.stream(PROMPTS[0], params(**options))
    finish(*drain(stream, lambda: OTHERS[other](llm, branch)), expected)
    branch.prune()
    assert llm.stats()["num_blocks_used"] == 0 and not llm.engine.has_work


def test_streams_read_in_turn_do_not_take_each_others_text(llm):
    lengths = [4, 20, 11]
    expected = [llm.generate(p, params(max_tokens=n))[0] for p, n in zip(PROMPTS, lengths, strict=True)]
    streams = [llm.stream(p, params(max_tokens=n)) for p, n in zip(PROMPTS, lengths, strict=True)]
    chunks, results = [[] for _ in streams], [None] * len(streams)
    while None in results:
        for i, stream in enumerate(streams):
            if results[i] is None:
                try:
                    chunks[i].append(next(stream))
                except StopIteration as end:
                    results[i] = end.value
    for own, result, one in zip(chunks, results, expected, strict=True):
        finish(own, result, one)


def test_an_end_without_text_or_token_has_its_chunk(llm):
    stream = llm.stream(PROMPTS[0], params())
    first = next(stream)
    (request,) = llm.engine.scheduler.running
    llm.engine.abort(request, "timeout")
    rest = list(stream)
    assert first.finish_reason is None and rest[-1].finish_reason == "timeout"
    assert [c.finish_reason for c in rest].count("timeout") == 1


def test_what_came_before_an_error_is_given_out(llm, monkeypatch):
    (expected,) = llm.generate(PROMPTS[0], params(max_tokens=4))
    sample, count = llm.engine._sample, []

    def failing(logits, wanted):
        drawn = sample(logits, wanted)
        count.append(1)
        return drawn if len(count) < 5 else [(r, one._replace(failure="the logits hold NaN")) for r, one in drawn]

    monkeypatch.setattr(llm.engine, "_sample", failing)
    stream = llm.stream(PROMPTS[0], params())
    chunks = [next(stream)]
    while llm.engine.has_work:  # somebody else's steps bring the tokens and the error
        llm.engine.step()
    with pytest.raises(NumericalError):
        for chunk in stream:
            chunks.append(chunk)
    assert [t for c in chunks for t in c.token_ids] == expected.outputs[0].token_ids
    assert llm.stats()["num_blocks_used"] == 0
