"""Variables of chat templates, from LLM.chat and from the command line."""

import json
import shutil

import pytest

from minirksc import LLM, SamplingParams
from minirksc.cli.generate import main
from minirksc.errors import ChatTemplateError, ConfigError

TEMPLATE = "{{ bos_token }}{% if enable_thinking %}think {% endif %}{{ tools | length if tools else 0 }} "
TEMPLATE += "{{ messages[0].content }}{% if add_generation_prompt %} A:{% endif %}"
CHAT = [{"role": "user", "content": "hi"}]
GREEDY = SamplingParams(temperature=0, max_tokens=2)


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat_options") / "model"
    shutil.copytree(tiny_llama(tokenizer=True), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder) as llm:
        yield llm


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "0 hi A:"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "think 0 hi A:"),
        ({"chat_template_kwargs": {"enable_thinking": False}, "tools": [{}, {}]}, "2 hi A:"),
        ({"add_generation_prompt": False}, "0 hi"),
    ],
)
def test_chat_hands_variables_to_the_template(llm, options, expected):
    [out] = llm.chat(CHAT, GREEDY, **options)
    assert llm.decode(out.prompt_token_ids) == expected


def test_chat_refuses_what_would_have_no_effect(llm):
    with pytest.raises(ChatTemplateError, match="no use of 'enable_thinkng'"):
        llm.chat(CHAT, GREEDY, chat_template_kwargs={"enable_thinkng": False})
    with pytest.raises(TypeError, match="enable_thinking"):
        llm.chat(CHAT, GREEDY, enable_thinking=False)


def test_sampling_params_is_another_name_of_params(llm):
    branches = [llm.branch("hi") for _ in range(2)]
    llm.extend(branches[:1], GREEDY)
    llm.extend(branches[1:], sampling_params=GREEDY)
    assert branches[0].token_ids == branches[1].token_ids
    for call, prompt in ((llm.generate, "hi"), (llm.chat, CHAT)):
        [ours], [theirs] = call(prompt, GREEDY), call(prompt, sampling_params=GREEDY)
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids and len(ours.outputs[0].token_ids) == 2
    [*_, last] = llm.stream("hi", sampling_params=GREEDY)
    assert last.finish_reason == "length"
    for call, prompt in ((llm.generate, "hi"), (llm.chat, CHAT), (llm.stream, "hi"), (llm.extend, branches)):
        with pytest.raises(ConfigError, match="params and sampling_params are the same option"):
            call(prompt, GREEDY, sampling_params=GREEDY)


def run(capsys, folder, *arguments):
    code = main(["--model", str(folder), "--max-tokens", "1", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize(
    ("value", "expected"), [({"enable_thinking": True}, "think 0 hi A:"), ({"tools": [{}, {}]}, "2 hi A:")]
)
def test_the_option_reaches_prompts_and_batches(capsys, folder, llm, tmp_path, value, expected):
    option = ("--chat-template-kwargs", json.dumps(value))
    code, out, _ = run(capsys, folder, *option, "--json", "hi")
    assert code == 0 and llm.decode(json.loads(out)["prompt_token_ids"]) == expected
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    code, _, _ = run(capsys, folder, *option, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert code == 0 and llm.decode(record["prompt_token_ids"]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{"], "is not JSON"),
        (["[1]"], "is not a JSON object"),
        (['{"a": 1}', "--no-chat"], "--chat-template-kwargs does not go with --no-chat"),
        (['{"a": 1}', "--branches", "2"], "--chat-template-kwargs does not go with --branches"),
    ],
)
def test_wrong_usage_is_found_before_the_model_is_loaded(capsys, arguments, message):
    assert main(["--model", "no such folder", "--chat-template-kwargs", *arguments, "hi"]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_variable_fails(capsys, folder):
    code, out, err = run(capsys, folder, "--chat-template-kwargs", '{"enable_thinkng": false}', "hi")
    assert (code, out) == (1, "") and "no use of 'enable_thinkng'" in err


def test_the_environment_gives_it_too(capsys, folder, llm, monkeypatch):
    monkeypatch.setenv("MINIRKSC_CHAT_TEMPLATE_KWARGS", '{"enable_thinking": true}')
    code, out, _ = run(capsys, folder, "--json", "hi")
    assert code == 0 and llm.decode(json.loads(out)["prompt_token_ids"]) == "think 0 hi A:"


def test_it_needs_a_template(capsys, tiny_llama):
    code, _, err = run(capsys, tiny_llama(tokenizer=True), "--chat-template-kwargs", '{"a": 1}', "hi")
    assert code == 1 and "--chat-template-kwargs needs a chat template" in err
