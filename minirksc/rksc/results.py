"""What a solve gives."""

from dataclasses import asdict, dataclass
from typing import Any

from minirksc.rksc.solver_config import plain


@dataclass(frozen=True)
class BranchResult:
    """One candidate at the end.

    Attributes:
        text: generated text, prompt and hint excluded.
        token_ids: the same as generated tokens.
        score: p(YES) sqrt(confidence); None where nobody asked, since a gate had settled the answer. With
            verify="never" it is the confidence.
        confidence: mean probability of the likeliest token at each generated position; None where it generated
            nothing.
        verification: p(YES); None where nobody asked.
        sharing: what it got: "semantic" when it runs on KV of another wording, "exact" when
            num_shared_tokens > 0, else "none".
        similarity: of its wording to the first; None where no gate compared them, or found NaN.
        exit_layer: layers that the pass of the question went through, where it left early; else None.
        finish_reason: "stop" or "length"; "early_exit" or "consensus" where a gate stopped it; "error".
        error: why it failed; None when it did not. A failed branch is never chosen.
        parsed: its answer in normal form; None when it gives none, or was cut off by consensus.
        depth: round in which it was decoded last, from 1.
        path: index of each fork from the prompt to here.
        hint: how its answer was made to begin (text; token ids are decoded where possible).
        num_shared_tokens: tokens whose KV it took from another branch or the prefix cache when it
            started.
        num_own_tokens: all its other tokens, prompt included.
        num_saved_tokens: prompt tokens, counted by layers, that semantic sharing did not compute.
    """

    text: str
    token_ids: list[int]
    score: float | None
    confidence: float | None
    verification: float | None
    sharing: str
    similarity: float | None
    exit_layer: int | None
    finish_reason: str | None
    parsed: str | None
    depth: int
    path: tuple[int, ...]
    hint: str
    num_shared_tokens: int
    num_own_tokens: int
    num_saved_tokens: float
    error: str | None


@dataclass(frozen=True)
class SolveResult:
    """What a problem gave.

    Attributes:
        answer: text of the chosen branch.
        parsed: its answer in normal form; None when it gives none.
        best: index of the chosen branch; where nobody was asked, of the surest that gives the answer, or of the one
            that led decisively.
        branches: those that were left at the end, then those that failed.
        stats: seconds by phase (prefill_s: prompts; decode_s: hints and decoding; verify_s;
            total_s), what the engine counted meanwhile (num_prefilled_tokens and so on),
            blocks_used_peak (blocks in use, the most that was seen between phases).
        gates: where the thresholds of the gates came from: "exact" (none of them approximates), "paper",
            "uncalibrated" or "calibrated".
        trace: config, problem, nodes of the tree and events in order, as plain data that JSON can
            hold.
    """

    answer: str
    parsed: str | None
    best: int
    branches: list[BranchResult]
    stats: dict[str, float]
    gates: str
    trace: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        return dict(plain(asdict(self)))
