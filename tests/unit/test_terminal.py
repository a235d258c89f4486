"""What leaves for a terminal cannot act there, and streams that fail do no harm."""

import errno
import io
import json
import os
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirksc.cli import output as cli_output
from minirksc.cli import terminal
from minirksc.cli.terminal import MAX_MESSAGE_LEN, is_terminal, note, say, show, visible
from minirksc.errors import MinirkscError

ACTING = [*range(9), *range(11, 32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
HOSTILE = "a\x1b]0;PWNED\x07\x1b[31m\r\x9b2J\x7f\u202eb\u2066\tc\n"


class Stream(io.StringIO):
    """A terminal, or what takes nothing."""

    def __init__(self, is_tty=False, error=None):
        super().__init__()
        self._is_tty, self._error = is_tty, error

    def isatty(self):
        return self._is_tty

    def flush(self):
        if self._error is not None:
            raise self._error


def acts(text):
    return any(ord(c) in ACTING for c in text)


@given(st.text(st.one_of(st.sampled_from([chr(code) for code in ACTING]), st.characters())))
def test_nothing_acts_and_all_else_stays(text):
    shown = visible(text)
    assert not acts(shown)
    assert "".join(c if ord(c) not in ACTING else f"\\u{ord(c):04x}" for c in text) == shown


@given(st.text(), st.text())
def test_json_keeps_its_meaning_and_does_not_act(key, value):
    text = cli_output.to_json({key: value, "x": HOSTILE})
    assert not acts(text) and json.loads(text) == {"x": HOSTILE, key: value} | ({"x": HOSTILE} if key == "x" else {})


@pytest.mark.parametrize("is_tty", [True, False])
@pytest.mark.parametrize("what", ["stream", "samples", "answer", "json"])
def test_a_models_text_is_shown_on_a_terminal_and_itself_in_a_pipe(what, is_tty, monkeypatch):
    out = Stream(is_tty)
    monkeypatch.setattr(sys, "stdout", out)
    if what == "stream":
        chunk = SimpleNamespace(text=HOSTILE, finish_reason="stop", token_ids=[1])
        cli_output.print_stream([chunk])
    elif what == "samples":
        outputs = [SimpleNamespace(index=0, finish_reason="stop", text=HOSTILE)]
        cli_output.print_samples(SimpleNamespace(outputs=outputs))
    elif what == "answer":
        branch = SimpleNamespace(
            score=None, verification=None, confidence=0.5, num_own_tokens=1, num_shared_tokens=1, sharing="exact",
            finish_reason="stop", parsed=HOSTILE, text=HOSTILE, token_ids=[1],
        )  # fmt: skip
        stats = dict.fromkeys(("total_s", "prefill_s", "decode_s", "verify_s"), 0.0)
        stats |= {"num_prefilled_tokens": 1, "num_decoded_tokens": 2}
        result = SimpleNamespace(branches=[branch], best=0, answer=HOSTILE, stats=stats, gates="", trace={"gates": []})
        cli_output.print_solve(result)
    else:
        cli_output.print_json({HOSTILE: HOSTILE})
    text = out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")  # the table's own
    if is_tty or what == "json":
        assert not acts(text) and ("\\u001b]0;PWNED\\u0007" in text)
    else:
        assert HOSTILE.strip() in text


def test_a_note_is_one_short_line_that_cannot_act(capsys):
    note(f"two\nlines{HOSTILE}" + "x" * 9_000_000)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and not acts(err.removesuffix("\n")) and "two lines" in err
    assert len(err) < MAX_MESSAGE_LEN + 60 and "more characters)" in err


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), BrokenPipeError(errno.EPIPE, "gone"), None])
def test_what_stdout_does_not_take_is_an_error(error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None if error is None else Stream(error=error))
    with pytest.raises(MinirkscError, match="standard output"):
        show("text")
    assert not is_terminal(None)


@pytest.mark.parametrize("stream", [None, Stream(error=OSError(errno.ENOSPC, "full"))])
def test_what_stderr_does_not_take_is_lost(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    note("text")
    say("text")


def test_a_closed_stream_is_no_terminal(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    assert not is_terminal(closed)
    with pytest.raises(MinirkscError, match="closed"):
        show("text")
    monkeypatch.setattr(sys, "stderr", closed)
    note("text")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_what_was_not_delivered_does_not_fail_again(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(MinirkscError, match="No space left"):
            show("text")
        full.flush()  # as the interpreter does at its end
    terminal.discard(None)
