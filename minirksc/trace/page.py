"""A trace as one HTML page for people: the answer, why it, what it cost, and every branch in full.

Computed here is what the template page.html writes. The page is one file: it loads nothing, tells nobody anything, and
can be read without its script. Whatever a model wrote is text in it and never markup: the template escapes it; a
content security policy, which allows this page's own style and script by their digests and nothing else, stands behind
that.
"""

import base64
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minirksc.errors import ConfigError
from minirksc.trace import SCHEMA_NAME
from minirksc.trace.branches import NUM_SHADES, PageBranch, branches_of, by_round
from minirksc.trace.figures import DASH, counted, is_number, number, one_line, seconds, shortened
from minirksc.trace.tree import picture_of

if TYPE_CHECKING:
    from jinja2 import Template

FOLDER = Path(__file__).parent
PHASES = {"prefill_s": "prompt", "decode_s": "decoding", "verify_s": "verification"}
TRACE: dict[str, Any] = {
    **dict.fromkeys(("nodes", "phrasings", "events", "gates"), ()),
    **{key: {} for key in ("versions", "config", "agreement", "blocks", "stats")},
    **dict.fromkeys(("model", "parsed")),
    "problem": "",
}
"""What a trace says by a key that it does not have, or that is null; below, its entries."""
EVENT = dict.fromkeys(["at_s", "seconds", "num_prompts"])
GATE = dict.fromkeys(["gate", "node", "layer", "value", "threshold", "decision", "reason", "calibrated", "at_s"])
EVICTION = dict.fromkeys(["block_id", "depth", "importance", "priority", "policy", "needed_again"])
NO_EFFECT = ("ask", "computed", "goes on")
"""Decisions of gates by which nothing is left out."""

# Controls as their pictures, except tab and line breaks. As U+FFFD: what UTF-8 or HTML has no place for, and what would
# show the characters after it in another order.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
_UNFIT = ((0x80, 0x9F), (0x202A, 0x202E), (0x2066, 0x2069), (0xD800, 0xDFFF), (0xFFFE, 0xFFFF))
VISIBLE = _CONTROLS | {code: 0xFFFD for first, last in _UNFIT for code in range(first, last + 1)}
"""Characters that a page cannot hold, or that would act instead of being seen, and what is seen of them."""


def trace_page(trace: Mapping[str, Any]) -> str:
    """The page.

    Args:
        trace: what docs/trace.schema.json describes. Keys that are missing leave out what they would have said.

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
    full = {key: trace.get(key) or default for key, default in TRACE.items()}
    full["events"] = [{**EVENT, **event} for event in full["events"]]
    full["gates"] = [{**GATE, **gate} for gate in full["gates"]]
    branches = branches_of(trace["nodes"], trace["best"])
    return _template().render(_told(full, branches, branches[trace["best"]])).translate(VISIBLE)


def _told(trace: Mapping[str, Any], branches: Sequence[PageBranch], best: PageBranch) -> dict[str, Any]:
    """The variables of the template."""
    answer = one_line(best.node["parsed"] or trace["parsed"])
    candidates = _candidates(trace, branches)
    num_shared = sum(branch.node["num_shared_tokens"] or 0 for branch in branches)
    return {
        "trace": trace,
        "branches": branches,
        "best": best,
        "candidates": candidates,
        "answer": answer,
        "headline": shortened(answer or one_line(best.node["text"]) or "(no text)", 160),
        "num_agreeing": sum(one_line(branch.node["parsed"]) == answer for branch in candidates),
        "num_prefills": sum(
            len(event["nodes"]) if event["num_prompts"] is None else event["num_prompts"]
            for event in trace["events"]
            if event["event"] == "prefill"
        ),
        "acted": _acted(trace["gates"]),
        "picture": picture_of(branches),
        "scores": [branch.node["score"] for branch in branches if branch.shade is not None],
        "votes": sorted(trace["agreement"].get("votes", {}).items(), key=lambda item: -item[1]),
        "times": _times(trace["stats"]),
        "rounds": by_round(branches),
        "gates": _by_gate(trace["gates"]),
        "num_shared": num_shared,
        "tokens": _tokens(trace["stats"], num_shared),
        "shared": _range(branch.node["num_shared_tokens"] for branch in candidates),
        "own": _range(branch.node["num_own_tokens"] for branch in candidates),
        "evictions": [{**EVICTION, **eviction} for eviction in trace["blocks"].get("evictions") or ()],
    }


def _candidates(trace: Mapping[str, Any], branches: Sequence[PageBranch]) -> list[PageBranch]:
    """The branches from which one was chosen."""
    chosen_from = [event["nodes"] for event in trace["events"] if event["event"] == "select"]
    if chosen_from:
        return [branch for branch in branches if branch.node["id"] in chosen_from[-1]]
    return [branch for branch in branches if not branch.node["pruned"]]


def _acted(gates: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """The gates by which something was left out, and whether by thresholds that nobody tested on this model."""
    acted: dict[str, bool] = defaultdict(bool)
    for gate in gates:
        if gate["decision"] not in NO_EFFECT:
            acted[str(gate["gate"])] |= gate["calibrated"] is False
    return acted


def _by_gate(gates: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, list[Mapping[str, Any]]]]:
    """Each gate's decisions: how often it took which, and all of them in order."""
    asked: dict[str, list[Mapping[str, Any]]] = {}
    for gate in gates:
        asked.setdefault(str(gate["gate"]), []).append(gate)
    return {name: (_tally(one_line(gate["decision"]) or DASH for gate in some), some) for name, some in asked.items()}


