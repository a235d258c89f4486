"""Chat templates: what transformers renders, within limits."""

import enum
import json
import os
import threading
import time

import pytest

from minirksc.errors import ChatTemplateError
from minirksc.text import template_guard
from minirksc.text.chat_template import ChatTemplate, load_chat_templates
from minirksc.text.template_guard import MAX_CHARS, MAX_RENDER_S

NESTED = "{% for i in range(100000) %}{% for j in range(100000) %}"
LOOP_OVER_TEXT = "{% for m in messages %}{% for part in m.content %}{% endfor %}{% endfor %}"
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


class Role(str, enum.Enum):  # noqa: UP042
    USER = "user"


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
        LOOP_OVER_TEXT + NESTED + "{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_runs_for_long_is_stopped(source, monkeypatch):
    if not source.startswith(NESTED):
        monkeypatch.setattr(template_guard, "MAX_RENDER_S", 0.2)
    limit_s = template_guard.MAX_RENDER_S
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


DAGS = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
DAGS += "{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
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
        ("{{ (1).to_bytes(10000000000, 'big') }}", "SecurityError"),
        ("{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}", "SecurityError"),
        ("{{ 15 | round(-1000000000) }}", "rounds"),
        ("{{ 15 | round(precision=-1e300) }}", "rounds"),
        ("{{ ('1' * 1000000) | replace(1, 'b' * 1000000) }}", "replaces"),
        ("{{ ('a' * 1000000) | replace(new='b' * 1000000, old='a') }}", "replaces"),
        ("{% set x = 'x' * 9000000 %}{{ (x" + " ~ x" * 1000 + ") | length }}", "value of more"),
        ("{% set x = 'x' * 9000000 %}" + "{% set y = x[1:] %}" * 100, "passing"),
        ("{% set x = [1] * 100000 %}" + "{% set y = x[1:] %}" * 900, "passing"),
        ("{{ ('a' * 5000000).rfind('b' ~ 'a' * 2500000) }}", "searches"),
        ("{{ ('a' * 5000000).strip('b' * 5000000 ~ 'a') }}", "searches"),
        ("{{ ('a' * 5000000) | trim('b' * 5000000 ~ 'a') }}", "searches"),
        ("{{ ('a' * 5000000) | list | length }}", "one by one"),
        ("{{ ('ab' * 5000000).split('a') | length }}", "list of more"),
        ("{{ ('a ' * 5000000).split() | length }}", "list of more"),
        ("{{ ('{0}' * 3000).format('x' * 1000000) }}", "value of more"),
        ("{{ ('%(a)s' * 1900) | format(a='x' * 1000000) }}", "value of more"),
        ("{{ ('%(' * 4000000) % {} }}", "formats"),
        ("{{ '%.999999999f' % 1.0 }}", "formats"),
        ("{{ ([1] * 100000) | tojson(separators=('x' * 1000000, ':')) }}", "blanks a step"),
        ("{{ [[1]] | tojson(indent=1000) }}", "blanks a step"),
        (
            "{% set ns = namespace(x=[1] * 100000) %}{% for i in range(900) %}{% set ns.x = [ns.x] %}{% endfor %}"
            "{{ ns.x | tojson(indent=16) | length }}",
            "nested more than 64",
        ),
        (DAGS + "{{ ns.x == ns.y }}", "value of more"),
        (DAGS + "{{ ns.x is eq(ns.y) }}", "value of more"),
        (DAGS + "{{ [ns.x].index(ns.y) }}", "value of more"),
        (DAGS + "{{ [ns.x] | select('eq', ns.y) | list | length }}", "value of more"),
        (DAGS + "{{ [ns.x, ns.y] | max | length }}", "value of more"),
        (DAGS + "{{ raise_exception(ns.x) }}", "value of more"),
        (
            "{% set ns = namespace() %}{% set ns.s = ns %}{{ [ns] | map(attribute='s' ~ '.s' * 100000) | list }}",
            "path of attributes",
        ),
        ("{{ strftime_now('%c' * 1000) }}", "date in 2000 characters"),
        ("{{ ('1' * 5000000) | int(base=2) }}", "number that is too large"),
        ("{{ 'x' | wordwrap(1) }}", "No filter named 'wordwrap'"),
        ("{{ 10 ** 10 ** 8 }}", "power"),
        ("{% autoescape 10 ** 10 ** 8 %}{% endautoescape %}", "has no use for"),
        ("{{ [" + "1," * 90_000 + "] }}", "words and signs"),
        ("{{ " + "[" * 1000 + "]" * 1000 + " }}", "recursion"),
        ("{{ 1" + " + 1" * 9000 + " }}", "nested more than 100 deep"),
        ("{{ " + "1" * 100_000 + " }}", "digits"),
        ("{% if 0 %}" + "{% elif 0 %}" * 3900 + "{% endif %}", "recursion"),
        ("{{ '%1000000000d' % 1 }}", "width"),
        ("{{ '%*d' | format(1000000000, 1) }}", "width"),
        ("{{ '{:1000000000}'.format(1) }}", "width"),
        ("{{ '{:{}}'.format(1, 1000000000) }}", "width"),
        ("{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}", "replaces"),
        ("{{ ('b' * 100000).join(range(1000) | map('string')) }}", "joins"),
        ("{{ range(100000) | map('string') | join('b' * 1000000) }}", "joins"),
        ("{{ range(100000) | map('string') | map('center', 10000) | list }}", "passing"),
        ("{{ 'x' | center(10001) }}", "pads"),
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
        ("{% include 'x' %}", "no use for 'include'"),
        ("{% set _minirksc_guard = 1 %}", "reserved"),
        ("{% macro f(_minirksc_guard) %}{% endmacro %}", "reserved"),
        ("{{ _minirksc_guard.tick }}", "reserved"),
        ("x" * 200_001, "200001 characters"),
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
        ([{"role": "user", "content": None, "name": "x"}], r"message 0 \(user\) has no content"),
        ([{"role": "tool", "tool_call_id": "1"}], r"message 0 \(tool\) has no content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], r"message 0 \(assistant\) has no content"),
        ([{"role": "assistant", "audio": {"id": "1"}}], "message 0 holds audio"),
        ([{"role": "user", "content": ["hi"]}], "message 0 has the part 'hi'"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "image.*only"),
        ([{"role": "user", "content": "x", "extra": threading}], "plain data only, not module"),
    ],
)
def test_malformed_conversations(messages, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate("x", {}).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x'.upper }}",
        "{{ range }}",
        "{{ [messages[0].items] | string }}",
        "{{ messages | join(attribute='items') }}",
        "{{ messages | map(attribute='items') | list }}",
        "{{ messages[0][raise_exception].x }}",
        "{{ [].index(raise_exception) }}",
        "{{ 'a' ~ range }}",
        "{{ 'x' | map('upper') }}",
        "{{ {raise_exception: 1} }}",
        "{{ '%s' % range }}",
        "{{ '{}'.format(range) }}",
        "{{ '{0.upper}'.format('x') }}",
        "{{ raise_exception(range) }}",
        "{{ joiner(',') }}{{ cycler(1) }}",
        "{{ messages | groupby('items') }}",
        "{{ 'x' | default(range) }}{{ none | default(range, true) }}",
        "{% for m in messages %}{{ loop }}{% endfor %}",
        "{% macro f() %}{% endmacro %}{{ f }}",
    ],
)
def test_what_is_no_data_cannot_be_shown(source):
    with pytest.raises(ChatTemplateError) as raised:
        render(source)
    assert " at 0x" not in str(raised.value)


