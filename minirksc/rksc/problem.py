"""What a solve is given, read and checked before anything is computed: problem, phrasings, hints, salt."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minirksc.engine.prompts import Piece, Prompt, read_prompt
from minirksc.engine.request import salt_key
from minirksc.errors import ConfigError, PromptError, brief
from minirksc.rksc.guard import refusal
from minirksc.rksc.solver_config import SolverConfig, Tokens
from minirksc.rksc.tree import Start
from minirksc.token_ids import is_list

if TYPE_CHECKING:
    from minirksc.engine.request import Salt
    from minirksc.engine.session import Session


@dataclass(frozen=True)
class Problem:
    """One problem, ready to be solved.

    Attributes:
        prompt: the problem as text, or token ids of a whole prompt.
        phrasings: prompt of each branch in the same form; None: all have the problem itself.
        starts: what each branch begins with.
        is_chat: whether the first branch's prompt is a conversation.
        salt: salt of all that is computed for it.
    """

    prompt: Tokens
    phrasings: Sequence[Tokens] | None
    starts: list[Start]
    is_chat: bool
    salt: "Salt | None"

    def check_room(
        self, session: "Session", config: SolverConfig, num_asked: Callable[[int], int] | None = None
    ) -> None:
        """Refuses what could not be computed to its end.

        Args:
            session: session that is to compute it.
            config: options of the solve.
            num_asked: called with the tokens of a prompt, gives those that stand around an answer when it is asked
                about; None: it never is.

        Raises:
            PromptError: a prompt is empty, has ids outside the vocabulary, or is too long for what is to follow it.
        """
        engine = session.engine
        for start in self.starts:
            num_prompt = len(start.prompt)
            if not start.prompt:
                raise PromptError("a problem or phrasing has no tokens; give at least one")
            num_hint = len(engine.check_token_ids(session.encode_fragment(start.hint), num_before=num_prompt))
            engine.check_token_ids(start.prompt, num_before=num_hint)
            num_around = num_prompt if num_asked is None else max(num_asked(num_prompt), num_prompt)
            num_answer = num_hint + config.depth * config.tokens_per_step
            if num_around + num_answer > engine.max_model_len:
                raise PromptError(
                    f"{num_prompt} prompt tokens, {num_answer} of hint and answer ({config.depth} x tokens_per_step "
                    f"{config.tokens_per_step}) and {num_around - num_prompt} to ask about it are more than "
                    f"max_model_len {engine.max_model_len}; lower tokens_per_step, or shorten the problem"
                )


def read_problem(
    session: "Session",
    config: SolverConfig,
    problem: Prompt,
    phrasings: Iterable[Prompt] | None = None,
    salt: "Salt | None" = None,
) -> Problem:
    """Reads what `Solver.solve` is given; see there.

    Raises:
        ConfigError: not one phrasing a branch, text without a tokenizer, or salts that differ.
        PromptError: a phrasing is empty or no prompt.
    """
    pieces = [read_prompt(one) for one in [problem, *_phrasing_list(phrasings, config.branches)]]
    salt = _one_salt(salt, [piece.salt for piece in pieces])
    own, *given = [_checked(piece, session) for piece in pieces]
    prompts = given or [own] * config.branches
    has_template = session.tokenizer is not None and session.tokenizer.has_chat_template
    chats = [isinstance(prompt, str) and config.chat and has_template for prompt in prompts]
    # Where no hints are given: in a conversation they begin the assistant's turn; in plain text, a paragraph.
    hints = config.hints or [("" if chat else "\n\n") + f"Approach #{k}:" for k, chat in enumerate(chats, 1)]
    starts = []
    for prompt, chat, hint in zip(prompts, chats, hints, strict=True):
        # The published rule has no guard.
        is_guarded = config.sharing == "semantic" and config.policy != "paper" and prompt != prompts[0]
        why_not = refusal(_shown(prompts[0], session), _shown(prompt, session)) if is_guarded else None
        starts.append(Start(_token_ids(prompt, chat, session), hint, why_not))
    return Problem(own, given or None, starts, chats[0], salt)


def check_needs_no_text(session: "Session", config: SolverConfig) -> None:
    """For a checkpoint without a tokenizer.

    Raises:
        ConfigError: what a solve does by itself would take one.
    """
    has_text = config.hints is None or any(isinstance(hint, str) for hint in config.hints)
    needs = {
        "hints as token ids, such as [()] * branches": has_text,
        "verify='never'": config.verify != "never",
        "select='score'": config.select != "score",
    }
    if remedies := [remedy for remedy, is_needed in needs.items() if is_needed]:
        raise ConfigError(f"{session.model_path} has no tokenizer; use {', '.join(remedies)}")


def _phrasing_list(phrasings: Any, num_branches: int) -> list[Any]:
    if phrasings is None:
        return []
    if not is_list(phrasings):
        raise ConfigError(f"phrasings must be a list of prompts, one a branch, not {brief(phrasings)}")
    found = list(phrasings)
    if len(found) != num_branches:
        raise ConfigError(f"{len(found)} phrasings for {num_branches} branches; give one a branch")
    return found


def _one_salt(salt: "Salt | None", own: Sequence["Salt | None"]) -> "Salt | None":
    """The salt of a call, or the one that its prompts bring."""
    given = [one for one in (salt, *own) if one is not None]
    if len({salt_key(one) for one in given}) > 1:
        raise ConfigError("the salts of a solve's prompts differ, or are not the call's; one solve has one salt")
    return given[0] if given else None


def _checked(piece: Piece, session: "Session") -> str | list[int]:
    """Text or token ids of a prompt."""
    if piece.text is None:
        return piece.token_ids
    if session.tokenizer is None:
        raise ConfigError(f"{session.model_path} has no tokenizer; give the problem as token ids, not text")
    if not piece.text.strip():
        raise PromptError(f"the problem or a phrasing is empty: {brief(piece.text)}; give some text")
    return piece.text


def _token_ids(prompt: str | list[int], chat: bool, session: "Session") -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    tokenizer = session.need_tokenizer("text")
    return tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)


def _shown(prompt: str | list[int], session: "Session") -> str:
    return prompt if isinstance(prompt, str) else session.decode(prompt)
