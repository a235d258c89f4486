"""The page of a trace: what it says, that no text in it acts, and that it looks after every reader."""

import copy
import importlib
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirksc.cli.generate import main
from minirksc.errors import ConfigError
from minirksc.trace.page import trace_page

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
files = importlib.import_module("trace_files")
EXAMPLE = files.EXAMPLE

VOID = {"meta", "link"}
EVIL = "</script></style></title><script>document.title='gone'</script><img src=x onerror=\"document.title='gone'\">"


class Page(HTMLParser):
    """Elements and visible text of a page; an element that is not closed properly is an error."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.said = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.said).split())
        self.ids = {attributes["id"] for _, attributes in self.elements if "id" in attributes}

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        if not {"style", "script", "title"} & set(self.open[-1:]):
            self.said.append(text)

    def with_class(self, name):
        return [element for element in self.elements if name in (element[1].get("class") or "").split()]


def changed(nodes=None, **values):
    """The example with values of the trace, and of each node, replaced."""
    trace = copy.deepcopy(EXAMPLE)
    trace.update(values)
    for node, more in zip(trace["nodes"], nodes or [], strict=False):
        node.update(more)
    return trace


def tree(branches, depth, beam=2):
    """A trace of a search; scores fall with the place in the round."""
    nodes, parents = [], [None]
    for level in range(1, depth + 1):
        kids = []
        for place in range(branches):
            parent = parents[place % len(parents)]
            path = [*(parent["path"] if parent else []), place // len(parents)]
            kids.append({
                **copy.deepcopy(EXAMPLE["nodes"][0]), "id": len(nodes) + place, "path": path, "depth": level,
                "parent": None if parent is None else parent["id"], "score": 1 / (place + 2), "pruned": level < depth,
            })  # fmt: skip
        nodes += kids
        parents = kids[:beam]
    last = [node["id"] for node in kids]
    select = {"event": "select", "at_s": 0.4, "seconds": 0.0, "nodes": last, "best": last[0]}
    return changed(events=[*EXAMPLE["events"][:2], select], best=last[0]) | {"nodes": nodes}


def test_the_headline_says_what_happened():
    text = Page(trace_page(EXAMPLE)).text
    assert "Answer 42 2 branches, 1 prefill, verification skipped because all that can win give the same answer" in text
    assert "2 of 2 candidates give this answer, 0.45 s." in text
    assert "Approximate" not in text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (dict(config={"verify": "never"}), "no verification asked for"),
        (dict(nodes=[{"verified": True}] * 2), "all 2 candidates verified"),
        (dict(nodes=[{"verified": True}], gates=[{"gate": "bound", "decision": "1 not asked"}]),
         "1 of 2 candidates verified (the others could not change the answer)"),
        (dict(gates=[{"gate": "skip", "decision": "nobody is asked"}]),
         "verification skipped because one branch leads decisively by confidence"),
        (dict(gates=[{"gate": "skip", "decision": "nobody is asked", "calibrated": False}]),
         "not verified, since one led by confidence; by thresholds that nobody tested on this model: skip."),
        (dict(nodes=[{"sharing": "semantic"}]), "Approximate: 1 branch runs on another wording's prefix"),
        (dict(nodes=[{"exit_layer": 7}] * 2), "2 verifications end before the last layer"),
        (dict(nodes=[{"finish_reason": "early_exit"}]), "1 branch was stopped while decoding"),
        (dict(nodes=[{"error": "logits are not finite"}]), "logits are not finite"),
        (dict(nodes=[{"parsed": None, "text": " who knows?"}], parsed=None), "Answer who knows?"),
        (dict(phrasings=["How much is 17 + 25?", [1, 2, 3]]), "token ids: 1 2 3"),
        (dict(problem=[4, 5, 6]), "token ids: 4 5 6"),
    ],
)  # fmt: skip
def test_the_page_says(values, said):
    assert said in Page(trace_page(changed(**values))).text


def test_a_gate_that_left_nothing_out_is_no_approximation():
    gates = [{"gate": "skip", "decision": "ask", "calibrated": False, "value": 0.01, "threshold": 0.06}]
    text = Page(trace_page(changed(gates=gates))).text
    assert "Approximate" not in text and "0.010" in text and "0.060" in text


def test_every_branch_is_there_in_full_and_every_link_has_a_place():
    page = Page(trace_page(tree(8, 3)))
    links = [attributes["href"] for name, attributes in page.elements if name == "a"]
    assert {link.removeprefix("#") for link in links} <= page.ids
    assert {f"branch-{k}" for k in range(24)} <= page.ids
    assert page.text.count("17 + 25 = 42.") >= 24
    assert len(page.with_class("node")) == 24 and len(page.with_class("ring")) == 2  # and one in the legend
    assert len([e for e in page.with_class("node") if "on" in e[1]["class"].split()]) == 3
    # Of 8, beam 2 went on in each of the two rounds before the last.
    assert len([e for e in page.with_class("node") if "pruned" in e[1]["class"].split()]) == 12


def test_a_wide_and_deep_tree_stays_narrow_and_its_parts_apart():
    page = Page(trace_page(tree(64, 4)))
    (svg,) = [a for name, a in page.elements if name == "svg" and a.get("role") == "group"]
    assert float(svg["width"]) < 900 and float(svg["height"]) < 1200
    # Shapes of one column do not touch.
    columns = {}
    for name, a in page.elements:
        if name == "circle" and "shape" in a["class"].split() and float(a["cx"]) > 60:  # the legend's are left of that
            columns.setdefault(a["cx"], []).append(float(a["cy"]))
    assert len(columns) == 4
    gaps = [b - a for ys in columns.values() for a, b in zip(sorted(ys), sorted(ys)[1:], strict=False)]
    assert min(gaps) > 2 * 6.5


def test_what_is_shared_is_told_by_shape_and_what_is_missing_by_words():
    page = Page(trace_page(changed(nodes=[{"sharing": "semantic"}, {"sharing": "none", "score": None}])))
    for meaning in ("another wording's prefix (approximate)", "nothing shared", "not asked about, no score"):
        assert meaning in page.text
    assert "prefix shared" not in page.text


def test_missing_keys_leave_out_what_they_would_have_said():
    bare = {"nodes": [{"id": 0}], "best": 0}
    assert "1 branch" in Page(trace_page(bare)).text
    node = dict(id=0, path=[0], score=math.nan, confidence=math.nan, signals={"tail": None})
    assert "nan" not in Page(trace_page({"nodes": [node], "best": 0, "stats": {"total_s": 0.0}})).text


NEEDED = {"trace": ("nodes", "best"), "nodes": ("id",), "events": ("event", "nodes"), "gates": ()}


@pytest.mark.parametrize("null", [False, True], ids=["missing", "null"])
@pytest.mark.parametrize("place", NEEDED)
def test_a_trace_of_an_older_version_makes_a_page(place, null):
    full = tree(3, 2) | {"gates": EXAMPLE["gates"]}
    for key in (full if place == "trace" else full[place][0]).keys() - {*NEEDED[place], "schema", "depth"}:
        old = copy.deepcopy(full)
        for part in [old] if place == "trace" else old[place]:
            part.update({key: None}) if null else part.pop(key, None)
        assert "For the record" in Page(trace_page(old)).text, key


@pytest.mark.parametrize(
    ("trace", "message"),
    [({}, "nodes and best"), ({**EXAMPLE, "schema": "x-9"}, "x-9"), ({**EXAMPLE, "best": 2}, "best=2")],
)
def test_what_is_no_trace_is_a_clear_error(trace, message):
    with pytest.raises(ConfigError, match=message):
        trace_page(trace)


def with_text(text):
    nodes = [dict.fromkeys(("text", "hint", "parsed", "error", "finish_reason"), text) for _ in range(2)]
    for node in nodes:
        node.update(tokens=[text], signals={text: 0.5})
    gates = [dict(gate=text, decision=text, reason=text)]
    more = dict(model=text, problem=text, phrasings=[text], parsed=text, versions={text: text}, gates=gates)
    return changed(nodes, agreement={"votes": {text: 2}}, **more)


def shape_of(page):
    """Names of elements, and of their attributes, in order: what a text must not change."""
    return [(name, sorted(attributes)) for name, attributes in page.elements]


PLAIN = shape_of(Page(trace_page(with_text("plain"))))


@given(st.one_of(st.text(min_size=1, max_size=60), st.text("<>&\"'/!-=`a ;\x00\r\n\u202e", min_size=1, max_size=30)))
def test_no_text_becomes_markup(text):
    page = trace_page(with_text("x" + text))
    page.encode("utf-8")
    assert shape_of(Page(page)) == PLAIN


@pytest.mark.parametrize("text", [EVIL, "]]><!-- -->", "&lt;b&gt;", "\ud800 \x00 \x1b[2J \u202e \x85"])
def test_hostile_text_is_shown_as_it_is_written(text):
    page = trace_page(with_text(text))
    seen = Page(page)
    assert shape_of(seen) == PLAIN
    if text.isprintable():
        assert " ".join(text.split()) in seen.text
    assert not set("\x00\x1b\u202e\x85") & set(page) and page.encode("utf-8")


def test_every_gate_is_explained_as_the_schema_does():
    gates = [{"gate": gate, "decision": "ask"} for gate in files.GATES]
    text = Page(trace_page(changed(gates=gates))).text
    said = files.TRACE_SCHEMA["properties"]["gates"]["items"]["properties"]["gate"]["description"].split("; ")
    assert len(said) == len(files.GATES)
    for gate in said:
        name, _, question = gate.partition(": ")
        assert f"{name} : ask {question}" in text


def test_a_long_text_is_cut_as_text():
    page = Page(trace_page(changed(problem="&<" * 500)))
    assert "&<" * 200 + "\u2026 all 1,000 characters" in page.text and "&<" * 500 in page.text


def test_the_page_asks_for_nothing_from_elsewhere():
    page = trace_page(EXAMPLE)
    assert not re.search(r"https?:|@import|url\(", page)
    elements = Page(page).elements
    sources = [v for _, attributes in elements for k, v in attributes.items() if k in ("src", "href")]
    assert all(source.startswith(("#", "data:")) for source in sources)
    (policy,) = [a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy
    assert page.count("<script") == page.count("<style") == 1 and 'style="' not in page
    assert files.SCRIPT in page and files.STYLE in page


def luminance(colour):
    if len(colour) == 4:
        colour = "#" + "".join(2 * c for c in colour[1:])
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [files._LIGHT, files._DARK], ids=["light", "dark"])
def test_contrast_is_enough_to_read(theme):
    colours = dict(re.findall(r"--(\w+):(#\w+)", theme))

    def contrast(one, other):
        dark, light = sorted(luminance(colours[name]) for name in (one, other))
        return (light + 0.05) / (dark + 0.05)

    for name in ("text", "quiet", "link", "mark"):
        for ground in ("ground", "raised"):
            assert contrast(name, ground) >= 4.5, (name, ground)
    assert contrast("text", "rule") >= 4.5  # every second token
    for name in ("outline", "line", "mark", "p0", "p1", "p2", "p3"):
        assert contrast(name, "ground") >= 3, name
    steps = [luminance(colours[f"q{k}"]) for k in range(5)]
    assert steps in (sorted(steps), sorted(steps, reverse=True))


def test_the_command_line_writes_what_the_ending_says(tiny_llama, tmp_path, capsys):
    folder = tiny_llama(tokenizer=True, chat=True, max_len=256)
    for name, begin in (("t.json", '{"schema":'), ("t.html", "<!doctype html>"), ("T.HTML", "<!doctype html>")):
        options = ["--model", folder, "--branches", 2, "--tokens-per-step", 4, "--kv-cache-bytes", "2MiB"]
        assert main([str(o) for o in ("2+2?", *options, "--trace", tmp_path / name)]) == 0
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(begin)
    capsys.readouterr()
    assert main(["x", "--branches", "2", "--trace", str(tmp_path / "t.txt")]) == 2
    error = capsys.readouterr().err
    assert "t.txt" in error and ".json" in error and ".html" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
@pytest.mark.parametrize("trace", [EXAMPLE, with_text(EVIL), tree(64, 4)], ids=["example", "hostile", "wide"])
def test_a_browser_shows_it_without_a_word_and_runs_nothing_of_a_branch(trace, tmp_path):
    (tmp_path / "page.html").write_text(trace_page(trace), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    )
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr
    assert "<title>gone" not in done.stdout
    assert done.stdout.count("<button") == 2  # made by the script, which its digest allows
