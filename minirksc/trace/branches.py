"""The branches of a trace as folded sections: what each said, and all that is known about it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from minirksc.trace.html import Markup, Part, join, tag
from minirksc.trace.parts import DASH, facts, fold, meter, number, one_line, some
from minirksc.trace.tree import Node, given_up, name_of

_LONG = 900
"""Characters of a text that are shown without unfolding."""
_PREVIEW = 400
"""Of a longer one."""
_MANY = 16
"""Branches of a round before the last that are shown without unfolding."""
_ENDS = {
    "stop": "ended by itself",
    "length": "cut at the limit of tokens",
    "early_exit": "stopped: another branch led",
    "consensus": "stopped: enough branches agreed",
    "abort": "aborted",
    "error": "failed",
}
_SHARING = {
    "exact": "exact",
    "none": "none",
    "semantic": "semantic: another wording's prefix, an approximation",
}


def branch_sections(trace: Mapping[str, Any]) -> list[Markup]:
    """All branches, the last round first, and in a round the best first; the chosen one is open."""
    nodes: Sequence[Node] = trace["nodes"]
    pruned = given_up(nodes)
    rounds: dict[int, list[Node]] = {}
    for node in nodes:
        rounds.setdefault(node.get("depth", 1), []).append(node)
    parts: list[Part] = [tag("h2", "Branches, in full"), tag("div", class_="tools")]
    for depth in sorted(rounds, reverse=True):
        ranked = sorted(rounds[depth], key=partial(_rank, best=trace["best"]))
        sections = [_branch(node, nodes, node["id"] == trace["best"], node["id"] in pruned) for node in ranked]
        title = f"Round {depth}: {some(len(ranked), 'branch', 'branches')}"
        if depth < len(rounds) and len(ranked) > _MANY:
            parts.append(fold(title, sections))
        else:
            parts += [tag("h3", title) if len(rounds) > 1 else None, *sections]
    return [tag("section", parts, id="branches")]


def _rank(node: Node, best: int) -> tuple[float, ...]:
    """The chosen one first, then by score, and by confidence where nobody was asked."""
    values: list[Any] = [node.get("score"), node.get("confidence")]
    return (node["id"] != best, *(0.0 if number(value) == DASH else -value for value in values))


def folded_text(text: str) -> Markup:
    """A text; the rest of a long one is a click away."""
    if len(text) <= _LONG:
        return join(text)
    preview = tag("span", f"{text[:_PREVIEW]}\u2026 ", class_="preview")
    summary = tag("summary", preview, tag("span", f"all {len(text):,} characters", class_="small quiet"))
    return tag("details", summary, text)


def _branch(node: Node, nodes: Sequence[Node], is_best: bool, is_pruned: bool) -> Markup:
    tags = ["chosen"] * is_best + ["pruned"] * is_pruned + ["failed"] * bool(node.get("error"))
    tags += ["approximate"] * (node.get("sharing") == "semantic")
    name = tag("span", tag("span", name_of(node), class_="name"), tag("span", f" {', '.join(tags)}", class_="tag"))
    confidence: Any = node.get("confidence")
    bar = meter(confidence if number(confidence) != DASH else 0.0, 44)
    # Answers are read at the end alone, so who was pruned has none.
    answer = one_line(node.get("parsed")) or ("" if node.get("pruned") else tag("span", "no answer", class_="quiet"))
    summary = tag(
        "summary",
        name,
        tag("span", tag("span", "score ", class_="quiet small"), number(node.get("score"))),
        tag("span", tag("span", "conf", class_="quiet small"), bar, number(confidence), class_="measure"),
        tag("bdi", answer, class_="cut"),
        tag("bdi", one_line(node.get("text"))[:300], class_="cut quiet small"),
    )
    parent = nodes[node["parent"]] if node.get("parent") is not None else None
    body = tag(
        "div",
        tag("p", node["error"], class_="note approximate") if node.get("error") else None,
        tag("div", _text(node, parent), class_="text", dir="auto"),
        facts(_known(node, parent)),
        _tokens(node, parent),
        class_="body",
        id=f"branch-{node['id']}",
    )
    return tag("details", summary, body, open=is_best, class_="branch best" if is_best else "branch")


def _text(node: Node, parent: Node | None) -> Part:
    """Hint and text; what was given to it is paler than what it wrote."""
    text, inherited = node.get("text") or "", (parent or {}).get("text") or ""
    if not text.startswith(inherited):
        inherited = ""
    given = node.get("hint") or "" if parent is None else inherited
    own = text[len(inherited) :]
    pale = tag("span", given, class_="quiet") if given else None
    return pale, folded_text(own) if own else tag("span", "(nothing generated)", class_="quiet")


def _known(node: Node, parent: Node | None) -> list[tuple[str, Part]]:
    verification = node.get("verification")
    asked = node.get("verified", verification is not None)
    sharing = str(node.get("sharing", "none"))
    known: list[tuple[str, Part]] = [
        ("score", number(node.get("score"), 3)),
        ("verification, p(YES)", number(verification, 3) if asked else "not asked"),
        ("confidence", number(node.get("confidence"), 3)),
        *((name.replace("_", " "), number(value, 3)) for name, value in (node.get("signals") or {}).items()),
        ("end", _ENDS.get(str(node.get("finish_reason")), node.get("finish_reason") or DASH)),
        ("sharing", _SHARING.get(sharing, sharing)),
        ("similarity to the first wording", number(node.get("similarity"), 3)),
        ("verified up to layer", number(node.get("exit_layer"))),
        ("tokens, in all", number(node.get("num_tokens"))),
        ("generated", number(node.get("num_output_tokens"))),
        ("shared at the start", number(node.get("num_shared_tokens"))),
        ("its own", number(node.get("num_own_tokens"))),
        ("not computed, thanks to semantic sharing", number(node.get("num_saved_tokens") or None, 1)),
    ]
    if parent is not None:
        known.append(("forked from", tag("a", name_of(parent), href=f"#branch-{parent['id']}")))
    known.append(("id in the JSON", number(node["id"])))
    return [(term, value) for term, value in known if value != DASH]


def _tokens(node: Node, parent: Node | None) -> Markup | None:
    """Those that it generated itself, each set off from the next."""
    tokens = node.get("tokens") or []
    inherited = len((parent or {}).get("tokens") or ())
    own = tokens[inherited:] if len(tokens) >= inherited else tokens
    if not own:
        return None
    pieces = [tag("i", piece.replace("\n", "\u21b5\n")) for piece in own]
    title = some(len(own), "token", "tokens") + ("" if len(own) == len(tokens) else " of this round")
    return fold(title, tag("div", pieces, class_="tokens"), class_="fold small")
