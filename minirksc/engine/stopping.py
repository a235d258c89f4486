"""When a generation ends, and which of its text may be shown.

Text that could be the beginning of a stop string is held back until the next token decides, and so is half a
character (by the detokenizer), so that what was shown is never taken back.
"""

from minirksc.options import SamplingParams
from minirksc.text.tokenizer import Detokenizer


class StopChecker:
    """Follows one generation token by token.

    Args:
        params: sampling parameters, with max_tokens set.
        eos_token_ids: tokens that end it, unless params.ignore_eos.
        detokenizer: what makes text of tokens; None: token ids only, text stays empty.

    Attributes:
        finish_reason: "stop" or "length" once it has ended.
        stop_reason: the stop string or the stop token id that ended it; None for EOS and length.
        text: final text so far; whole once it has ended.
        pieces: parts of the text, as they were given out.
        detokenizer: the argument, in its state after the last token.
        num_provisional: characters at the end of the text that stand for half a character: another generation that
            goes on from here may complete it.
    """

    def __init__(
        self,
        params: SamplingParams,
        eos_token_ids: frozenset[int],
        detokenizer: Detokenizer | None,
    ) -> None:
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._params = params
        self._eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self.detokenizer = detokenizer
        self.pieces: list[str] = []
        self.num_provisional = 0
        self._stops = tuple(params.stop)
        self._longest = max(map(len, self._stops), default=0)
        self._num_tokens = 0
        self._held = ""  # final text that was not given out: every stop string to come begins in it
        # Characters of the held text in which no stop string may end. With stop "ab" and the text "xa": "x" is given
        # out, "a" is held, for "b" may follow.
        self._num_decided = 0

    @property
    def text(self) -> str:
        """Text that has been given out."""
        return "".join(self.pieces)

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that it makes safe to show."""
        assert self.finish_reason is None
        self._num_tokens += 1
        may_stop = self._num_tokens > self._params.min_tokens
        if may_stop and (token_id in self._params.stop_token_ids or token_id in self._eos_token_ids):
            self.stop_reason = token_id if token_id in self._params.stop_token_ids else None
            return self._end("stop")
        if self.detokenizer is not None:
            self._held += self.detokenizer.push([token_id])
            if may_stop and self._find_stop():
                self.finish_reason = "stop"
                return self._show()
        assert self._params.max_tokens is not None
        if self._num_tokens >= self._params.max_tokens:
            return self._end("length")
        new = self._show(self._num_to_hold())
        # Searched, or from before min_tokens: nothing may end in it, though a stop string may begin there.
        self._num_decided = len(self._held)
        return new

    def flush(self) -> str:
        """The held-back text of a generation that is cut short from outside; nothing more the second time."""
        if self.finish_reason is None and not self.num_provisional:
            self._held, self.num_provisional = self.held()
        return self._show()

    def held(self) -> tuple[str, int]:
        """(what `flush` would give out, its provisional characters); nothing changes."""
        rest = "" if self.detokenizer is None else self.detokenizer.flush()
        return self._held + rest, len(rest)

    def _end(self, reason: str) -> str:
        """Ends it after the tokens so far; the last half character, if any, comes out as it is."""
        self._held, self.num_provisional = self.held()
        if self._num_tokens > self._params.min_tokens and self._find_stop():
            reason = "stop"
        if reason == "stop":
            self.num_provisional = 0
        self.finish_reason = reason
        return self._show()

    def _find_stop(self) -> bool:
        """Cuts the text at the match that ends first (the longest of those that end there)."""
        begins = {stop: self._held.find(stop, max(0, self._num_decided - len(stop) + 1)) for stop in self._stops}
        matches = [(begin + len(stop), begin, stop) for stop, begin in begins.items() if begin >= 0]
        if not matches:
            return False
        end, begin, self.stop_reason = min(matches)
        self._held = self._held[: end if self._params.include_stop_str_in_output else begin]
        return True

    def _num_to_hold(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        tail = self._held[-(self._longest - 1) :] if self._longest > 1 else ""
        for start in range(len(tail)):
            if any(stop.startswith(tail[start:]) for stop in self._stops):
                return len(tail) - start
        return 0

    def _show(self, num_to_hold: int = 0) -> str:
        """Gives out the held text but for so many characters at its end."""
        end = len(self._held) - num_to_hold
        new, self._held = self._held[:end], self._held[end:]
        if new:
            self.pieces.append(new)
        return new
