"""The trace of a solve as plain data; `minirksc.trace.schema` says what each key means."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from minirksc.rksc.answers import agreement
from minirksc.rksc.solver_config import SolverConfig, Tokens, plain
from minirksc.trace.schema import SCHEMA_NAME
from minirksc.version import __version__

if TYPE_CHECKING:
    from minirksc.rksc.tree import Node, Tree


def make_trace(
    tree: "Tree",
    best: "Node",
    parsed: dict[int, str | None],
    *,
    model: str,
    config: SolverConfig,
    problem: Tokens,
    phrasings: Sequence[Tokens] | None,
) -> dict[str, Any]:
    """Puts together what happened.

    Args:
        tree: finished.
        best: the chosen node.
        parsed: answers of the nodes that were left at the end, by node_id.
        model: as the caller named it.
        config: of the solve.
        problem: as given.
        phrasings: as given.

    Returns:
        Data that JSON can hold, as `trace_schema.TRACE_SCHEMA` describes it.
    """
    nodes = []
    for node in tree.nodes:
        as_dict = node.to_dict()
        as_dict["tokens"] = tree.pieces(node.output_ids)
        as_dict["parsed"] = parsed.get(node.node_id)
        as_dict["pruned"] = node.node_id not in parsed
        nodes.append(as_dict)
    return {
        "schema": SCHEMA_NAME,
        "versions": {"minirksc": __version__, "torch": version("torch"), "python": platform.python_version()},
        "model": model,
        "config": config.to_dict(),
        "seed": tree.seed,
        "problem": plain(problem),
        "phrasings": plain(phrasings),
        "nodes": nodes,
        "best": best.node_id,
        "answer": best.text,
        "parsed": parsed[best.node_id],
        "agreement": agreement(list(parsed.values())),
        "events": tree.events,
        "gates": tree.gates,
        "blocks": tree.blocks(),
        "stats": dict(tree.stats),
    }
