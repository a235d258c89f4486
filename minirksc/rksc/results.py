"""What a solve gives: the branches that remain, the chosen one, and the trace, which is plain data.

docs/trace.md says what each key of a trace means.
"""

import platform
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any

from minirksc.engine.signals import SIGNALS
from minirksc.rksc.answers import agreement
from minirksc.rksc.node import Node, finite
from minirksc.rksc.problem import Problem
from minirksc.rksc.solver_config import SolverConfig, plain
from minirksc.rksc.tree import Tree
from minirksc.trace import SCHEMA_NAME
from minirksc.version import __version__

SHOWN = (
    *("depth", "hint", "text", "num_tokens", "num_shared_tokens", "num_saved_tokens", "sharing", "similarity"),
    *("confidence", "verification", "exit_layer", "score", "error"),
)
"""Attributes of a node that results and traces show under the same names."""


@dataclass(frozen=True)
class BranchResult:
    """One candidate at the end.

    Attributes:
        text: generated text, prompt and hint excluded.
        token_ids: the same as generated tokens.
        score: p(YES) sqrt(confidence); None where it was not asked about, since a gate had settled the answer. With
            verify="never" it is the confidence.
        confidence: mean probability of the likeliest token at each generated position; None where it generated
            nothing.
        verification: p(YES); None where it was not asked about.
        sharing: what it got: "semantic" when it runs on KV of another phrasing, "exact" when
            num_shared_tokens > 0, else "none".
        similarity: likeness of its phrasing to the first; None where they were not compared, or hold NaN.
        exit_layer: layers that the pass of the question went through, where it left early; else None.
        finish_reason: "stop" or "length"; "early_exit" or "consensus" where a gate stopped it; "error".
        error: reason why it failed; None when it did not. A failed branch is never chosen.
        parsed: answer in normal form; None when it gives none, or was cut off by consensus.
        depth: round in which it was decoded last, from 1.
        path: index of each fork from the prompt to here.
        hint: beginning that its answer was given (text; token ids are decoded where possible).
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

    @classmethod
    def of(cls, node: Node, parsed: str | None) -> "BranchResult":
        """The result of a node, which has all of it but the answer."""
        values = _plain_node(node) | {"path": tuple(node.branch.path), "parsed": parsed}
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Choice:
    """How a search ended.

    Attributes:
        best: node that was chosen.
        answers: nodes that remained at the end -> parsed answer of each.
    """

    best: Node
    answers: dict[Node, str | None]


@dataclass(frozen=True)
class SolveResult:
    """What a problem gave.

    Attributes:
        answer: text of the chosen branch.
        parsed: answer of the chosen branch in normal form; None when it gives none.
        best: index of the chosen branch; where none was asked about, of the surest that gives the answer, or of the
            one that led decisively.
        branches: branches that remained at the end, then those that failed.
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


def make_result(tree: Tree, choice: Choice, problem: Problem, config: SolverConfig, gates: str) -> SolveResult:
    """Puts together what happened.

    Args:
        tree: tree of the solve, its record finished.
        choice: how the search ended.
        problem: what was solved.
        config: how it was solved.
        gates: source of the thresholds of the gates.
    """
    remaining = list(choice.answers)
    failed = [node for node in tree.nodes if node.error is not None]
    return SolveResult(
        answer=choice.best.text,
        parsed=choice.answers[choice.best],
        best=remaining.index(choice.best),
        branches=[BranchResult.of(node, choice.answers.get(node)) for node in [*remaining, *failed]],
        stats=tree.record.stats,
        gates=gates,
        trace=_trace(tree, choice, problem, config),
    )


def _trace(tree: Tree, choice: Choice, problem: Problem, config: SolverConfig) -> dict[str, Any]:
    """The same as data that JSON can hold."""
    record, session, answers = tree.record, tree.session, choice.answers
    return {
        "schema": SCHEMA_NAME,
        "versions": {"minirksc": __version__, "torch": version("torch"), "python": platform.python_version()},
        "model": str(session.config.model),
        "config": config.to_dict(),
        "seed": tree.seed,
        "problem": plain(problem.prompt),
        "phrasings": plain(problem.phrasings),
        "nodes": [
            {
                **_plain_node(node),
                # Each token as text; half a character is shown as the tokenizer does.
                "tokens": [session.decode([token_id]) for token_id in node.output_ids],
                "parsed": answers.get(node),
                "pruned": node not in answers,
            }
            for node in tree.nodes
        ],
        "best": choice.best.node_id,
        "answer": choice.best.text,
        "parsed": answers[choice.best],
        "agreement": agreement(list(answers.values())),
        "events": record.events,
        "gates": record.gates,
        "blocks": record.blocks(),
        "stats": dict(record.stats),
    }


def _plain_node(node: Node) -> dict[str, Any]:
    """A node without its branch."""
    return {
        "id": node.node_id,
        "parent": node.parent_id,
        "path": list(node.branch.path),
        "token_ids": list(node.output_ids),
        "num_output_tokens": len(node.output_ids),
        "num_own_tokens": node.num_tokens - node.num_shared_tokens,
        "signals": {name: finite(signal(node.signals)) for name, signal in SIGNALS.items()},
        "verified": node.verification is not None,
        "finish_reason": node.branch.finish_reason,
        **{name: getattr(node, name) for name in SHOWN},
    }
