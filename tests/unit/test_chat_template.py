"""Chat templates: what transformers renders, within limits."""

import json
import threading
import time

import pytest

from minirksc import template_sandbox
from minirksc.chat_template import ChatTemplate, load_chat_templates
from minirksc.errors import ChatTemplateError
from minirksc.template_sandbox import MAX_CHARS, MAX_RENDER_S

NESTED = "{% for i in range(100000) %}{% for j in range(100000) %}"
CHAT = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
]
TEMPLATES = [
    "{% for m in messages %}{{ m.role }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
    "{{ bos_token }}{%- for m in messages %}{%- if loop.first and m.role == 'system' %}[S]{{ m.content | trim }}"
    "{%- elif loop.last %}[L{{ loop.index }}/{{ loop.length }}]{{ m.content }}{% else %}({{ m.content }}){%- endif %}"
    "{% endfor %}{{ eos_token }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}\n    {% set ns.n = ns.n + m.content | length %}\n"
    "    {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}{% endif %}\n"
    "{{ ns.n }}\n{% endfor %}",
    "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {% if tools %}{{ tools }}{% endif %}{{ extra }}",
    "{% macro show(m) %}<{{ m.role[0:2] }}>{{ m.content.split(' ') | join('_') }}{% endmacro %}"
    "{% for m in messages[1:] %}{{ show(m) }}{% endfor %}",
    "{% for m in messages %}{% for k, v in m.items() %}{{ k ~ '=' ~ v }}{{ ', ' if not loop.last }}"
    "{% endfor %}\n{% endfor %}"
    "{% filter upper %}shout{% endfilter %}{{ '%s-%03d' % ('a', 7) }}{{ '{:>5}'.format('x') }}{{ [1, 2] + [3] }}"
    "{{ dict(a=1) }}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}{% for i in range(9) %}"
    "{% if i == 3 %}{% break %}{% endif %}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('a', 'b') }}{% endfor %}",
]


def render(source, messages=tuple(CHAT), add_generation_prompt=True, tools=None, **variables):
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(list(messages), add_generation_prompt, tools, variables)


@pytest.mark.oracle
@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("prompted", [True, False])
def test_renders_what_transformers_renders(source, prompted):
    from transformers.utils.chat_template_utils import render_jinja_template

    extra = {"extra": "x"} if "extra" in source else {}
    expected, _ = render_jinja_template(
        [CHAT], chat_template=source, add_generation_prompt=prompted, bos_token="<s>", eos_token="</s>", **extra
    )
    assert render(source, add_generation_prompt=prompted, **extra) == expected[0]


def test_helpers():
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        NESTED + "{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) recursive %}{% if loop.depth < 9 %}{{ loop(range(90000)) }}{% endif %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in messages[0].content * 9000 %}{% for b in messages[0].content * 9000 %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{{ range(100000) | map('abs') | sum }}{% endfor %}",
    ],
)
def test_a_template_that_runs_for_long_is_stopped(source, monkeypatch):
    if not source.startswith(NESTED):
        monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.2)
    limit_s = template_sandbox.MAX_RENDER_S
    ends = []

    def run():  # in a thread that is not the main one, so without signals
        try:
            render(source)
        except ChatTemplateError as error:
            ends.append((str(error), time.thread_time()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    [(message, cpu_s)] = ends
    assert f"more than {limit_s} seconds" in message
    assert cpu_s < limit_s + 1


DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = DOUBLED %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(10000) %}{{ 'x' * 100000 }}{% endfor %}", "wrote more than"),
        ("{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}{{ x | length }}", "passing"),
        ("{% macro f() %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endmacro %}{{ f() }}", "passing"),
        (DOUBLING.replace("DOUBLED", "ns.x + ns.x"), "value of more"),
        (DOUBLING.replace("DOUBLED", "ns.x ~ ns.x"), "value of more"),
        (DOUBLING.replace("DOUBLED", "[ns.x, ns.x]"), "value of more"),
        (DOUBLING.replace("DOUBLED", "{'a': ns.x, 'b': ns.x}"), "value of more"),
        (DOUBLING.replace("DOUBLED", "(ns.x, ns.x)"), "value of more"),
        (DOUBLING.replace("DOUBLED", "ns.x | replace('a', 'aa')"), "passing|replaces|value"),
        (DOUBLING.replace("'ab'", "7").replace("DOUBLED", "ns.x * ns.x"), "number"),
        ("{{ 'x' * 1000000000 }}", "repeats"),
        ("{{ [1] * 1000000000 }}", "repeats"),
        ("{{ 9 ** 9999999 }}", "power"),
        ("{{ 'x' | center(1000000000) }}", "pads"),
        ("{{ 'x'.ljust(1000000000) }}", "pads"),
        ("{{ (1).to_bytes(10000000000, 'big') }}", "pads"),
        ("{{ '%1000000000d' % 1 }}", "width"),
        ("{{ '%*d' | format(1000000000, 1) }}", "width"),
        ("{{ '{:1000000000}'.format(1) }}", "width"),
        ("{{ '{:{}}'.format(1, 1000000000) }}", "width"),
        ("{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}", "replaces"),
        ("{{ ('b' * 1000000).join(range(100000) | map('string')) }}", "joins"),
        ("{{ range(100000) | map('string') | join('b' * 1000000) }}", "joins"),
        ("{{ range(100000) | map('string') | map('center', 1000000) | list }}", "passing"),
        (
            "{% set ns = namespace(x='') %}{% set l = [ns] * 10000 %}{% set ns.x = 'x' * 5000000 %}"
            "{{ l | map(attribute='x') | join }}",
            "value of more",
        ),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{{ lipsum(n=1000000) }}", "undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% set ns = namespace(__class__=1) %}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__html__ = 1 %}", "SecurityError|error"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ missing.attribute }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "raised"),
        ("{% set _minirksc_guard = 1 %}", "reserved"),
        ("{% macro f(_minirksc_guard) %}{% endmacro %}", "reserved"),
        ("{{ _minirksc_guard.tick }}", "reserved"),
        ("x" * 1_000_001, "1000001 characters"),
    ],
)
def test_a_template_cannot_do_harm(source, message):
    start = time.thread_time()
    with pytest.raises(ChatTemplateError, match=message):
        render(source)
    assert time.thread_time() - start < 2 * MAX_RENDER_S


