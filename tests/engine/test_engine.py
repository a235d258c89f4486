"""The engine as an embedding service drives it: add, abort and step, and everything that can go wrong."""

import random
import shutil
import subprocess
import sys

import pytest
import torch
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.engine.sampling import Delivery, Sampled
from minirksc.errors import CacheFullError, CheckpointError, ConfigError, NumericalError, PromptError, TokenizerError

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
PROMPTS = [[(i * j) % 80 + 5 for j in range(1, 20 + 3 * i)] for i in range(1, 6)]


@pytest.fixture()
def llm(tiny_llama):
    with LLM(tiny_llama(), block_size=8, kv_cache_bytes="1MiB") as llm:
        yield llm


def token_lists(outputs):
    return [out.outputs[0].token_ids for out in outputs]


def test_two_engines_interleaved_give_what_they_give_alone(tiny_llama):
    first = LLM(tiny_llama(), block_size=8, kv_cache_bytes="1MiB")
    second = LLM(tiny_llama(layers=3, heads=5, kv_heads=1, seed=7), block_size=16, kv_cache_bytes="1MiB")
    alone = [token_lists(llm.generate(PROMPTS, PARAMS)) for llm in (first, second)]
    requests = []
    for llm in (first, second):
        llm.reset_prefix_cache()
        engine, resolved = llm.engine, PARAMS.resolved({})
        requests.append([engine.add_request(engine.new_sequence(p), resolved) for p in PROMPTS])
    while first.engine.has_work or second.engine.has_work:
        first.engine.step()
        second.engine.step()
    assert [[r.output_token_ids for r in group] for group in requests] == alone


def test_requests_that_join_late_change_nothing(llm):
    expected = token_lists(llm.generate(PROMPTS, PARAMS))
    llm.reset_prefix_cache()
    engine, requests = llm.engine, []
    for prompt in PROMPTS:
        requests.append(engine.add_request(engine.new_sequence(prompt), PARAMS.resolved({})))
        engine.step()
        engine.step()
    while engine.has_work:
        engine.step()
    assert [r.output_token_ids for r in requests] == expected


@pytest.mark.parametrize("num_before", [1, 6])
def test_several_tokens_of_a_request_may_come_at_once(llm, num_before):
    expected = token_lists(llm.generate(PROMPTS[:1], PARAMS))[0]
    llm.reset_prefix_cache()
    engine = llm.engine
    request = engine.add_request(engine.new_sequence(PROMPTS[0]), PARAMS.resolved({}))
    while len(request.output_token_ids) < num_before:
        engine.step()
    accepted = [*expected, 70, 71, 72][num_before : num_before + 5]  # more than it may have, at the end
    with engine._changes:
        engine._update(Delivery(request, [Sampled(token_id, -1.0, None, 0.5, 1.0) for token_id in accepted]))
    while engine.has_work:
        engine.step()
    assert (request.output_token_ids, request.finish_reason) == (expected, "length")
    assert len(request.logprobs) == len(request.signals.top1) == len(expected)
    assert engine.stats()["num_blocks_used"] == 0


def test_abort_at_any_moment_gives_every_block_back(llm):
    engine = llm.engine
    rng = random.Random(0)
    for _ in range(40):
        live = [engine.add_request(engine.new_sequence(p), PARAMS.resolved({})) for p in rng.sample(PROMPTS, 3)]
        for _ in range(rng.randrange(12)):
            engine.step()
            if live and rng.random() < 0.4:
                victim = live.pop(rng.randrange(len(live)))
                done = victim.finished
                engine.abort(victim)
                assert victim.finish_reason == ("length" if done else "abort")
                check_integrity(engine.blocks)
        for request in live:
            engine.abort(request)
        assert not engine.has_work
        assert engine.blocks.num_used == 0
        check_integrity(engine.blocks)


