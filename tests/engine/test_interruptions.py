"""Whatever leaves a call, at whatever line: nothing stays behind, and the next call is right."""

import gc
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
from integrity import check_integrity
from torch.overrides import _len_torch_function_stack

from minirksc import LLM, SamplingParams, Solver, SolverConfig
from minirksc.errors import BranchError, EngineBusyError, EngineClosedError, TokenizerError

PROMPT = list(range(5, 42))
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
OURS = ("/minirksc/", "/kernels/", "/models/", "/torch/overrides.py", "/contextlib.py")
LEFT = (MemoryError, KeyboardInterrupt, TokenizerError)
"""How an interrupted call ends; want of memory while the tokenizer decodes is an error of that request."""

LINES = 10
"""Of each kind of call, at which it is interrupted; tests/fuzz tries thousands."""


@pytest.fixture(scope="module", params=["native", "torch"])
def model(request, tiny_llama):
    """(LLM with a pool that a prompt and its branches fill, the greedy continuation of PROMPT)."""
    folder = tiny_llama(tokenizer=True)
    options = {"dtype": "float32", "threads": 1, "block_size": 4, "max_batch_tokens": 16, "backend": request.param}
    with LLM(folder, kv_cache_bytes="1MiB", **options) as ample:
        expected = ample.generate(PROMPT, GREEDY)[0].outputs[0].token_ids
        block_bytes = ample.stats()["kv_cache_bytes"] // ample.stats()["num_blocks_total"]
    with LLM(folder, kv_cache_bytes=24 * block_bytes, **options) as llm:
        yield llm, expected


@pytest.fixture(autouse=True)
def heeds_signals():
    """Ctrl-C is ignored in what was started in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stream_partly(llm):
    stream = llm.stream(PROMPT, GREEDY)
    next(stream)
    next(stream)
    stream.close()


def grow(llm):
    root = llm.branch(PROMPT)
    kids = root.fork(2)
    root.prune()
    kids[0].append([7, 8])
    llm.extend(kids, GREEDY)
    llm.score(kids, [9, 10], [[11], [12]])
    llm.score(kids, [9, 10], [[11, 12], [12]])
    for kid in kids:
        kid.prune()


def pin(llm):
    branch = llm.branch(PROMPT)
    branch.pin()
    branch.prune()
    branch.unpin()


def solve(llm):
    config = SolverConfig(branches=2, tokens_per_step=4, verify="never", select="score", hints=[[5], [6]])
    Solver(llm, config).solve(PROMPT)


CALLS = {
    "generate": lambda llm: llm.generate([PROMPT, PROMPT[:9]], SamplingParams(n=2, max_tokens=4, ignore_eos=True)),
    "stream": stream_partly,
    "branches": grow,
    "pin": pin,
    "logits": lambda llm: llm.logits(PROMPT),
    "solve": solve,
}


def at_line(call, number, leave):
    """Calls it, and `leave` at the line of that number among those of our own files; returns how many there were."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if not any(part in frame.f_code.co_filename for part in OURS):
            return None
        if event == "line":
            count += 1
            if count == number:
                sys.settrace(None)
                leave()
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def memory_error():
    raise MemoryError


def is_whole(llm, num_used=0):
    """No block, table, request or mode is left behind."""
    check_integrity(llm.engine.blocks)
    stats = llm.stats()
    assert not llm.engine.has_work
    assert stats["num_blocks_used"] == num_used
    assert stats["num_blocks_used"] + stats["num_blocks_cached"] + stats["num_blocks_free"] == stats["num_blocks_total"]
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled() and not _len_torch_function_stack()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("leave", [memory_error, lambda: signal.raise_signal(signal.SIGINT)], ids=["error", "signal"])
def test_a_call_that_is_left_at_any_line_leaves_nothing_behind(model, name, leave):
    llm, expected = model
    total = at_line(lambda: CALLS[name](llm), 0, leave)
    rng = random.Random(name)
    for number in sorted(rng.randint(1, total) for _ in range(LINES)):
        with suppress(*LEFT):
            at_line(lambda: CALLS[name](llm), number, leave)
        is_whole(llm)
    assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids == expected


def test_two_interruptions_in_a_row_are_no_worse_than_one(model):
    llm, expected = model
    rng = random.Random(3)

    def leave_twice(call):
        try:
            at_line(call, rng.randint(1, 3000), memory_error)
        except LEFT:
            at_line(lambda: is_whole(llm), rng.randint(1, 60), memory_error)

    for _ in range(LINES):
        with suppress(*LEFT):
            leave_twice(lambda: grow(llm))
        gc.collect()  # a handle in a cycle goes when that is collected
        is_whole(llm)
    assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids == expected


