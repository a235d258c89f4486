"""The trace of a solve, key by key: `SolveResult.trace`, and what --trace FILE.json writes.

`TRACE_SCHEMA` is a JSON Schema (draft 2020-12) as plain data, with a description of every key and a small example. The
engine does not check its own traces against it; the tests do. Readers should ignore keys that they do not know: a key
may be added without a new name of the schema, but none is taken away or changes its meaning.

Units: seconds end in `_s` (and `seconds`), on the clock of this solve, 0 when it began; everything that begins with
`num_` is a count; probabilities and scores are in 0..1; layers are counted from 1, in the order of the forward pass.
"""

from collections.abc import Iterator
from typing import Any

SCHEMA_NAME = "minirksc-trace-1"

Schema = dict[str, Any]

SHARING = ("none", "exact", "semantic")
GATES = {
    "guard": "May a wording stand for the first one, as far as numbers, names and negations go?",
    "share": "Is a wording alike enough to the first one to run on its KV?",
    "consensus": "Can the branches under way still change the vote?",
    "decode_exit": "Does one branch lead decisively, so that the others may stop?",
    "agreement": "Do all branches that can win give the same answer?",
    "skip": "Does one branch lead decisively by confidence, so that nobody need be asked?",
    "bound": "Can the branches that were not asked about still change the answer?",
    "layer_exit": "Is YES or NO clear before the last layer?",
}
"""Every gate, and the question that it answers."""

NO_EFFECT = ("ask", "computed", "goes on")
"""Decisions by which nothing is left out."""


def _of(kind: str, text: str, *, null: bool = False, **more: Any) -> Schema:
    return {"type": [kind, "null"] if null else kind, "description": text, **more}


def _object(text: str, properties: dict[str, Schema], required: str = "", **more: Any) -> Schema:
    return _of("object", text, properties=properties, required=required.split(), **more)


def _list(text: str, items: Schema, *, null: bool = False) -> Schema:
    return _of("array", text, null=null, items=items)


_COUNT = {"type": "integer", "minimum": 0}
_NODE_ID = {**_COUNT, "description": "id of a node"}
_PROBABILITY = {"minimum": 0, "maximum": 1}
_PROMPT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _COUNT}]}


def _count(text: str, *, null: bool = False) -> Schema:
    return _of("integer", text, null=null, minimum=0)


def _seconds(text: str) -> Schema:
    return _of("number", f"{text}; seconds", minimum=0)


def _probability(text: str, *, null: bool = False) -> Schema:
    return _of("number", text, null=null, **_PROBABILITY)


_NODE = _object(
    "a branch as it was when it ended",
    {
        "id": _count("its index in `nodes`"),
        "parent": _count("id of the node that it was forked from; null in the first round", null=True),
        "path": _list("index of each fork from the prompt to here, from 0", _COUNT),
        "depth": _of("integer", "round of decoding in which it was made, from 1", minimum=1),
        "hint": _of("string", "how its answer was made to begin"),
        "text": _of("string", "what it generated, its ancestors' part included; prompt and hint are not"),
        "token_ids": _list("generated tokens, its ancestors' included", _COUNT),
        "tokens": _list("the same tokens, each as its piece of text", {"type": "string"}),
        "num_tokens": _count("length of its sequence: prompt, hint and generated tokens"),
        "num_output_tokens": _count("generated tokens"),
        "num_shared_tokens": _count("tokens whose KV it took from another branch or the prefix cache when it started"),
        "num_own_tokens": _count("all its other tokens"),
        "num_saved_tokens": _of(
            "number", "prompt tokens, counted by layers, that semantic sharing did not compute", minimum=0
        ),
        "sharing": _of("string", "what it got, not what was asked for; semantic is an approximation", enum=[*SHARING]),
        "similarity": _of(
            "number", "of its wording to the first one; null where no gate compared them, or found NaN", null=True
        ),
        "confidence": _probability(
            "mean probability of the likeliest token at each generated position; null without tokens", null=True
        ),
        "signals": _of(
            "object",
            "other measures of confidence, by name; larger is surer",
            additionalProperties={"type": ["number", "null"]},
        ),
        "verification": _probability("p(YES) when the model was asked about the answer; null where not", null=True),
        "score": _of(
            "number",
            "p(YES) sqrt(confidence); null where nobody asked, since a gate had settled the answer; with verify "
            '"never" the confidence',
            null=True,
        ),
        "parsed": _of(
            "string",
            "its answer in normal form; null where it gives none, was cut off by consensus, or was no candidate at the "
            "end",
            null=True,
        ),
        "exit_layer": _of(
            "integer", "layers that the pass of its question went through; null: all of them", null=True, minimum=1
        ),
        "verified": _of("boolean", "whether the model was asked about its answer"),
        "finish_reason": _of(
            "string",
            "stop: it ended by itself; length: at tokens_per_step; early_exit, consensus: a gate stopped it; error: it "
            "failed; null: it was not decoded",
            null=True,
        ),
        "pruned": _of("boolean", "whether it was no candidate at the end; one that was forked went on in others"),
        "error": _of("string", "why it failed; null if it did not", null=True),
    },
    "id parent path depth text sharing score",
)