def test_an_interrupted_generate_leaves_nothing_behind(llm, monkeypatch):
    engine, steps = llm.engine, []
    step = engine.step

    def interrupted():
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, PARAMS)
    assert not engine.has_work and engine.blocks.num_used == 0
    monkeypatch.undo()
    stream = llm.stream(PROMPTS[0], PARAMS)
    next(stream)
    stream.close()
    assert not engine.has_work and engine.blocks.num_used == 0
    assert len(llm.generate(PROMPTS, PARAMS)) == len(PROMPTS)


def test_nan_logits_fail_their_request_alone(llm):
    expected = token_lists(llm.generate(PROMPTS, PARAMS))
    llm.reset_prefix_cache()
    model = llm.engine.runner.model
    embed = model.embed
    poisoned = [99, *PROMPTS[2]]

    def with_nan(token_ids):
        return embed(token_ids).masked_fill((token_ids == 99).unsqueeze(-1), float("nan"))

    model.embed = with_nan
    results = llm.generate([*PROMPTS, poisoned], PARAMS, return_errors=True)
    assert token_lists(results[:-1]) == expected
    assert isinstance(results[-1].error, NumericalError)
    assert "nan" in str(results[-1].error).lower()
    with pytest.raises(NumericalError):
        llm.generate([poisoned], PARAMS)
    # Its KV is not finite and must not be found by the next request.
    assert llm.engine.blocks.match(poisoned) == 0
    assert llm.engine.blocks.num_used == 0


def test_stream_gives_the_tokens_of_generate_piece_by_piece(llm):
    params = SamplingParams(temperature=1.0, n=2, seed=4, max_tokens=6, ignore_eos=True, detokenize=False)
    (whole,) = llm.generate([PROMPTS[0]], params)
    pieces = {0: [], 1: []}
    stream = llm.stream(PROMPTS[0], params)
    while True:
        try:
            chunk = next(stream)
        except StopIteration as stop:
            result = stop.value
            break
        pieces[chunk.index] += chunk.token_ids
    assert [pieces[i] for i in (0, 1)] == [o.token_ids for o in whole.outputs]
    assert [o.token_ids for o in result.outputs] == [o.token_ids for o in whole.outputs]


def test_prompt_logprobs_and_logprobs_agree_with_the_logits(llm):
    params = SamplingParams(
        temperature=0, max_tokens=3, ignore_eos=True, detokenize=False, logprobs=2, prompt_logprobs=3
    )
    prompt = PROMPTS[1]
    for _ in range(2):  # the second time the prompt is cached
        (out,) = llm.generate([prompt], params)
        logprobs = llm.logits([*prompt, *out.outputs[0].token_ids]).log_softmax(-1)
        assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == len(prompt)
        for position in range(1, len(prompt)):
            entry = out.prompt_logprobs[position]
            assert len(entry) in (3, 4)
            for token, value in entry.items():
                assert value == pytest.approx(float(logprobs[position - 1, token]), abs=1e-3)
        for i, token in enumerate(out.outputs[0].token_ids):
            assert out.outputs[0].logprobs[i][token] == pytest.approx(
                float(logprobs[len(prompt) - 1 + i, token]), abs=1e-3
            )


def test_what_the_pool_can_never_hold_is_refused_and_the_rest_goes_on(tiny_llama):
    with LLM(tiny_llama(), block_size=8, kv_cache_bytes="1MiB") as llm:
        block_bytes = llm.stats()["kv_cache_bytes"] // llm.stats()["num_blocks_total"]
    with LLM(tiny_llama(), block_size=8, kv_cache_bytes=4 * block_bytes) as llm:
        with pytest.raises(CacheFullError, match=rf"{5 * block_bytes} bytes.*{4 * block_bytes} bytes.*kv-cache"):
            llm.generate([[5] * 32], PARAMS)
        results = llm.generate([[5] * 32, [6] * 10], PARAMS, return_errors=True)
        assert isinstance(results[0].error, CacheFullError)
        assert len(results[1].outputs[0].token_ids) == 8
        # A prompt that fits and a generation that does not: the request fails, by name.
        long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
        with pytest.raises(CacheFullError):
            llm.generate([[5] * 20], long)
        assert llm.engine.blocks.num_used == 0
    with pytest.raises(CacheFullError, match="less than one block"):
        LLM(tiny_llama(), block_size=8, kv_cache_bytes=block_bytes - 1)
    with pytest.raises(CacheFullError, match=r"no room for a KV cache of .* bytes, and .* are free; lower kv_cache"):
        LLM(tiny_llama(), block_size=8, kv_cache_bytes="4096TiB")


