"""A trace as one HTML page for people: the answer, why it, what it cost, and every branch in full.

The page is one file: it loads nothing, tells nobody anything, and can be read without its script. Whatever a model
wrote is text in it and never markup; a content security policy, which allows this page's own style and script by their
digests and nothing else, stands behind that.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minirksc.errors import ConfigError
from minirksc.trace.branches import branch_sections, folded_text
from minirksc.trace.html import Markup, Part, join, tag
from minirksc.trace.parts import (
    DASH,
    facts,
    fold,
    meter,
    number,
    one_line,
    seconds,
    shortened,
    some,
    stacked,
    table,
    yes_no,
)
from minirksc.trace.schema import GATES, NO_EFFECT, SCHEMA_NAME
from minirksc.trace.style import SCRIPT, STYLE
from minirksc.trace.tree import Node, name_of, tree_figure

_PHASES = {"prefill_s": "prompt", "decode_s": "decoding", "verify_s": "verification"}
_MOST_VOTES = 8
"""Answers that are listed."""
_MOST_OPEN = 4
"""Decisions of a gate that are shown without unfolding."""
_WHY_NOT_ASKED = {
    "agreement": "all that can win give the same answer",
    "skip": "one branch leads decisively by confidence",
    "decode_exit": "one branch led decisively while decoding",
    "bound": "the others could not change the answer",
}
"""Why nobody was asked about an answer, by gate."""


def trace_page(trace: Mapping[str, Any]) -> str:
    """The page.

    Args:
        trace: as `minirksc.trace.schema` describes it. Keys that are missing leave out what they would have said.

    Returns:
        An HTML document, to be written as UTF-8.

    Raises:
        ConfigError: this is no trace, or one of another version.
    """
    missing = [key for key in ("nodes", "best") if key not in trace]
    if missing or trace.get("schema", SCHEMA_NAME) != SCHEMA_NAME:
        what = f"without {' and '.join(missing)}" if missing else f"of schema {trace['schema']!r}"
        raise ConfigError(f"a trace {what} cannot be shown; give SolveResult.trace of this version, {SCHEMA_NAME}")
    if not 0 <= trace["best"] < len(trace["nodes"]):
        raise ConfigError(f"best={trace['best']} names none of the {len(trace['nodes'])} nodes of the trace")
    solve = _Solve(trace)
    body = tag(
        "body",
        tag("a", "Skip the picture", href="#branches", class_="skip"),
        tag("main", _head(solve), _tree(solve), _time(solve), *branch_sections(trace), _decisions(solve),
            _cache(solve), _rest(solve)),
        tag("script", Markup(SCRIPT)),
    )  # fmt: skip
    return f"<!doctype html>\n{tag('html', _meta(solve), body, lang='en')}\n"


class _Solve:
    """A trace, with what is asked of it more than once."""

    def __init__(self, trace: Mapping[str, Any]) -> None:
        self.trace = trace
        self.nodes: Sequence[Node] = trace["nodes"]
        self.best: Node = self.nodes[trace["best"]]
        self.stats: Mapping[str, Any] = trace.get("stats") or {}
        self.config: Mapping[str, Any] = trace.get("config") or {}
        self.gates: Sequence[Mapping[str, Any]] = trace.get("gates") or []
        self.acted: dict[str, list[Mapping[str, Any]]] = {}  # gates by which something was left out
        for gate in self.gates:
            if gate.get("decision") not in NO_EFFECT:
                self.acted.setdefault(str(gate.get("gate")), []).append(gate)
        self.events: Sequence[Mapping[str, Any]] = trace.get("events") or []
        self.blocks: Mapping[str, Any] = trace.get("blocks") or {}
        chosen_from = [event["nodes"] for event in self.events if event["event"] == "select"]
        ids = set(chosen_from[-1]) if chosen_from else {node["id"] for node in self.nodes if not node.get("pruned")}
        self.candidates = [node for node in self.nodes if node["id"] in ids]
        self.num_shared = sum(node.get("num_shared_tokens") or 0 for node in self.nodes)
        self.answer = one_line(self.best.get("parsed") or trace.get("parsed"))
        self.headline = shortened(self.answer or one_line(self.best.get("text")) or "(no text)", 160)


def _meta(solve: _Solve) -> Markup:
    policy = f"default-src 'none'; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}; img-src data:"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=f"{policy}; base-uri 'none'; form-action 'none'"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{solve.headline[:80]} \u00b7 minirksc trace"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(STYLE)),
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _head(solve: _Solve) -> Markup:
    trace, stats = solve.trace, solve.stats
    model = trace.get("model")
    problem = trace.get("problem", "")
    figures: list[tuple[Part, Part]] = [
        ("chosen", (f"branch {name_of(solve.best)}", _small(f"score {number(solve.best.get('score'))}"))),
        ("time", seconds(stats.get("total_s"))),
        ("tokens prefilled", number(stats.get("num_prefilled_tokens"))),
        ("tokens decoded", number(stats.get("num_decoded_tokens"))),
    ]
    if solve.num_shared:
        figures.append(("tokens shared", (number(solve.num_shared), _small("in all branches"))))
    return tag(
        "header",
        tag("p", "Trace of a solve", f" \u00b7 {model}" if model else "", class_="kind"),
        tag("div", folded_text(_prompt_text(problem)), class_="problem", dir="auto"),
        tag("h1", tag("span", "Answer", class_="kind"), tag("bdi", solve.headline)),
        tag("p", _sentence(solve), class_="lead"),
        _approximations(solve),
        facts(figures, "figures"),
    )


def _small(text: str) -> Markup:
    return tag("span", text, class_="quiet")


def _sentence(solve: _Solve) -> str:
    """What happened, in one plain sentence."""
    rounds = max((node.get("depth", 1) for node in solve.nodes), default=1)
    clauses = [some(len(solve.nodes), "branch", "branches") + (f" in {rounds} rounds" if rounds > 1 else "")]
    prefills = [event for event in solve.events if event["event"] == "prefill"]
    if prefills:
        clauses.append(some(sum(e.get("num_prompts", len(e["nodes"])) for e in prefills), "prefill", "prefills"))
    clauses.append(_verification(solve))
    votes = sum(one_line(node.get("parsed") or "") == solve.answer for node in solve.candidates)
    if solve.answer and len(solve.candidates) > 1:
        clauses.append(f"{votes} of {len(solve.candidates)} candidates {'gives' if votes == 1 else 'give'} this answer")
    if "total_s" in solve.stats:
        clauses.append(seconds(solve.stats["total_s"]))
    return ", ".join(clauses) + "."


def _verification(solve: _Solve) -> str:
    if solve.config.get("verify") == "never":
        return "no verification asked for"
    asked = [node for node in solve.candidates if node.get("verified", node.get("verification") is not None)]
    if len(asked) == len(solve.candidates):
        return "verified" if len(asked) == 1 else f"all {len(asked)} candidates verified"
    reasons = [reason for gate, reason in _WHY_NOT_ASKED.items() if gate in solve.acted]
    if asked:
        why = f" ({reasons[-1]})" if reasons else ""
        return f"{len(asked)} of {len(solve.candidates)} candidates verified{why}"
    return f"verification skipped because {reasons[-1]}" if reasons else "nothing verified"


def _approximations(solve: _Solve) -> Markup | None:
    """Whatever in this solve is not what computing everything would have given."""
    semantic = sum(node.get("sharing") == "semantic" for node in solve.nodes)
    layer_exits = sum(node.get("exit_layer") is not None for node in solve.nodes)
    stopped = sum(node.get("finish_reason") == "early_exit" for node in solve.nodes)
    skipped = "skip" in solve.acted
    loose = sorted(gate for gate, gates in solve.acted.items() if any(g.get("calibrated") is False for g in gates))
    said = [
        f"{some(semantic, 'branch runs', 'branches run')} on another wording's prefix" if semantic else None,
        f"{some(layer_exits, 'verification ends', 'verifications end')} before the last layer" if layer_exits else None,
        f"{some(stopped, 'branch was', 'branches were')} stopped while decoding" if stopped else None,
        "answers were not verified, since one led by confidence" if skipped else None,
        f"by thresholds that nobody tested on this model: {', '.join(loose)}" if loose else None,
    ]
    clauses = "; ".join(filter(None, said))
    return tag("p", tag("b", "Approximate: "), clauses, ".", class_="note approximate") if clauses else None


def _tree(solve: _Solve) -> Markup:
    figure = tag("figure", tree_figure(solve.nodes, solve.best["id"]))
    return tag("section", tag("h2", "The tree"), figure, _votes(solve))


def _votes(solve: _Solve) -> Markup | None:
    votes = (solve.trace.get("agreement") or {}).get("votes") or {}
    if not votes:
        return None
    ranked = sorted(votes.items(), key=lambda item: -item[1])
    most = max(ranked[0][1], 1)
    if most == 1 < len(ranked):
        answers = [tag("li", tag("bdi", shortened(one_line(answer), 60))) for answer, _ in ranked]
        return join(tag("h3", f"{len(ranked):,} answers, and no two alike"), tag("ul", answers, class_="legend"))
    rows: list[tuple[Part, Part]] = [
        (tag("bdi", answer), (meter(count / most, "100%", 8), tag("b", number(count))))
        for answer, count in ranked[:_MOST_VOTES]
    ]
    more = len(ranked) - len(rows)
    note = tag("p", f"and {some(more, 'other answer', 'other answers')}", class_="note") if more else None
    return join(tag("h3", "Answers, by branches that give them"), facts(rows, "votes"), note)


def _time(solve: _Solve) -> Markup | None:
    total = solve.stats.get("total_s")
    if not total:
        return None
    parts = [(label, float(solve.stats.get(key) or 0.0)) for key, label in _PHASES.items()]
    parts.append(("everything else", max(total - sum(seconds for _, seconds in parts), 0.0)))
    return tag("section", tag("h2", "Where the time went"), stacked(parts, seconds))


def _decisions(solve: _Solve) -> Markup:
    heading = tag("h2", "Decisions of the gates")
    if not solve.gates:
        return tag("section", heading, tag("p", "No gate was asked.", class_="quiet"))
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for gate in solve.gates:
        groups.setdefault(str(gate.get("gate")), []).append(gate)
    return tag("section", heading, [_gate(solve, name, asked) for name, asked in groups.items()])


def _gate(solve: _Solve, name: str, asked: Sequence[Mapping[str, Any]]) -> Markup:
    counts: dict[str, int] = {}
    for gate in asked:
        decision = one_line(gate.get("decision")) or DASH
        counts[decision] = counts.get(decision, 0) + 1
    summary = ", ".join(decision if len(asked) == 1 else f"{counts[decision]} \u00d7 {decision}" for decision in counts)
    kinds = {"branch": "", "layer": "n", "value": "n", "threshold": "n", "decision": "", "reason": "w"}
    columns = [*kinds.items(), ("calibrated", ""), ("at", "n")]
    rows = [
        (
            _link(solve, gate.get("node")),
            number(gate.get("layer")),
            number(gate.get("value"), 3),
            number(gate.get("threshold"), 3),
            gate.get("decision"),
            gate.get("reason"),
            yes_no(gate.get("calibrated")),
            seconds(gate.get("at_s")),
        )
        for gate in asked
    ]
    title = (tag("b", name), f": {summary}")
    return fold(title, tag("p", GATES.get(name), class_="note"), table(columns, rows), is_open=len(asked) <= _MOST_OPEN)


def _link(solve: _Solve, node_id: object) -> Part:
    if isinstance(node_id, int) and 0 <= node_id < len(solve.nodes):
        return tag("a", name_of(solve.nodes[node_id]), href=f"#branch-{node_id}")
    return "all"


def _cache(solve: _Solve) -> Markup:
    stats, blocks, candidates = solve.stats, solve.blocks, solve.candidates
    sizes = [(name, float(stats.get(f"num_{name}_tokens") or 0)) for name in ("prefilled", "decoded")]
    sizes.append(("taken over from others, in all branches", float(solve.num_shared)))
    known: list[tuple[Part, Part]] = [
        ("shared when it started, tokens", _range(node.get("num_shared_tokens") for node in candidates)),
        ("its own, tokens", _range(node.get("num_own_tokens") for node in candidates)),
        ("blocks in use, at most", number(blocks.get("used_peak", stats.get("blocks_used_peak")))),
        ("tokens a block", number(blocks.get("size"))),
        ("blocks evicted", number(blocks.get("evicted", stats.get("num_evicted_blocks")))),
    ]
    return tag(
        "section",
        tag("h2", "Tokens and blocks"),
        stacked(sizes, lambda size: number(int(size))) if any(size for _, size in sizes) else None,
        tag("h3", "KV cache: of each candidate, and in all"),
        facts((term, value) for term, value in known if value != DASH),
        _evictions(blocks),
    )


def _evictions(blocks: Mapping[str, Any]) -> Markup | None:
    evictions = blocks.get("evictions") or []
    if not evictions:
        return None
    kinds = {"block": "n", "depth": "n", "importance": "n", "priority": "n", "policy": "", "wanted again": ""}
    rows = [
        (
            number(eviction.get("block_id")),
            number(eviction.get("depth")),
            number(eviction.get("importance"), 3),
            " / ".join(number(value, 3) for value in eviction.get("priority") or ()),
            eviction.get("policy"),
            yes_no(eviction.get("needed_again")),
        )
        for eviction in evictions
    ]
    return fold(some(len(evictions), "evicted block", "evicted blocks"), table([*kinds.items()], rows))


def _rest(solve: _Solve) -> Markup:
    """Events, phrasings, config and versions, folded away."""
    trace = solve.trace
    folds: list[Part] = []
    if solve.events:
        columns = [("step", ""), ("at", "n"), ("took", "n"), ("branches", "n")]
        rows = [
            (event["event"], seconds(event.get("at_s")), seconds(event.get("seconds")), number(len(event["nodes"])))
            for event in solve.events
        ]
        folds.append(fold("Steps, in order", table(columns, rows)))
    if trace.get("phrasings"):
        wordings = [tag("p", f"{k}. ", tag("bdi", _prompt_text(text))) for k, text in enumerate(trace["phrasings"], 1)]
        folds.append(fold("Wordings, one a branch", wordings))
    for title, key in (("Configuration", "config"), ("Counters", "stats"), ("Versions", "versions")):
        if trace.get(key):
            text = json.dumps(trace[key], indent=2, ensure_ascii=False, default=str)
            folds.append(fold(title, tag("div", text, class_="code")))
    return tag("section", tag("h2", "For the record"), folds)


def _range(values: Iterable[object]) -> str:
    known = [value for value in values if isinstance(value, int)]
    if not known:
        return DASH
    low, high = min(known), max(known)
    return number(low) if low == high else f"{number(low)} to {number(high)}"


def _prompt_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else f"token ids: {' '.join(map(str, prompt))}"