_EVENT = _object(
    "one step of the solve; some have more keys than these",
    {
        "event": _of("string", "prefill, fork, extend (decoding), verify, select"),
        "at_s": _seconds("when it began"),
        "seconds": _seconds("how long it took"),
        "nodes": _list("ids of the nodes that it was about", _NODE_ID),
        "num_prompts": _count("prefill: prompts that were computed; equal ones count once"),
        "survivors": _list("fork: ids of the nodes that went on, best first", _NODE_ID),
        "probabilities": _list("verify: p(YES) of each node; null where asking failed", {"type": ["number", "null"]}),
        "rule": _of("string", "select: score, vote or weighted_vote"),
        "parsed": _list("select: each node's answer in normal form", {"type": ["string", "null"]}),
        "best": _count("select: id of the chosen node"),
    },
    "event at_s seconds nodes",
)

_GATE = _object(
    "one decision of one gate",
    {
        "gate": _of("string", "; ".join(f"{name}: {question}" for name, question in GATES.items()), enum=[*GATES]),
        "node": _count("id of the node that it was about; null: all of them", null=True),
        "layer": _count("layers that were computed when it decided; null: not between layers", null=True),
        "value": _of("number", "what was compared; null where it was NaN", null=True),
        "threshold": _of("number", "with what", null=True),
        "decision": _of("string", f"what follows from it; by {', '.join(NO_EFFECT)} nothing is left out"),
        "reason": _of("string", "why, in words"),
        "calibrated": _of(
            "boolean", "whether its thresholds were tested on this model; null: it has none of that kind", null=True
        ),
        "at_s": _seconds("when it decided"),
    },
    "gate decision",
)

_EVICTION = _object(
    "a cached block that had to make room",
    {
        "block_id": _count("its number, now another block's"),
        "num_tokens": _count("of its sequence, up to the block's end"),
        "depth": _count("of its node in the reasoning tree; 0: the prompt"),
        "importance": _of("number", "attention mass that it received, averaged over decode steps", null=True),
        "num_uses": _count("times that a branch took it"),
        "num_awaited": _count("live branches that were known to need it again"),
        "priority": _list("what it was ranked by; the lowest goes first", {"type": ["number", "null"]}),
        "policy": _of("string", "rksc, cost, lru or lfu"),
        "at": _count("clock of the block manager, which counts the times that any branch took a block"),
        "needed_again": _of("boolean", "whether its tokens have been computed again"),
    },
    "block_id",
)

_STATS = _object(
    "counters of this solve; the engine's others are here too",
    {
        "prefill_s": _seconds("prompts"),
        "decode_s": _seconds("hints and decoding"),
        "verify_s": _seconds("verification"),
        "total_s": _seconds("the whole solve"),
        "num_prefilled_tokens": _count("tokens computed as a prompt, hint or question"),
        "num_decoded_tokens": _count("tokens generated"),
        "num_cached_tokens": _count("tokens found in the prefix cache"),
        "num_steps": _count("steps of the engine"),
        "num_layer_rows": _count("tokens times layers that were computed"),
        "num_saved_layer_rows": _count("tokens times layers that gates made unnecessary"),
        "blocks_used_peak": _count("KV blocks in use, the most seen between phases"),
        "num_evicted_blocks": _count("cached blocks whose room was needed"),
        "num_preemptions": _count("times that a branch's blocks were taken back, to be computed again"),
    },
    "total_s",
)

