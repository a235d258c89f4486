"""Files of calibrated gates: what is refused and why, and what ties one to a model."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirksc import LLM, SamplingParams
from minirksc.engine.signals import SIGNALS
from minirksc.errors import ConfigError, MinirkscError
from minirksc.rksc.cgee import PAPER_GATES, Gates, Lead
from minirksc.rksc.exits import MarginRule
from minirksc.rksc.gates_file import (
    NUM_SAMPLES,
    SAMPLE_BYTES,
    GatesFile,
    checksum,
    fingerprint,
    model_differences,
    read_gates,
    read_gates_file,
    settings_of,
    write_gates,
)
from minirksc.rksc.solver import Solver, SolverConfig

GATES = Gates(
    signal="tail",
    skip=(Lead(gap=0.13),),
    layer_exit=MarginRule(3.5, 2, 4, ((0.5, -1.0), (1.0, 0.0))),
    decode_exit=(Lead(0.1, 0.2, is_relative=False),),
    decode_min_tokens=9,
    source="calibrated",
)
SETTINGS = {"branches": 8, "select": "vote", "hints": None}


@pytest.fixture()
def folder(tmp_path):
    """A checkpoint folder, as far as a fingerprint looks."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    write_weights(folder / "model.safetensors", bytes(1000))
    return folder


def write_weights(file, data):
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def made(folder, gates=GATES, **values):
    rest = {"budget": 0.01, "confidence": 0.95, "counts": {"problems": 600}, "data": {"sha256": "ab"}}
    rest |= {"settings": SETTINGS, "model": fingerprint(folder), "minirksc_version": "0"}
    return GatesFile(gates=gates, **{**rest, **values})


@pytest.fixture()
def path(folder, tmp_path):
    path = tmp_path / "gates.json"
    write_gates(path, made(folder))
    return path


leads = st.builds(Lead, st.floats(0, 1), st.floats(0, 1), st.booleans())


@given(
    st.builds(
        Gates,
        exact=st.booleans(),
        signal=st.sampled_from(sorted(SIGNALS)),
        skip=st.lists(leads, max_size=2).map(tuple),
        compares_answers=st.booleans(),
        layer_exit=st.none() | st.builds(MarginRule, st.floats(0, 50), st.integers(1, 9)),
        decode_exit=st.lists(leads, max_size=2).map(tuple),
        decode_min_tokens=st.integers(1, 99),
        source=st.just("calibrated"),
    )
)
def test_what_is_written_is_read(tmp_path_factory, gates):
    folder = tmp_path_factory.mktemp("model")
    write_weights(folder / "model.safetensors", b"1234")
    write_gates(folder / "gates.json", made(folder, gates))
    assert read_gates(folder / "gates.json", folder) == gates
    file = read_gates_file(folder / "gates.json", folder)
    assert (file.budget, file.confidence, file.counts, file.settings) == (0.01, 0.95, {"problems": 600}, SETTINGS)


def test_a_missing_file_says_how_to_make_one(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: there is no such file; make a new one with .*calibrate"):
        read_gates(tmp_path / "none.json", folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("[1]", "must hold a JSON object, not list"),
        ("{}", r"schema is None, expected 'minirksc\.gates'.*calibrate"),
        (
            '{"schema": "minirksc.gates", "schema_version": 99}',
            "schema_version is 99, this minirksc reads 1.*calibrate",
        ),
        ('{"schema": "minirksc.gates", "schema_version": 1}', "checksum is None.*calibrate"),
    ],
)
def test_other_files_are_refused(path, folder, text, message):
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_gates(path, folder)


def test_every_change_by_hand_is_noticed_and_another_layout_is_none(path, folder):
    content = json.loads(path.read_text())
    for change in (
        lambda c: c["gates"]["skip"][0].update(gap=0.01),
        lambda c: c["gates"].update(exact=False),
        lambda c: c.update(budget=0.001),
        lambda c: c["settings"].update(branches=4),
        lambda c: c["model"].update({"config.json": "0"}),
        lambda c: c.update(note="mine"),
        lambda c: c.update(checksum="0"),
    ):
        changed = json.loads(path.read_text())
        change(changed)
        other = path.with_name("changed.json")
        other.write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=r"changed after the calibration.*make a new one"):
            read_gates(other, folder)
    path.write_text(json.dumps(dict(reversed(content.items()))))
    assert read_gates(path, folder) == GATES


def test_a_file_without_a_field_is_refused_even_with_a_checksum(path, folder):
    content = json.loads(path.read_text())
    del content["checksum"], content["gates"]["signal"]
    content["checksum"] = checksum(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="signal"):
        read_gates(path, folder)


NO_NUMBERS = [None, True, "0.2", [], {}, [1], float("nan"), float("inf"), 10**400]
HOSTILE = [
    *[
        (("gates", place, 0, name), value)
        for place in ("skip", "decode_exit")
        for name in ("top", "gap")
        for value in NO_NUMBERS
    ],
    *[(("gates", "layer_exit", name), value) for name in ("margin", "patience") for value in NO_NUMBERS[:-1]],
    *[(("gates", "layer_exit", "correction", 0, 1), value) for value in NO_NUMBERS],
    *[(("gates", "decode_min_tokens"), value) for value in (*NO_NUMBERS[:-1], -1, 1.5)],
    *[
        (("gates", name), value)
        for name in ("skip", "decode_exit")
        for value in (None, 5, "x", {}, [5], [{}], [{"gap": 0.1}])
    ],
    *[(("gates", name), value) for name in ("exact", "compares_answers") for value in (None, 1, "true", [])],
    *[(("gates", "signal"), value) for value in (None, "best", [], {}, 5)],
    *[(("gates", "layer_exit"), value) for value in (5, "x", [], {}, [[1, 2]])],
    *[(("gates", "layer_exit", "correction"), value) for value in (5, "x", {}, [5], [[1]], [[1, 2, 3]])],
    *[((name,), value) for name in ("budget", "confidence") for value in (*NO_NUMBERS, 0, 1, -1)],
    *[
        ((name,), value)
        for name in ("model", "counts", "data", "settings", "gates")
        for value in (None, 5, "x", [], [[1, 2]])
    ],
    *[(("model", "config.json"), value) for value in (None, 5, [], {})],
    *[(("minirksc_version",), value) for value in (None, 5, [])],
]


