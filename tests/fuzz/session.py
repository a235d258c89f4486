"""One engine with a small pool, random calls on it, and what must be true after each."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draws
import torch
from children import Fault
from draws import MAX_LEN, VOCAB
from interrupting import INJECTED, Interrupter, check_engine, check_process
from oracle import Held, Oracle, Stream, summary

from minirksc import LLM, SamplingParams, Solver
from minirksc.engine.branch import Branch
from minirksc.errors import MinirkscError

ATOL = 2e-3
INTERRUPTIONS = ("none",) * 26 + ("line",) * 44 + ("signal",) * 8 + ("timer",) * 22
"""In percent; about one of four comes too late."""


class Callback(Exception):
    """Raised by callbacks of the fuzzer."""


class Session:
    """One engine and all that the fuzzer holds of it.

    Args:
        folder: of the checkpoint.
        rng: of everything.
        note: see `children.Work`.
    """

    def __init__(self, folder: Path, rng: random.Random, note: Callable[[str], None]) -> None:
        self.folder, self.rng, self._note = folder, rng, note
        self.num_threads = torch.get_num_threads()
        self.interrupter = Interrupter(rng)
        self.oracle = Oracle(folder, max_model_len=MAX_LEN + 64)
        self.counts: Counter[str] = Counter()
        self.base = [rng.randrange(5, VOCAB) for _ in range(60)]
        self.branches: list[Held] = []
        self.streams: list[Stream] = []
        self.requests: list[Any] = []
        self.has_orphan = False
        self.llm = self._open()

    def run(self, calls: int) -> None:
        """That many random calls; whatever is wrong raises."""
        names, weights = zip(*WEIGHTS.items(), strict=True)
        while self.counts["calls"] < calls:
            (name,) = self.rng.choices(names, weights)
            getattr(self, name)()
            self._check()
        self.drain(finally_=True)

    # What it is made of

    def _open(self) -> LLM:
        options = draws.engine_options(self.rng)
        oracle = self.oracle.llm
        size, self.block_size = oracle.engine.block_bytes, options["block_size"]
        options["kv_cache_bytes"] *= (size.full + size.window) * self.block_size // oracle.config.block_size
        self._note(f"{self.folder.name} {options}")
        while True:
            try:
                llm = LLM(self.folder, dtype="float32", threads=1, **options)
                break
            except MinirkscError:  # windows need a pool of some size
                options["kv_cache_bytes"] *= 2
        return llm

    def prompt(self) -> list[int]:
        """Many begin alike."""
        return draws.prompt(self.rng, self.base)

    def params(self, many: bool = True) -> SamplingParams:
        """Of one prompt, or of one branch."""
        return draws.params(self.rng, many)

    def some(self, most: int) -> list[Held]:
        """Live branches, those with room first."""
        live = [held for held in self.branches if not held.branch.pruned and len(held.tokens) < MAX_LEN - 20]
        return self.rng.sample(live, min(len(live), self.rng.randint(1, most)))

    def do(self, kind: str, function: Callable[[], Any], how: str | None = None) -> tuple[bool, Any, bool]:
        """(whether it went through, its result, whether it was interrupted) of a call."""
        how = self.rng.choice(INTERRUPTIONS) if how is None else how
        fired, result, error = self.interrupter.call(kind, function, how)
        what = "ok" if error is None else type(error).__name__
        self.counts["calls"] += 1
        self.counts["interrupted"] += fired
        self.counts[f"{kind}: {'interrupted' if fired else what}"] += 1
        message = "" if error is None else str(error)[:80]
        self._note(f"{self.counts['calls']} {kind}, {self.interrupter.how}: {what} {message}")
        if error is not None and not isinstance(error, MinirkscError | Callback) and INJECTED not in str(error):
            raise error
        return error is None, result, fired

    # Calls

    def generate(self) -> None:
        prompts = [self.prompt() for _ in range(self.rng.choice((1, 1, 2, 4)))]
        params = self.params() if self.rng.random() < 0.5 else [self.params() for _ in prompts]
        errors = self.rng.random() < 0.5
        went, outputs, _ = self.do("generate", lambda: self.llm.generate(prompts, params, return_errors=errors))
        for place, output in enumerate(outputs if went else ()):
            own = params[place] if isinstance(params, list) else params
            if output.error is None:
                self._check_output(prompts[place], own, output)
            elif not isinstance(output.error, MinirkscError):
                raise output.error

    def chat(self) -> None:
        params = self.params()
        messages = [{"role": "user", "content": self.rng.choice(("hi", "Why?", "ü"))}]
        went, outputs, _ = self.do("chat", lambda: self.llm.chat(messages, params))
        if went:
            self._check_output(outputs[0].prompt_token_ids, params, outputs[0])

    def _check_output(self, prompt: list[int], params: SamplingParams, output: Any) -> None:
        if len(output.outputs) != params.n:
            raise Fault(f"{len(output.outputs)} samples of {params.n}")
        for one in output.outputs:
            self._check_end(prompt, one.token_ids, params, one.finish_reason)
            self.oracle.check(
                prompt, one.token_ids, params, None if params.seed is None else params.seed + one.index, ()
            )

    def _check_end(self, prompt: list[int], tokens: list[int], params: SamplingParams, reason: str | None) -> None:
        if reason not in ("length", "stop"):
            raise Fault(f"an end by {reason!r}")
        most = MAX_LEN - len(prompt) if params.max_tokens is None else params.max_tokens
        ends_early = reason == "length" and params.max_tokens is not None and len(tokens) < most
        # What is pinned leaves less room than the pool has: what was decoded until it was full is the result.
        if len(tokens) > most or (ends_early and not self.llm.stats()["num_blocks_pinned"]):
            raise Fault(f"ended by {reason} after another number of tokens than max_tokens")

    def stream(self) -> None:
        params = self.params()
        self.streams.append(Stream(self.llm.stream(prompt := self.prompt(), params), prompt, params))
        self.pull()

    def pull(self) -> None:
        if not self.streams:
            return
        stream, count = self.rng.choice(self.streams), self.rng.choice((1, 2, 5, 200))

        def pull() -> Any:
            for _ in range(count):
                try:
                    chunk = next(stream.generator)
                except StopIteration as end:
                    return end.value
                stream.tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
                stream.text[chunk.index] = stream.text.get(chunk.index, "") + chunk.text
            return None

        went, result, fired = self.do("pull", pull)
        if not went or result is not None:
            self.streams.remove(stream)
        for index, tokens in stream.tokens.items():
            seed = None if stream.params.seed is None else stream.params.seed + index
            self.oracle.check(stream.prompt, tokens, stream.params, seed, ())
        if result is not None and not fired:
            self._check_output(stream.prompt, stream.params, result)
            for one in result.outputs:
                if (stream.tokens.get(one.index, []), stream.text.get(one.index, "")) != (one.token_ids, one.text):
                    raise Fault("the chunks of a stream are not its result")

    def close_stream(self) -> None:
        if self.streams:
            stream = self.streams.pop(self.rng.randrange(len(self.streams)))
            self.do("close_stream", stream.generator.close)
            stream.generator.close()  # as a with statement or the interpreter does, at last

    def branch(self) -> None:
        prompts, seed = [self.prompt() for _ in range(self.rng.choice((1, 1, 3)))], self.rng.randrange(9)
        share = self.rng.random() < 0.8
        went, made, _ = self.do("branches", lambda: self.llm.branches(prompts, share=share, seed=seed))
        if went:
            self.branches += [Held(branch, seed, list(prompt)) for branch, prompt in zip(made, prompts, strict=True)]

    def fork(self) -> None:
        for held in self.some(1):
            went, made, _ = self.do("fork", lambda held=held: held.branch.fork(self.rng.choice((1, 2, 3))))
            for child in made if went else ():
                self.branches.append(Held(child, held.seed, list(held.tokens), list(held.outputs)))
        paths = [(held.branch.path, held.seed, id(_root(held.branch))) for held in self.branches]
        if len(set(paths)) < len(paths):
            raise Fault("two branches of one root have one path")

    def append(self) -> None:
        for held in self.some(1):
            tokens = [self.rng.randrange(5, VOCAB) for _ in range(self.rng.choice((0, 1, 5, 12)))]
            self.do("append", lambda held=held, tokens=tokens: held.branch.append(tokens))
            if held.branch.token_ids not in (held.tokens, held.tokens + tokens):
                raise Fault("append left something else")
            held.tokens = held.branch.token_ids

    def extend(self, how: str | None = None) -> None:
        chosen = self.some(4)
        if not chosen:
            return
        params = [self.params(many=False) for _ in chosen]
        on_step, is_plain = self._on_step(chosen)
        branches = [held.branch for held in chosen]
        went, _, _ = self.do("extend", lambda: self.llm.extend(branches, params, on_step), how)
        for held, own in zip(chosen, params, strict=True):
            self._check_extended(held, own, went and is_plain)

    def _check_extended(self, held: Held, params: SamplingParams, went: bool) -> None:
        branch, before = held.branch, held.tokens
        tokens, outputs = branch.token_ids, branch.output_token_ids
        new = tokens[len(before) :]
        if tokens[: len(before)] != before:
            raise Fault("a branch lost tokens")
        if outputs != held.outputs + new or not len(outputs) == len(branch.logprobs) == len(branch.signals.top1):
            raise Fault("output_token_ids, logprobs or signals of a branch are not its tokens")
        self.oracle.check(before, new, params, held.seed if params.seed is None else params.seed, branch.path)
        if went and not branch.pruned:
            self._check_end(before, new, params, branch.finish_reason)
        _ = branch.text
        held.tokens, held.outputs = tokens, list(outputs)

    def _on_step(self, chosen: list[Held]) -> tuple[Any, bool]:
        """(a callback, whether the branches are left to end by themselves)."""
        rng, llm = self.rng, self.llm
        kind = rng.choice(("none", "none", "nothing", "stop", "prune", "raise", "generate", "fork", "reset"))
        steps = rng.choice((1, 1, 2, 5))
        state, others = [steps], self.some(2) + rng.sample(chosen, 1)

        def on_step(progress: Any) -> dict[int, str]:
            state[0] -= 1
            if state[0]:
                return {}
            if kind == "stop":
                return {rng.randrange(len(chosen)): "early"}
            if kind == "raise":
                raise Callback
            if kind == "prune":
                for held in others:
                    held.branch.prune()
            elif kind == "generate":
                llm.generate([self.base[:9]], SamplingParams(temperature=0, max_tokens=2))
            elif kind == "fork":
                for child in others[0].branch.fork(1):
                    child.prune()
            elif kind == "reset":
                llm.reset_prefix_cache()
            return {}

        return (None if kind == "none" else on_step), kind in ("none", "nothing", "generate", "fork", "reset")

    def score(self) -> None:
        chosen = self.some(3)
        question = [self.rng.randrange(5, VOCAB) for _ in range(self.rng.choice((0, 1, 5)))]
        choices = self.rng.choice(([[7], [9]], [[7], [9], [11]], [[7, 8], [9]], [[7, 8, 9], [7, 9, 9]]))
        branches = [held.branch for held in chosen]
        went, scores, _ = self.do("score", lambda: self.llm.score(branches, question, choices))
        for held, row in zip(chosen, scores if went else (), strict=went):
            if not torch.allclose(row, self.oracle.scores(held.tokens, question, choices), atol=ATOL):
                raise Fault("a wrong score")

    def logits(self) -> None:
        prompt = self.prompt()
        went, rows, _ = self.do("logits", lambda: self.llm.logits(prompt))
        if went and not torch.allclose(rows, self.oracle.rows(prompt), atol=ATOL):
            raise Fault("wrong logits")

    def prune(self) -> None:
        for held in self.some(2):
            went, _, _ = self.do("prune", held.branch.prune)
            if went or self.rng.random() < 0.5:
                held.branch.prune()  # again
        self.branches = [held for held in self.branches if not held.branch.pruned]

    def pin(self) -> None:
        for held in self.some(1):
            self.do("pin", self.rng.choice((held.branch.pin, held.branch.unpin, held.branch.unpin)))

    def housekeeping(self) -> None:
        self.do("housekeeping", self.rng.choice((self.llm.reset_prefix_cache, self.llm.stats, self.llm.evictions)))

    def request(self) -> None:
        prompt, params = self.prompt(), self.params(many=False)
        seed = params.seed or 0

        def add() -> Any:
            resolved = params.resolved(self.llm.sampling_defaults)
            return self.llm.engine.add_request(self.llm.engine.new_sequence(prompt), resolved, seed=seed)

        went, request, fired = self.do("add_request", add)
        if went:
            self.requests.append((request, prompt, params))
        self.has_orphan |= fired  # it may have been added all the same

    def step(self) -> None:
        def step() -> None:
            for _ in range(self.rng.choice((1, 1, 3))):
                self.llm.engine.step()

        self.do("step", step)
        for request, prompt, params in self.requests:
            if request.error is not None and not isinstance(request.error, MinirkscError):
                raise request.error
            self.oracle.check(prompt, request.output_token_ids, params, params.seed, ())
        self.requests = [entry for entry in self.requests if not entry[0].finished]

    def abort(self) -> None:
        for entry in self.rng.sample(self.requests, min(2, len(self.requests))):
            self.do("abort", lambda request=entry[0]: self.llm.engine.abort(request))
            self.llm.engine.abort(entry[0])
            self.requests.remove(entry)

    def solve(self) -> None:
        config = draws.solver_config(self.rng)
        problem, fails = self.rng.choice(("1+1?", "Why")), self.rng.random() < 0.1

        def on_event(event: Any) -> None:
            if fails:
                raise Callback

        went, result, _ = self.do("solve", lambda: Solver(self.llm, config).solve(problem, on_event=on_event))
        if (
            went
            and all(branch.error is None for branch in result.branches)
            and summary(result) != self.oracle.solved(problem, config)
        ):
            raise Fault("a solve of other tokens")

    def drain(self, finally_: bool = False) -> None:
        """All that is held goes, after a last look at the branches; then nothing may be used."""
        if finally_ or self.rng.random() < 0.5:
            self.extend(how="none")
        while self.streams:
            self.streams.pop().generator.close()
        for request, *_ in self.requests:
            self.llm.engine.abort(request)
        for held in self.branches:
            held.branch.prune()
        self.requests, self.branches = [], []
        self._check()
        self.llm.reset_prefix_cache()  # or pins would fill the pool
        self._check()

    def reopen(self) -> None:
        went, _, _ = self.do("close", self.llm.close)
        self.llm.close()
        for held in self.branches:
            held.branch.prune()
        for stream in self.streams:
            stream.generator.close()
        self.branches, self.streams, self.requests, self.has_orphan = [], [], [], False
        went, llm, _ = self.do("open", self._open)
        self.llm = llm if went else self._open()

    # Invariants

    def _check(self) -> None:
        check_process(self.num_threads)
        engine = self.llm.engine
        unfinished = [entry for entry in self.requests if not entry[0].finished]
        if self.has_orphan and not self.streams and not unfinished:
            for _ in range(1000):
                if not engine.has_work:
                    self.has_orphan = False
                    break
                engine.step()
        is_owned = bool(self.streams or unfinished or self.has_orphan)
        most = sum(-(-held.branch.num_tokens // self.block_size) for held in self.branches if not held.branch.pruned)
        check_engine(self.llm, is_owned, 10**9 if is_owned else most)


WEIGHTS = {
    "generate": 12, "chat": 3, "stream": 6, "pull": 8, "close_stream": 4, "branch": 12, "fork": 8, "append": 6,
    "extend": 20,
    "score": 6, "logits": 3, "prune": 6, "pin": 3, "housekeeping": 3, "request": 5, "step": 6, "abort": 3,
    "solve": 3, "drain": 3,
    "reopen": 0.5,
}  # fmt: skip


def _root(branch: Branch) -> Branch:
    while branch.parent is not None:
        branch = branch.parent
    return branch
