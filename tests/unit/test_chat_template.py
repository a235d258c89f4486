"""Chat templates: what transformers renders, within limits."""

import json
import time

import pytest

from minirksc.chat_template import MAX_RENDER_S, ChatTemplate, load_chat_template
from minirksc.errors import ChatTemplateError

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
]


def render(source, messages=tuple(CHAT), **variables):
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(list(messages), **variables)


@pytest.mark.oracle
@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("prompted", [True, False])
def test_renders_what_transformers_renders(source, prompted):
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [CHAT], chat_template=source, add_generation_prompt=prompted, bos_token="<s>", eos_token="</s>", extra="x"
    )
    assert render(source, add_generation_prompt=prompted, extra="x") == expected[0]


def test_helpers():
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in messages[0].content * 9000 %}{% for b in messages[0].content * 9000 %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_loops_for_long_is_stopped(source):
    start = time.monotonic()
    with pytest.raises(ChatTemplateError, match="seconds"):
        render(source)
    assert time.monotonic() - start < 20 * MAX_RENDER_S  # it ended at all


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(10000) %}{{ 'x' * 100000 }}{% endfor %}", "characters"),
        ("{{ 'x' * 1000000000 }}", "repeats"),
        ("{{ [1] * 1000000000 }}", "repeats"),
        ("{{ 9 ** 9999999 }}", "power"),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ missing.attribute }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_cannot_do_harm(source, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(source)


def test_a_syntax_error_names_its_line():
    with pytest.raises(ChatTemplateError, match="line 2"):
        ChatTemplate("ok\n{% for %}", {})


@pytest.mark.parametrize("messages", [[], ["hi"], [{"content": "x"}], [{"role": "user", "content": 5}]])
def test_malformed_conversations(messages):
    with pytest.raises(ChatTemplateError, match=r"empty|message 0"):
        render("x", messages)


def test_all_places_where_a_template_can_be(tmp_path):
    def found(settings=()):
        template = load_chat_template(tmp_path, dict(settings))
        return template and template.render([{"role": "user", "content": "x"}])

    assert found() is None
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