def _tally(decisions: Iterable[str]) -> str:
    counts = Counter(decisions)
    return ", ".join(text if counts.total() == 1 else f"{count} \u00d7 {text}" for text, count in counts.items())


def _times(stats: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the time went; nothing where it is not known."""
    total = stats.get("total_s")
    if not total:
        return []
    sizes = {label: float(stats.get(key) or 0.0) for key, label in PHASES.items()}
    sizes["everything else"] = max(total - sum(sizes.values()), 0.0)
    return _shares(sizes)


def _tokens(stats: Mapping[str, Any], num_shared: int) -> list[dict[str, Any]]:
    """What became of how many tokens; nothing where there were none."""
    sizes = {name: float(stats.get(f"num_{name}_tokens") or 0) for name in ("prefilled", "decoded")}
    sizes["taken over from others, in all branches"] = float(num_shared)
    return _shares(sizes) if any(sizes.values()) else []


def _shares(sizes: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parts of a bar, at most four: name and size, share of the whole and where it begins, both in percent."""
    total, start = sum(sizes.values()) or 1.0, 0.0
    parts = []
    for name, size in sizes.items():
        share = 100 * size / total
        parts.append({"name": name, "size": size, "share": share, "start": start})
        start += share
    return parts


def _range(values: Iterable[Any]) -> str:
    known = [value for value in values if isinstance(value, int)]
    if not known:
        return DASH
    low, high = min(known), max(known)
    return number(low) if low == high else f"{number(low)} to {number(high)}"


def _prompt_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else f"token ids: {' '.join(map(str, prompt))}"


@cache
def _template() -> "Template":
    """The template, which stays the same as long as the program runs."""
    # Not before a page is wanted: most commands show none.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_written,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(number=number, seconds=seconds, one_line=one_line, shortened=shortened)
    environment.filters.update(prompt_text=_prompt_text, digest=_digest)
    environment.filters["as_json"] = partial(json.dumps, indent=2, ensure_ascii=False, default=str)
    environment.tests["figure"] = is_number
    style, script = (Markup((FOLDER / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    environment.globals.update(counted=counted, DASH=DASH, NUM_SHADES=NUM_SHADES, style=style, script=script)
    return environment.get_template("page.html")


def _written(value: Any) -> Any:
    """A value as the page shows it: None as nothing."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