def test_branches_and_streams_outlive_an_interruption_of_another_call(model):
    llm, expected = model
    branch = llm.branch(PROMPT)
    llm.extend([branch], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    stream = llm.stream(PROMPT, GREEDY)
    token_ids = [*next(stream).token_ids]
    total = at_line(lambda: CALLS["generate"](llm), 0, memory_error)
    rng = random.Random(4)
    for number in sorted(rng.randint(1, total) for _ in range(10)):
        with suppress(*LEFT):  # with more of it cached it has fewer lines
            at_line(lambda: CALLS["generate"](llm), number, memory_error)
        check_integrity(llm.engine.blocks)
    llm.extend([branch], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert branch.output_token_ids == expected
    token_ids += [token_id for chunk in stream for token_id in chunk.token_ids]
    assert token_ids == expected
    branch.prune()
    is_whole(llm)


def test_an_interrupted_extend_leaves_the_tokens_so_far(model):
    llm, expected = model
    total = at_line(lambda: llm.extend([llm.branch(PROMPT)], GREEDY), 0, memory_error)
    rng = random.Random(5)
    for number in sorted(rng.randint(1, total) for _ in range(LINES)):
        branch = llm.branch(PROMPT)
        with pytest.raises(LEFT):
            at_line(lambda branch=branch: llm.extend([branch], GREEDY), min(number, total // 2), memory_error)
        check_integrity(llm.engine.blocks)
        done = branch.output_token_ids
        assert done == expected[: len(done)] and branch.token_ids == PROMPT + done
        assert len(branch.logprobs) == len(done) == len(branch.signals.top1)
        if len(done) < len(expected):
            rest = SamplingParams(temperature=0, max_tokens=len(expected) - len(done), ignore_eos=True)
            llm.extend([branch], rest)
        assert branch.output_token_ids == expected
        branch.prune()
        is_whole(llm)


def test_a_stop_that_is_taken_out_is_taken_out_whole_or_not_at_all(model):
    llm, expected = model
    stop = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop_token_ids=[expected[2]])
    begin = expected.index(expected[2])
    branch = llm.branch(PROMPT)
    total = at_line(lambda: llm.extend([branch], stop, keep_stop=False), 0, memory_error)
    assert branch.output_token_ids == expected[:begin] and branch.token_ids == PROMPT + expected[:begin]
    rng = random.Random(7)
    for _ in range(LINES):
        branch = llm.branch(PROMPT)
        with suppress(*LEFT):
            number = total - rng.randint(0, 200)
            at_line(lambda branch=branch: llm.extend([branch], stop, keep_stop=False), number, memory_error)
        check_integrity(llm.engine.blocks)
        assert branch.token_ids == PROMPT + branch.output_token_ids
        assert branch.output_token_ids == expected[: len(branch.output_token_ids)]
        llm.extend([branch], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        assert branch.output_token_ids[: begin + 3] == expected[: begin + 3]
        branch.prune()
    is_whole(llm)


def test_real_signals_at_random_moments(model):
    llm, expected = model
    rng = random.Random(6)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(20):
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 10 ** rng.uniform(-4, -1.5))
                grow(llm)
                signal.setitimer(signal.ITIMER_REAL, 0)
            gc.collect()
            is_whole(llm)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids == expected


class Stop(Exception):
    """Of a callback."""


@pytest.mark.parametrize("what", ["raise", "prune", "prune all", "generate", "append", "fork"])
def test_what_a_callback_may_do(model, what):
    llm, expected = model
    root = llm.branch(PROMPT)
    first, second = root.fork(2)
    kids = []

    def on_step(progress):
        if progress[0].num_tokens != 3:
            return {}
        if what == "raise":
            raise Stop
        if what == "append":
            with pytest.raises(BranchError, match="is being extended"):
                first.append([9])
        if what == "generate":
            assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids == expected
        if what == "fork":
            kids.extend(first.fork(1))
        if what.startswith("prune"):
            first.prune()
        if what == "prune all":
            second.prune()
        return {}

    if what == "raise":
        with pytest.raises(Stop):
            llm.extend([first, second], GREEDY, on_step)
        assert first.output_token_ids == expected[:3] and first.finish_reason == "abort"
        llm.extend([first], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    else:
        llm.extend([first, second], GREEDY, on_step)
    check_integrity(llm.engine.blocks)
    if what.startswith("prune"):
        assert first.output_token_ids == expected[:3] and first.finish_reason == "abort"
    else:
        assert first.output_token_ids == expected
    if what not in ("raise", "prune all"):
        assert second.output_token_ids == expected
    for kid in kids:
        assert kid.output_token_ids == expected[:3]
        llm.extend([kid], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        assert kid.output_token_ids == expected
    for branch in (root, first, second, *kids):
        branch.prune()
    is_whole(llm)


def test_a_step_is_not_entered_from_inside(model):
    llm, _ = model
    sequence = llm.engine.new_sequence(PROMPT)
    seen = []

    def on_logits(first, rows):
        seen.append(llm.stats()["num_blocks_used"])  # to look is fine
        llm.generate([[5]], GREEDY)

    llm.engine.add_request(sequence, GREEDY.resolved({}), logits_start=0, on_logits=on_logits)
    with pytest.raises(EngineBusyError, match="in the midst of a step"):
        llm.engine.step()
    assert seen
    for request in list(llm.engine.scheduler.requests.values()):
        llm.engine.abort(request)
    is_whole(llm)


def test_a_second_thread_is_refused_and_harms_nobody(model):
    llm, expected = model
    errors, inside, seen = [], threading.Event(), threading.Event()

    def second():
        inside.wait()
        for call in (lambda: llm.generate([[5]], GREEDY), lambda: llm.branch([5]), lambda: next(llm.stream([5]))):
            try:
                call()
            except EngineBusyError as error:
                errors.append(error)
        seen.set()

    thread = threading.Thread(target=second)
    thread.start()
    branch = llm.branch(PROMPT)

    def on_step(progress):
        inside.set()
        seen.wait()
        return {}

    llm.extend([branch], GREEDY, on_step)
    thread.join()
    assert len(errors) == 3 and branch.output_token_ids == expected
    branch.prune()
    is_whole(llm)


def test_a_thread_that_is_gone_keeps_nobody_out(model):
    llm, expected = model

    def call():
        llm.engine.call()  # never ended

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids == expected


def test_a_handle_that_is_dropped_gives_its_blocks_back(model):
    llm, _ = model
    branch = llm.branch(PROMPT)
    kid = branch.fork(1)[0]
    assert llm.stats()["num_blocks_used"] > 0
    del branch, kid
    gc.collect()
    is_whole(llm)


def test_a_stream_that_is_dropped_or_closed_early_ends(model):
    llm, _ = model
    stream = llm.stream(PROMPT, GREEDY)
    next(stream)
    assert llm.engine.has_work
    del stream
    gc.collect()
    is_whole(llm)


def test_after_close_branches_and_streams_are_refused_and_prune_is_fine(tiny_llama):
    with LLM(tiny_llama(), kv_cache_bytes="1MiB", threads=1) as llm:
        branches = llm.branch(PROMPT).fork(2)
        stream = llm.stream(PROMPT, GREEDY)
        next(stream)
    branches[0].prune()
    with pytest.raises(EngineClosedError):
        llm.extend(branches[1:], GREEDY)
    with pytest.raises(EngineClosedError):
        list(stream)


def test_a_fork_that_is_refused_changes_nothing(model):
    llm, _ = model
    root = llm.branch(PROMPT)
    for n in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            root.fork(n)
    assert [kid.path for kid in root.fork(2)] == [(0,), (1,)]
    root.prune()
    with pytest.raises(BranchError):
        root.fork(1)


@pytest.mark.parametrize("who", ["parent's", "child's"])
def test_a_child_of_fork_computes(tiny_llama, who):
    folder = tiny_llama()
    threads = torch.get_num_threads()
    with LLM(folder, kv_cache_bytes="1MiB", threads=2) as llm:
        expected = llm.generate([PROMPT * 5], GREEDY)[0].outputs[0].token_ids
        torch.ones(2_000_000).exp()  # OpenMP's threads are there
        pid = os.fork()
        if pid == 0:
            try:
                mine = llm if who == "parent's" else LLM(folder, kv_cache_bytes="1MiB", threads=2)
                os._exit(int(mine.generate([PROMPT * 5], GREEDY)[0].outputs[0].token_ids != expected))
            finally:
                os._exit(2)
        for _ in range(600):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.1)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert done and os.waitstatus_to_exitcode(status) == 0
        assert llm.generate([PROMPT * 5], GREEDY)[0].outputs[0].token_ids == expected
    assert torch.get_num_threads() == threads