def test_bad_prompts_and_options(llm, tiny_llama):
    for prompt, message in (
        ([], "empty"),
        ([-1], "outside the vocabulary"),
        ([10**9], "outside"),
        ([5, 1.5], "token id 1.5"),
        ([None], "token id None"),
        ([5] * 10**5, "max_model_len"),
    ):
        with pytest.raises(PromptError, match=message):
            llm.generate([prompt], PARAMS)
    with pytest.raises(PromptError, match="max_tokens"):
        llm.generate([[5] * 20], SamplingParams(max_tokens=llm.config.max_model_len))
    with pytest.raises(TokenizerError, match="token ids"):
        llm.generate(["text"], PARAMS)
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        LLM(tiny_llama(), kv_cache_byte=5)
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(tiny_llama(), max_model_len=10**7)
    with pytest.raises(ConfigError):
        llm.generate([{"tokens": [1]}], PARAMS)


def test_generation_ends_at_the_models_length(tiny_llama):
    with LLM(tiny_llama(), kv_cache_bytes="1MiB", max_model_len=30) as llm:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, detokenize=False)
        (out,) = llm.generate([[5] * 20], params)
        assert len(out.outputs[0].token_ids) == 10
        assert out.outputs[0].finish_reason == "length"


def test_eos_and_stop_ids_end_a_generation(llm):
    free = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    tokens = token_lists(llm.generate([PROMPTS[0]], free))[0]
    stop = SamplingParams(temperature=0, max_tokens=8, detokenize=False, stop_token_ids=(tokens[2],))
    (out,) = llm.generate([PROMPTS[0]], stop)
    first = tokens.index(tokens[2])
    assert out.outputs[0].token_ids == tokens[: first + 1]
    assert out.outputs[0].finish_reason == "stop" and out.outputs[0].stop_reason == tokens[2]


def test_the_same_seed_gives_the_same_run(tiny_llama):
    runs = []
    for _ in range(2):
        with LLM(tiny_llama(), kv_cache_bytes="1MiB", seed=5) as llm:
            params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, detokenize=False)
            runs.append(token_lists(llm.generate(PROMPTS, params)))
    assert runs[0] == runs[1]


def test_threads_are_left_as_found(tiny_llama):
    before = torch.get_num_threads()
    with LLM(tiny_llama(), kv_cache_bytes="1MiB", threads=1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_import_is_light():
    code = "import minirksc, sys; assert not {'torch', 'triton', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_damaged_tokenizer_is_an_error_and_a_missing_one_is_not(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama(tokenizer=True), tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        LLM(tmp_path / "damaged", kv_cache_bytes="1MiB")
    with LLM(tiny_llama(), kv_cache_bytes="1MiB") as llm:
        assert llm.tokenizer is None


def test_an_aborted_request_shows_the_text_that_was_held_back(tiny_llama):
    with LLM(tiny_llama(tokenizer=True), kv_cache_bytes="1MiB") as llm:
        free = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        whole = llm.generate([PROMPTS[0]], free)[0].outputs[0].text
        stop = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, stop=[whole + "never"])
        request = llm.engine.add_request(llm.engine.new_sequence(PROMPTS[0]), stop.resolved({}))
        for _ in range(6):
            llm.engine.step()
        assert request.text == ""
        llm.engine.abort(request)
        assert request.text == whole


def test_deeply_nested_json_is_an_error_and_not_a_crash(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama(), tmp_path / "nested")
    (tmp_path / "nested" / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="generation_config"):
        LLM(tmp_path / "nested", kv_cache_bytes="1MiB")
