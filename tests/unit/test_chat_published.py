"""Templates in the manner of published ones render as in transformers, on conversations of every kind."""

import json
import shutil
from pathlib import Path

import pytest

from minirksc.errors import ChatTemplateError
from minirksc.text.chat_template import ChatTemplate
from minirksc.text.tokenizer import Tokenizer

CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA_3_1 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}{{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content.lstrip('\\n') }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

MISTRAL_V3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS][" }}
            {%- for tool in tools %}{{- tool | tojson }}{{- ", " if not loop.last else "]" }}{%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls|length > 0 %}
        {{- "[TOOL_CALLS][" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- "[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

MISTRAL_V7 = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ message['content'] }}[/SYSTEM_PROMPT]
    {%- elif message['role'] == 'user' %}[INST]{{ message['content'] }}[/INST]
    {%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
    {%- else %}{{ raise_exception('Only user, system and assistant roles are supported!') }}{%- endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""

GENERATION = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}\
{% endgeneration %}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}
{% endfor %}{{ strftime_now('%Y') | length }}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama-3.1": LLAMA_3_1,
    "qwen3": QWEN3,
    "mistral-v3": MISTRAL_V3,
    "mistral-v7": MISTRAL_V7,
    "gemma": GEMMA,
    "generation": GENERATION,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather <now> & 'here', auf Deutsch: schön.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(*names, **more):
    calls = [
        {"id": f"call{i:05}", "type": "function", "function": {"name": name, "arguments": {"city": "Köln", "n": i}}}
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "tool_calls": calls, **more}


def result(text, i=0):
    return {"role": "tool", "name": "weather", "content": text, "tool_call_id": f"call{i:05}"}


SYSTEM = {"role": "system", "content": " Be <brief> & kind.\n"}
CONVERSATIONS = {
    "one turn": [user("Hi there")],
    "several turns": [
        user(" a\n"),
        assistant("b "),
        user("日本 👩‍👧"),
        assistant("<think>\nhm\n</think>\n\nc"),
        user("d"),
    ],
    "system": [SYSTEM, user("a"), assistant("b"), user("c")],
    "ends with the assistant": [SYSTEM, user("a"), assistant("b")],
    "reasoning": [
        user("a"),
        assistant("b", reasoning_content="because"),
        user("c"),
        assistant("d", reasoning_content="x"),
    ],
    "empty texts": [user(""), assistant(""), user(" ")],
    "looks like a template": [user("{{ messages }} {% raw %} [/INST] <|im_end|> \\n")],
    "tool": [SYSTEM, user("Weather?"), call("weather"), result('{"t": 20.5}'), assistant("20 degrees"), user("Thanks")],
    "two tools": [user("Both?"), call("weather", "clock"), result("20"), result("noon", 1)],
    "tool call with text": [user("a"), call("weather", content="Let me see."), result("[1, 2]"), user("b")],
    # what templates may refuse
    "starts with the assistant": [assistant("a"), user("b")],
    "two of the user": [user("a"), user("b")],
    "system in the middle": [user("a"), SYSTEM, user("b")],
    "unknown role": [{"role": "critic", "content": "a"}],
    "id of the wrong length": [
        user("a"),
        {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f"}}]},
    ],
    "no arguments": [user("a"), {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
    "calls that are none": [user("a"), {"role": "assistant", "tool_calls": "f()"}],
}


@pytest.mark.oracle
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_what_transformers_renders(name, conversation):
    from transformers.utils.chat_template_utils import render_jinja_template

    source = TEMPLATES[name]
    messages = [{"content": "", **message} for message in CONVERSATIONS[conversation]]  # what an absent one is
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    given = [{}] + [{"enable_thinking": value} for value in (True, False) if "enable_thinking" in source]
    given += [{"date_string": "1 Jan 2030"}] * ("date_string" in source)
    for variables in given:
        for tools in (None, TOOLS) if "tools" in source else (None,):
            for prompted in (True, False):
                try:
                    [expected], _ = render_jinja_template(
                        [messages], tools=tools, chat_template=source, add_generation_prompt=prompted,
                        bos_token="<s>", eos_token="</s>", **variables,
                    )  # fmt: skip
                except Exception:
                    with pytest.raises(ChatTemplateError):
                        template.render(CONVERSATIONS[conversation], prompted, tools, variables)
                else:
                    assert template.render(CONVERSATIONS[conversation], prompted, tools, variables) == expected


@pytest.mark.parametrize("conversation", ["tool", "two tools", "tool call with text", "several turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_of_openai_clients_render_as_templates_expect_them(name, conversation):
    """Which form a template expects is that of the conversations here, compared with transformers above."""
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    sent = []
    for message in CONVERSATIONS[conversation]:
        nothing = {"content": None, "refusal": None, "audio": None, "function_call": None, "name": None}
        sent.append({**nothing, "tool_calls": [], **message} if message["role"] == "assistant" else message)
        if message.get("tool_calls"):
            calls = [{**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}} for c in
                     message["tool_calls"]]  # fmt: skip
            sent[-1] = {**sent[-1], "tool_calls": calls}
    in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} if m["content"] else m for m in sent]
    for messages in (sent, in_parts):
        try:
            expected = template.render(CONVERSATIONS[conversation])
        except ChatTemplateError:
            with pytest.raises(ChatTemplateError):
                template.render(messages)
        else:
            assert template.render(messages) == expected


@pytest.mark.oracle
@pytest.mark.parametrize("version", [3, 7])
def test_a_whole_chat_has_the_ids_of_mistral_common(tmp_path, version):
    mistral_common = pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct import normalize, request
    from mistral_common.tokens.tokenizers import instruct
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    if version == 3:
        source, normalizer, kind = MISTRAL_V3, normalize.InstructRequestNormalizer, instruct.InstructTokenizerV3
    else:
        source, normalizer, kind = MISTRAL_V7, normalize.InstructRequestNormalizerV7, instruct.InstructTokenizerV7
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", tmp_path / "tekken.json")
    (tmp_path / "chat_template.jinja").write_text(source)
    ours, theirs = Tokenizer.from_folder(tmp_path), kind(Tekkenizer.from_file(tmp_path / "tekken.json"))
    for name in ("one turn", "several turns", "system"):
        messages = [{**message, "content": message["content"].strip()} for message in CONVERSATIONS[name]]
        asked = normalizer.normalizer().from_chat_completion_request(request.ChatCompletionRequest(messages=messages))
        assert ours.encode_chat(messages) == theirs.encode_instruct(asked).tokens


def test_thinking_can_be_turned_off_and_tools_given():
    template = ChatTemplate(QWEN3, {})
    assert template.render([user("a")], variables={"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
    assert '"name": "weather"' in template.render([user("a")], tools=TOOLS)
    assert template.render([user("a")], tools=[]) == template.render([user("a")])


@pytest.mark.parametrize(
    ("tools", "variables", "message"),
    [
        (None, {"enable_thinkng": False}, "no use of 'enable_thinkng'"),
        (TOOLS, {}, "no use of 'tools'"),
        (None, {"tools": TOOLS}, "tools is an argument of its own"),
        (None, {"messages": []}, "messages is an argument of its own"),
        (None, {"_minirksc_guard": 1}, "no use of '_minirksc_guard'"),
        (None, [1], r"not \[1\]"),
    ],
)
def test_what_would_have_no_effect_is_refused(tools, variables, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(CHATML, {}).render([user("a")], True, tools, variables)


@pytest.mark.parametrize("tools", ["weather", {"name": "f"}, ["weather"], 5, [[]]])
def test_tools_are_a_list_of_objects(tools):
    with pytest.raises(ChatTemplateError, match="tools are a list of objects"):
        ChatTemplate(QWEN3, {}).render([user("a")], tools=tools)


def test_reasoning_goes_by_its_other_names_too():
    template = ChatTemplate("{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}", {})
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert template.render([assistant("a", **{name: "so"})]) == "so|so"


def test_folder_of_named_templates_as_transformers_writes_it(tmp_path, tiny_llama):
    for file in Path(tiny_llama(tokenizer=True)).iterdir():
        if file.suffix == ".json":
            shutil.copy(file, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "in settings"}))
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.render_chat([user("a")]) == "plain"
    assert tokenizer.render_chat([user("a")], tools=TOOLS) == "2 tools"
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ChatTemplateError, match="no default chat template, only tool_use"):
        Tokenizer.from_folder(tmp_path).render_chat([user("a")])


def test_special_tokens_under_any_name_are_variables(tmp_path, tiny_llama):
    shutil.copy(Path(tiny_llama(tokenizer=True)) / "tokenizer.json", tmp_path)
    names = {"bos_token": {"content": "<s>"}, "image_token": "<|im_start|>", "add_bos_token": True}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": "{{ bos_token }}{{ image_token }}{{ add_bos_token }}"}'
    )
    assert Tokenizer.from_folder(tmp_path).render_chat([user("a")]) == "<s><|im_start|>"
