"""What a branch has generated, over all of its requests and those of its ancestors, and how it reads."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from minirksc.engine.request import Request
from minirksc.engine.signals import TokenSignals
from minirksc.text.tokenizer import Detokenizer


@dataclass(slots=True)
class BranchOutput:
    """What a branch has generated, one entry a token, and how it reads.

    Attributes:
        token_ids, logprobs, signals: one entry for each token that was not taken out again.
        text: text that `LLM.generate` shows of it.
        num_provisional: characters at its end that stand for half a character, which the next token may complete.
        detokenizer: state of the detokenizer after the last token.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    signals: TokenSignals = field(default_factory=TokenSignals)
    text: str = ""
    num_provisional: int = 0
    detokenizer: Detokenizer | None = None

    @property
    def settled_text(self) -> str:
        """The text that no further token can change."""
        return self.text[: len(self.text) - self.num_provisional]

    def copy(self) -> "BranchOutput":
        """Another one, to add to."""
        return replace(self, token_ids=list(self.token_ids), logprobs=list(self.logprobs))

    def add(self, request: Request) -> None:
        """What a request has generated, perhaps so far."""
        end = len(request.output_token_ids) - request.num_taken_out
        self.token_ids += request.output_token_ids[:end]
        self.logprobs += request.logprobs[:end]
        self.signals += request.signals.first(end)
        checker = request.checker
        if checker is None or checker.detokenizer is None:
            self.close()
            return
        self.text = self.settled_text + request.text
        self.num_provisional, self.detokenizer = checker.num_provisional, checker.detokenizer
        if not request.finished:  # as if it ended here: a fork goes on from here alone
            held, self.num_provisional = checker.held()
            self.text += held
            self.detokenizer = checker.detokenizer.copy(request.params.skip_special_tokens)
        if checker.finish_reason == "stop":
            self.close()

    def close(self) -> None:
        """Something else comes next: half a character at the end remains one."""
        self.num_provisional = 0
        if self.detokenizer is not None:
            self.detokenizer = self.detokenizer.cut()


def num_within(token_ids: SequenceOf[int], text: str, source: Detokenizer) -> tuple[int, int]:
    """(the most tokens that spell a beginning of the text, its length); a token may spell some of it and more."""
    num_tokens = num_chars = num_final = 0
    for count, token_id in enumerate(token_ids, start=1):
        num_final += len(source.push([token_id]))
        rest = source.flush()
        if text.startswith(rest, num_final):
            num_tokens, num_chars = count, num_final + len(rest)
    return num_tokens, num_chars