def test_errors_are_short():
    with pytest.raises(ChatTemplateError) as raised:
        render("{{ raise_exception('x' * 1000000) }}")
    assert len(str(raised.value)) < 1000
    with pytest.raises(ChatTemplateError) as raised:
        render("{{ messages[0]['x' * 1000000].y }}")
    assert len(str(raised.value)) < 1000


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
LOOP = "{% for part in m.content %}{{ part.text }}|{% endfor %}"
IN_PARTS = {
    "{{ m.content }}": "one\ntwo",
    "{{ m.content | trim }}": "one\ntwo",
    "{{ m.role + m.content }}": "ROLEone\ntwo",
    "{{ m.content.strip() }}": "one\ntwo",
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | tojson }}{% endif %}": "one\ntwo",
    LOOP: "one|two|",
    "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}": "one|two|",
    "{% macro f(c) %}{% for p in c %}{{ p.text }}|{% endfor %}{% endmacro %}{{ f(m['content']) }}": "one|two|",
    "{{ m.content | map(attribute='text') | join('+') }}": "one+two",
    "{{ m.content[0].text }}{{ m.content[1]['text'] }}": "onetwo",
    "{% for part in m.content %}{{ part }}{% endfor %}": "onetwo",  # shows parts for which it was not written
    "{% for p in m.content if p.type == 'image' %}{% endfor %}{{ m.content }}": "one\ntwo",
    "{% for p in m.content if p.type == 'image' %}{% endfor %}{{ m.content | tojson }}": '"one\\ntwo"',
}


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize("shown", IN_PARTS)
def test_contents_in_parts(shown, role):
    source = "{% for m in messages %}" + shown + "{% endfor %}"
    expected = IN_PARTS[shown].replace("ROLE", role)
    assert render(source, [{"role": role, "content": PARTS}]) == expected
    if "[0]" not in shown:
        assert "one" in render(source, [{"role": role, "content": "one"}])  # text is not lost in a loop over parts


def test_each_content_has_the_form_that_its_place_wants():
    source = "{{ messages[0].content | trim }};{% for part in messages[1].content %}{{ part.text }}|{% endfor %}"
    chat = [{"role": "system", "content": PARTS}, {"role": "user", "content": PARTS}]
    assert render(source, chat) == "one\ntwo;one|two|"
    assert render(source, [{**message, "content": "o"} for message in chat]) == "o;o|"


CALL = "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
CALL_TEMPLATES = {
    "tojson": CALL + "{{ c.function.arguments | tojson }}{% endfor %}",
    "either": CALL + "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
    "{{ c.function.arguments | tojson }}{% endif %}{% endfor %}",
    "text": CALL + "{{ '' + c.function.arguments + '' }}{% endfor %}",
    "shown": CALL + "{{ c.function.arguments }}{% endfor %}",
    "joined": CALL + "{{ '' ~ c.function.arguments }}{% endfor %}",
}


@pytest.mark.parametrize("arguments", [{"city": "Köln", "n": [1, None]}, '{"city": "Köln", "n": [1, null]}'])
@pytest.mark.parametrize("call", ["tool_calls", "function_call"])
@pytest.mark.parametrize("kind", CALL_TEMPLATES)
def test_a_call_is_rendered_as_the_template_was_written(kind, call, arguments):
    """The text of the arguments, once encoded, whichever form they come in."""
    function = {"name": "f", "arguments": arguments}
    calls = {"tool_calls": [{"id": "1", "type": "function", "function": function}], "function_call": function}
    source = "{% for m in messages %}" + CALL_TEMPLATES[kind] + "{% endfor %}"
    for content in ({}, {"content": None}, {"content": ""}, {"content": []}):
        message = {"role": "assistant", **content, "refusal": None, "audio": None, "function_call": None}
        assert render(source, [message | {call: calls[call]}]) == 'f{"city": "Köln", "n": [1, null]}'


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("", "{}"), ("{", '"{"'), ("[1]", '"[1]"'), ("[" * 100_000, None), ("9" * 5000, None), ('{"a": 1}', '{"a": 1}')],
)
def test_arguments_that_are_no_object_stay_text(arguments, expected):
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    shown = render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", [message])
    assert shown == (json.dumps(arguments) if expected is None else expected)


@pytest.mark.parametrize(
    ("message", "source", "expected"),
    [
        ({"role": "assistant", "content": None, "refusal": "No."}, "{{ messages[0].content }}", "No."),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "{{ messages[0].content }}", "No."),
        ({"role": "assistant", "content": "a", "tool_calls": []}, "{{ 'tool_calls' in messages[0] }}", "False"),
        ({"role": "developer", "content": "a"}, "{{ messages[0].role }}", "system"),
        ({"role": "developer", "content": "a"}, "{{ messages[0].role == 'developer' }}", "True"),
        ({"role": "tool", "content": PARTS, "tool_call_id": "7", "name": "f"}, "{{ messages[0].tool_call_id }}", "7"),
        ({"role": "user", "content": "a", "name": None}, "{{ messages[0].name is defined }}", "False"),
        ({"role": Role.USER, "content": "a"}, "{{ messages[0].role }}", "user"),
    ],
)
def test_fields_of_openai_clients(message, source, expected):
    assert render(source, [message]) == expected


def test_a_content_that_is_not_there_is_empty():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert render("{{ messages[0].content or messages[0].tool_calls[0].name }}", [call]) == "f"
    assert render("{{ messages[0].content + '!' }}", [call]) == "!"


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
    with pytest.raises(ChatTemplateError, match="is not readable JSON"):
        found()
    (tmp_path / "chat_template.json").unlink()
    for wrong in (5, ["x"], [{"name": 5, "template": "x"}], [{"name": "default"}], {"default": 5}, [[["x"]]]):
        with pytest.raises(ChatTemplateError, match=r"tokenizer_config\.json has a chat template that is"):
            found({"chat_template": wrong})


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "additional_chat_templates/x.jinja"])
def test_only_regular_files_of_a_sensible_size_are_read(tmp_path, name):
    (tmp_path / "additional_chat_templates").mkdir()
    file = tmp_path / name
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        make(file)
        with pytest.raises(ChatTemplateError, match=r"no regular file|cannot be read"):
            load_chat_templates(tmp_path, {})
        file.rmdir() if file.is_dir() else file.unlink()
    file.touch()
    os.truncate(file, 20 << 30)
    with pytest.raises(ChatTemplateError, match=f"{20 << 30} bytes"):
        load_chat_templates(tmp_path, {})