EXAMPLE: dict[str, Any] = {
    "schema": SCHEMA_NAME,
    "versions": {"minirksc": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
    "model": "smollm2-135m",
    "config": {"branches": 2, "depth": 1, "tokens_per_step": 4, "sharing": "exact", "verify": "auto"},
    "seed": 0,
    "problem": "What is 17 + 25?",
    "phrasings": None,
    "nodes": [
        {
            "id": 0,
            "parent": None,
            "path": [0],
            "depth": 1,
            "hint": "Approach #1:",
            "text": " 17 + 25 = 42.",
            "token_ids": [1, 2, 3, 4],
            "tokens": [" 17 + 25", " =", " 42", "."],
            "num_tokens": 31,
            "num_output_tokens": 4,
            "num_shared_tokens": 22,
            "num_own_tokens": 9,
            "num_saved_tokens": 0.0,
            "sharing": "exact",
            "similarity": None,
            "confidence": 0.81,
            "signals": {"mean_top1": 0.81, "tail": 0.74},
            "verification": None,
            "score": None,
            "parsed": "42",
            "exit_layer": None,
            "verified": False,
            "finish_reason": "stop",
            "pruned": False,
            "error": None,
        },
        {
            "id": 1,
            "parent": None,
            "path": [1],
            "depth": 1,
            "hint": "Approach #2:",
            "text": " The sum is 42",
            "token_ids": [5, 6, 7, 3],
            "tokens": [" The", " sum", " is", " 42"],
            "num_tokens": 31,
            "num_output_tokens": 4,
            "num_shared_tokens": 22,
            "num_own_tokens": 9,
            "num_saved_tokens": 0.0,
            "sharing": "exact",
            "similarity": None,
            "confidence": 0.66,
            "signals": {"mean_top1": 0.66, "tail": 0.58},
            "verification": None,
            "score": None,
            "parsed": "42",
            "exit_layer": None,
            "verified": False,
            "finish_reason": "length",
            "pruned": False,
            "error": None,
        },
    ],
    "best": 0,
    "answer": " 17 + 25 = 42.",
    "parsed": "42",
    "agreement": {"votes": {"42": 2}, "num_without": 0, "share": 1.0},
    "events": [
        {"event": "prefill", "at_s": 0.0, "seconds": 0.12, "nodes": [0, 1], "num_prompts": 1},
        {"event": "extend", "at_s": 0.12, "seconds": 0.31, "nodes": [0, 1]},
        {"event": "select", "at_s": 0.43, "seconds": 0.01, "nodes": [0, 1], "rule": "score", "best": 0},
    ],
    "gates": [
        {
            "gate": "agreement",
            "node": None,
            "layer": None,
            "value": None,
            "threshold": None,
            "decision": "nobody is asked",
            "reason": "all that can win answer '42'; the surest of them is named",
            "calibrated": None,
            "at_s": 0.43,
        }
    ],
    "blocks": {"size": 16, "used_peak": 4, "evicted": 0, "evictions": []},
    "stats": {
        "prefill_s": 0.12,
        "decode_s": 0.31,
        "verify_s": 0.0,
        "total_s": 0.45,
        "num_prefilled_tokens": 32,
        "num_decoded_tokens": 8,
        "num_cached_tokens": 0,
        "num_steps": 6,
        "num_layer_rows": 1200,
        "num_saved_layer_rows": 0,
    },
}
"""A trace in full."""

TRACE_SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "The trace of a solve",
    **_object(
        "what was asked, what each branch said, and every decision with its reason",
        {
            "schema": _of("string", "name and version of this format", const=SCHEMA_NAME),
            "versions": _of(
                "object", "of minirksc and what it runs on", additionalProperties={"type": ["string", "null"]}
            ),
            "model": _of("string", "the checkpoint, as it was named or where it lies"),
            "config": _of("object", "the SolverConfig, sampling parameters included"),
            "seed": _count("of the random numbers: the config's, or where it has none the LLM's next"),
            "problem": {**_PROMPT, "description": "text, or token ids of a whole prompt"},
            "phrasings": _list("one wording a branch; null: all got the problem", _PROMPT, null=True),
            "nodes": _list("every branch that was ever made, in order", _NODE),
            "best": _count("id of the chosen node"),
            "answer": _of("string", "its text"),
            "parsed": _of("string", "its answer in normal form; null where it gives none", null=True),
            "agreement": _object(
                "how far the candidates agree, without knowing what is right",
                {
                    "votes": _of("object", "answer: how many give it", additionalProperties={"type": "integer"}),
                    "num_without": _count("candidates that give no answer"),
                    "share": _probability("of all candidates, those with the commonest answer"),
                },
            ),
            "events": _list("what was done, in order", _EVENT),
            "gates": _list("every decision that a gate took, in order", _GATE),
            "blocks": _object(
                "the KV cache during this solve",
                {
                    "size": _of("integer", "tokens a block", minimum=1),
                    "used_peak": _count("blocks in use, the most seen between phases"),
                    "evicted": _count("cached blocks whose room was needed"),
                    "evictions": _list("which; the last ones, if there were many", _EVICTION),
                },
            ),
            "stats": _STATS,
        },
        "schema config problem nodes best answer events stats",
    ),
    "examples": [EXAMPLE],
}


def documented_keys(schema: Schema = TRACE_SCHEMA, prefix: str = "") -> Iterator[tuple[str, Schema]]:
    """Every key with what the schema says about it, parents first.

    Args:
        schema: of an object.
        prefix: path of that object.

    Yields:
        (path, schema): `nodes[].id` is the key `id` of each entry of `nodes`.
    """
    for name, part in schema.get("properties", {}).items():
        path = f"{prefix}{name}"
        yield path, part
        yield from documented_keys(part, f"{path}.")
        yield from documented_keys(part.get("items", {}), f"{path}[].")


def schema_markdown() -> str:
    """The schema as a table in Markdown: one row a key."""
    rows = ["| key | type | meaning |", "| --- | --- | --- |"]
    for path, part in documented_keys():
        meaning = part["description"].replace("|", "\\|")
        rows.append(f"| `{path}` | {_kind(part)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _kind(part: Schema) -> str:
    if "anyOf" in part:
        return " or ".join(_kind(choice) for choice in part["anyOf"])
    kinds = part["type"] if isinstance(part["type"], list) else [part["type"]]
    if "const" in part:
        return f'"{part["const"]}"'
    if "array" in kinds:
        item = _kind(part["items"])
        item = f"({item})" if " " in item else f"{item}s"
        kinds = [f"list of {item}" if kind == "array" else kind for kind in kinds]
    return " or ".join(kinds)