def test_a_limit_is_of_one_rendering():
    template = ChatTemplate("{{ messages[0].content }}", {})
    for _ in range(40):
        assert len(template.render([{"role": "user", "content": "x" * (MAX_CHARS - 1)}])) == MAX_CHARS - 1


def test_a_syntax_error_names_its_line():
    with pytest.raises(ChatTemplateError, match="line 2"):
        ChatTemplate("ok\n{% for %}", {})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ("hi", "list of"),
        ({"role": "user", "content": "hi"}, "list of"),
        (["hi"], "message 0 is 'hi'"),
        ([*CHAT, {"content": "x"}], "message 4 is"),
        ([{"role": "user", "content": 5}], "content of message 0 is 5"),
        ([{"role": "user"}], r"message 0 \(user\) has no content"),
        ([{"role": "user", "content": None}], r"message 0 \(user\) has no content"),
        ([{"role": "user", "content": ["hi"]}], "message 0 has the part 'hi'"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "image.*only"),
        ([{"role": "user", "content": "x", "extra": threading}], "plain data only, not module"),
    ],
)
def test_malformed_conversations(messages, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate("x", {}).render(messages)


def test_contents_in_parts():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat = [{"role": "user", "content": parts}]
    assert render("{{ messages[0].content }}", chat) == "one\ntwo"
    looping = "{% for m in messages %}{% for part in m['content'] %}{{ part.text }}|{% endfor %}{% endfor %}"
    assert render(looping, chat) == "one|two|"
    by_macro = "{% macro f(content) %}{% for p in content %}{{ p.text }}|{% endfor %}{% endmacro %}"
    assert render(by_macro + "{{ f(messages[0].content) }}", chat) == "one|two|"


def test_an_absent_content_is_not_shown_as_none():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert render("{{ messages[0].content or messages[0].tool_calls[0].name }}", [call]) == "f"
    assert render("{{ 'content' in messages[0] }}", [call]) == "False"


def test_a_template_changes_nothing_of_the_callers(tmp_path):
    chat = [{"role": "user", "content": "x", "extra": {"a": [1]}}]
    with pytest.raises(ChatTemplateError):
        render("{{ messages[0].extra.a.append(2) }}", chat)
    render("{% set m = messages[0] %}{{ m.update }}", chat)
    assert chat == [{"role": "user", "content": "x", "extra": {"a": [1]}}]


def test_all_places_where_a_template_can_be(tmp_path):
    def found(settings=()):
        templates = load_chat_templates(tmp_path, dict(settings))
        return templates and templates["default"].render([{"role": "user", "content": "x"}])

    assert found() == {}
    assert found({"chat_template": "in settings"}) == "in settings"
    assert found({"chat_template": [{"name": "default", "template": "named"}]}) == "named"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "in json"}))
    assert found({"chat_template": "in settings"}) == "in json"
    (tmp_path / "chat_template.jinja").write_text("in jinja {{ eos_token }}")
    assert found({"eos_token": {"content": "</s>"}}) == "in jinja </s>"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ChatTemplateError, match="cannot be read"):
        found()
    (tmp_path / "chat_template.json").unlink()
    with pytest.raises(ChatTemplateError, match="cannot be read"):
        found({"chat_template": ["x"]})
    with pytest.raises(ChatTemplateError, match="not text but int"):
        found({"chat_template": 5})