def test_no_value_of_another_kind_comes_in_even_with_a_checksum(path, folder):
    whole = path.read_text()
    for place, value in HOSTILE:
        content = json.loads(whole)
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        del content["checksum"]
        path.write_text(json.dumps({**content, "checksum": checksum(content)}))
        with pytest.raises(ConfigError, match="gates ") as caught:
            read_gates(path, folder)
        assert len(str(caught.value)) < 1000, place


@pytest.mark.parametrize(
    "raw", [b"", b"\xff\xfe{}", b"[" * 10**5, b" " * (16 * 2**20 + 1), b'{"schema": "' + b"x" * 10**6 + b'"}']
)
def test_what_is_no_json_of_this_size_is_refused_in_few_words(path, folder, raw):
    path.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        read_gates(path, folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["/dev/zero", "\0", "x" * 5000, ""])
def test_what_is_no_file_is_refused(folder, name):
    with pytest.raises(ConfigError):
        read_gates(name, folder)


def test_another_model_is_refused_and_named(path, folder):
    (folder / "tokenizer.json").write_text('{"a": 2}')
    with pytest.raises(ConfigError, match=r"another model than .*model: tokenizer\.json has SHA-256 .*, expected "):
        read_gates(path, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        read_gates(path, folder)


def test_a_moved_model_is_the_same(path, folder, tmp_path):
    assert read_gates(path, folder.rename(tmp_path / "elsewhere")) == GATES


def test_settings_that_differ_make_gates_uncalibrated_and_are_named(path, folder):
    assert read_gates(path, folder, dict(SETTINGS)).is_calibrated
    gates = read_gates(path, folder, {**SETTINGS, "branches": 4})
    assert (gates.source, gates.is_calibrated) == ("uncalibrated", False)
    assert (gates.skip, gates.layer_exit) == (GATES.skip, GATES.layer_exit)
    file = read_gates_file(path, folder)
    assert file.differences(SETTINGS) == []
    assert file.differences({**SETTINGS, "branches": 4, "new": 1}) == [
        "branches is 4, but the gates were calibrated with 8",
        "new is 1, but the gates were calibrated with None",
    ]


def test_weights_differ_wherever_a_sample_looks(folder):
    data = bytearray(3 * NUM_SAMPLES * SAMPLE_BYTES)
    write_weights(folder / "model.safetensors", bytes(data))
    before = fingerprint(folder)
    for place in (0, len(data) - 1, len(data) // (NUM_SAMPLES - 1)):
        changed = bytearray(data)
        changed[place] = 1
        write_weights(folder / "model.safetensors", bytes(changed))
        assert "model.safetensors" in model_differences(before, fingerprint(folder))[0]
    write_weights(folder / "model.safetensors", bytes(len(data) + 1))
    assert model_differences(before, fingerprint(folder))
    write_weights(folder / "model.safetensors", bytes(data))
    assert model_differences(before, fingerprint(folder)) == []


def test_small_weights_are_read_whole(folder):
    before = fingerprint(folder)
    for place in range(0, 1000, 37):
        data = bytearray(1000)
        data[place] = 1
        write_weights(folder / "model.safetensors", bytes(data))
        assert model_differences(before, fingerprint(folder))


def test_a_folder_without_weights_has_no_fingerprint(tmp_path):
    with pytest.raises(ConfigError, match="safetensors"):
        fingerprint(tmp_path)


def test_what_cannot_be_calibrated_or_written_is_a_clear_error(folder, tmp_path):
    with pytest.raises(ConfigError, match="MarginRule"):
        write_gates(tmp_path / "gates.json", made(folder, PAPER_GATES))
    with pytest.raises(MinirkscError, match="cannot be written"):
        write_gates(tmp_path / "none" / "gates.json", made(folder))
    assert not (tmp_path / "gates.json").exists()


def test_the_solver_takes_a_file_and_says_when_it_does_not_hold(tiny_llama, tmp_path):
    folder = tiny_llama(chat=True)
    path = tmp_path / "gates.json"
    with LLM(folder, kv_cache_bytes="2MiB") as llm:
        config = SolverConfig(branches=3, tokens_per_step=4, gates=path)
        write_gates(path, made(folder, settings=settings_of(config, llm)))
        result = Solver(llm, config).solve("How many?")
        assert result.gates == "calibrated"
        assert Solver(llm, SolverConfig(branches=2, tokens_per_step=4, gates=path)).gates.source == "uncalibrated"
        seeded = SolverConfig(branches=3, tokens_per_step=4, gates=path, sampling=SamplingParams(seed=9))
        assert Solver(llm, seeded).gates.source == "uncalibrated"  # other temperature
        hot = SamplingParams(temperature=0.8, top_p=0.95, seed=9)
        same = SolverConfig(branches=3, tokens_per_step=4, gates=path, sampling=hot, sharing="none")
        assert Solver(llm, same).gates.source == "calibrated"  # neither the seed nor exact sharing matters
    with (
        LLM(tiny_llama(chat=True, seed=5), kv_cache_bytes="2MiB") as other,
        pytest.raises(ConfigError, match="another"),
    ):
        Solver(other, config)
