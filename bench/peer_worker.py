"""A worker's end of bench.peers: one request a line on stdin, one reply a line on stdout, both JSON.

Workers of other engines run in environments of their own, so this file needs the standard library alone. The first
request is {"do": "load", ...}; then come "solve", "decode" and "prefill". A reply is {"result": ...} or {"error": ...}
with the error in one line; the traceback goes to stderr, and so does whatever a library prints: the reply's stream is a
copy of stdout that no library knows. The end of stdin ends the worker.
"""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

Measured = dict[str, Any]
"""What one run gives: seconds by name, `token_ids`, counters."""


class Peer(Protocol):
    """An engine that is ready to work.

    Attributes:
        facts: `dtype` that it computes in, `versions` by package, `settings` by name.
    """

    facts: dict[str, Any]

    def solve(self, work: dict[str, Any], setting: str) -> Measured:
        """Branches and their verification, from a cold cache.

        Args:
            work: token ids, and how many to decode: see `bench.peer_plan.make_work`.
            setting: sharing and style of the verification, such as "exact append".
        """
        ...

    def generate(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """Greedy token ids of each prompt, from a cold cache, end tokens ignored."""
        ...


class BranchingEngine(Protocol):
    """What `solve_in_phases` needs of an engine."""

    def continue_branches(
        self, prompt: list[int], hints: Sequence[list[int]], num_tokens: int, share: bool
    ) -> list[list[int]]:
        """Greedy token ids after prompt and hint of each branch, from a cold cache."""
        ...

    def ask_appended(
        self, prompt: list[int], answers: Sequence[list[int]], question: list[int], choices: list[int], share: bool
    ) -> list[list[float]]:
        """Logits, or their logarithms of probabilities, of the choices after prompt, answer and question.

        What `continue_branches` computed may be used again; answers are hint and generated tokens.
        """
        ...

    def ask_anew(
        self, common: list[int], endings: Sequence[list[int]], choices: list[int], share: bool
    ) -> list[list[float]]:
        """The same after new prompts that begin alike."""
        ...


def solve_in_phases(engine: BranchingEngine, work: dict[str, Any], setting: str) -> Measured:
    """Times branches and verification of an engine."""
    sharing, style = setting.split()
    share = sharing == "exact"
    begin = time.perf_counter()
    token_ids = engine.continue_branches(work["prompt"], work["hints"], work["num_tokens"], share)
    generated = time.perf_counter()
    answers = [[*hint, *ids] for hint, ids in zip(work["hints"], token_ids, strict=True)]
    if style == "append":
        logits = engine.ask_appended(work["prompt"], answers, work["question"], work["choices"], share)
    else:
        common = [*work["before"], *work["prompt"], *work["between"]]
        endings = [[*answer, *work["question"]] for answer in answers]
        logits = engine.ask_anew(common, endings, work["choices"], share)
    end = time.perf_counter()
    return {
        "total_s": end - begin,
        "generate_s": generated - begin,
        "verify_s": end - generated,
        "p_yes": [(1 + math.tanh((yes - no) / 2)) / 2 for yes, no in logits],
        "token_ids": token_ids,
    }


def decode(peer: Peer, prompts: Sequence[list[int]], num_tokens: int) -> Measured:
    """One rule for all engines: the seconds of `num_tokens` + 1 tokens less those of one, both from cold caches."""
    begin = time.perf_counter()
    peer.generate(prompts, 1)
    first_s = time.perf_counter() - begin
    begin = time.perf_counter()
    token_ids = peer.generate(prompts, num_tokens + 1)
    decode_s = time.perf_counter() - begin - first_s
    if decode_s <= 0:
        raise RuntimeError(f"{num_tokens} more tokens took {decode_s:.3f} s: this machine is too busy to measure")
    rate = len(prompts) * num_tokens / decode_s
    return {"first_s": first_s, "decode_s": decode_s, "decode_tokens_per_s": rate, "token_ids": token_ids}


def prefill(peer: Peer, prompt: list[int]) -> Measured:
    """Seconds to the first token of one prompt."""
    begin = time.perf_counter()
    token_ids = peer.generate([prompt], 1)
    return {"first_s": time.perf_counter() - begin, "token_ids": token_ids}


def serve(load: Callable[[dict[str, Any]], Peer]) -> None:
    """Answers requests until stdin ends.

    Args:
        load: function that makes the peer from the options of the first request.
    """
    replies = _take_stdout()
    # The folder of a file that runs by its path comes first on the path; its neighbours are no modules.
    own = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != own]
    peer: Peer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                begin = time.perf_counter()
                peer = load(request["options"])
                result = {**peer.facts, "load_s": time.perf_counter() - begin}
            elif peer is None:
                raise RuntimeError("nothing is loaded")
            elif request["do"] == "solve":
                result = peer.solve(request["work"], request["setting"])
            elif request["do"] == "decode":
                result = decode(peer, request["prompts"], request["num_tokens"])
            elif request["do"] == "prefill":
                result = prefill(peer, request["prompt"])
            else:
                raise ValueError(f"unknown request {request['do']!r}")
            reply = {"result": result}
        except Exception as error:  # whatever an engine raises is its reply
            traceback.print_exc()
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _take_stdout() -> TextIO:
    """A stream to stdout for replies; file descriptor 1 is stderr from here on, also for compiled code."""
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies
