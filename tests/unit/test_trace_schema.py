"""The schema of a trace describes every key, and traces of solves keep to it."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from minirksc import LLM, Solver, SolverConfig
from minirksc.cli.output import to_json
from minirksc.trace import SCHEMA_NAME

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
files = importlib.import_module("trace_files")
EXAMPLE, GATES, TRACE_SCHEMA = files.EXAMPLE, files.GATES, files.TRACE_SCHEMA
VALIDATOR = Draft202012Validator(TRACE_SCHEMA)
DOCUMENTED = dict(files.documented_keys())
# The engine's counters, and what `SolverConfig` documents.
OPEN = ("stats", "config")


def undocumented(value, prefix=""):
    """Paths of keys that the schema does not describe."""
    if isinstance(value, list):
        return {path for item in value for path in undocumented(item, prefix.removesuffix(".") + "[].")}
    found = set()
    for key, item in value.items() if isinstance(value, dict) else ():
        part = DOCUMENTED.get(prefix + key)
        if part is None:
            found.add(prefix + key)
        elif "additionalProperties" not in part and key not in OPEN:
            found |= undocumented(item, f"{prefix}{key}.")
    return found


def changed(**values):
    trace = copy.deepcopy(EXAMPLE)
    trace.update(values)
    return trace


def test_the_schema_is_one_and_its_example_keeps_to_it():
    Draft202012Validator.check_schema(TRACE_SCHEMA)
    VALIDATOR.validate(EXAMPLE)
    assert undocumented(EXAMPLE) == set()
    assert TRACE_SCHEMA["properties"]["schema"]["const"] == SCHEMA_NAME


def test_every_key_has_a_description_and_times_their_unit():
    for path, part in DOCUMENTED.items():
        assert part.get("description"), path
        if path.endswith(("_s", ".seconds")):
            assert "seconds" in part["description"], path


@pytest.mark.parametrize(
    "trace",
    [
        changed(schema="minirksc-trace-0"), changed(best=-1), changed(answer=None), changed(nodes=[{"id": 0}]),
        changed(gates=[{"gate": "unheard of", "decision": "x"}]), changed(events=[{"event": "extend"}]),
        changed(problem=[1.5]), {key: value for key, value in EXAMPLE.items() if key != "nodes"},
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused(trace):
    with pytest.raises(ValidationError):
        VALIDATOR.validate(trace)


def test_gates_may_leave_out_what_they_do_not_have_and_a_reader_meets_new_keys():
    VALIDATOR.validate(changed(gates=[{"gate": gate, "decision": "ask"} for gate in GATES], later="a new key"))
    assert undocumented(changed(later="a new key")) == {"later"}


def test_the_table_has_a_row_for_every_key_and_is_the_one_in_docs():
    table = files.schema_markdown()
    assert all(f"| `{path}` |" in table for path in DOCUMENTED)
    assert all(line.count(" | ") == 2 for line in table.splitlines())
    wanted = "write trace_files.schema_markdown() into docs/trace.md, below its introduction"
    assert (files.ROOT / "docs" / "trace.md").read_text(encoding="utf-8").endswith(table), wanted


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama(tokenizer=True, chat=True, max_len=256), kv_cache_bytes="2MiB") as llm:
        yield llm


SEMANTIC = dict(sharing="semantic", tau=-1.0, uncalibrated=True)
OPTIONS = [
    dict(), dict(verify="always", sharing="none"), dict(verify="never"), dict(depth=3, beam=2), dict(policy="paper"),
    dict(select="vote", answer_parser="text"), SEMANTIC, {**SEMANTIC, "sharing_mode": "aligned"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_trace_of_a_solve_keeps_to_the_schema(llm, options):
    problem = "What is 17 + 25?"
    phrasings = [problem, "What's 17 + 25?", "What is 17 + 26?", problem] if "tau" in options else None
    solver = Solver(llm, SolverConfig(branches=4, tokens_per_step=8, **options))
    trace = json.loads(to_json(solver.solve(problem, phrasings).trace))
    VALIDATOR.validate(trace)
    assert undocumented(trace) == set()
    assert set(trace) == set(TRACE_SCHEMA["properties"])


def keys(value, prefix=""):
    """Paths of all keys that are there."""
    if isinstance(value, list):
        return {path for item in value for path in keys(item, prefix.removesuffix(".") + "[].")}
    pairs = value.items() if isinstance(value, dict) else ()
    return {path for key, item in pairs for path in (prefix + key, *keys(item, f"{prefix}{key}."))}


def test_no_key_is_documented_that_no_trace_has(llm):
    seen = set()
    for options in (dict(verify="always", depth=2), dict(policy="paper")):
        solver = Solver(llm, SolverConfig(branches=4, tokens_per_step=8, **options))
        seen |= keys(json.loads(to_json(solver.solve("What is 17 + 25?").trace)))
    assert {path for path in DOCUMENTED if not path.startswith("blocks.evictions[]")} - seen == set()


def test_evictions_keep_to_the_schema(tiny_llama):
    with LLM(tiny_llama(tokenizer=True, max_len=256), kv_cache_bytes="100KiB", block_size=8) as small:
        for problem in ("one, two, three, four, five, six, seven", "eight, nine, ten, eleven, twelve, thirteen"):
            config = SolverConfig(branches=2, tokens_per_step=16, verify="never", chat=False)
            trace = json.loads(to_json(Solver(small, config).solve(problem).trace))
    assert trace["blocks"]["evictions"]
    assert {path for path in DOCUMENTED if path.startswith("blocks.")} <= keys(trace)
    VALIDATOR.validate(trace)
    assert undocumented(trace) == set()
