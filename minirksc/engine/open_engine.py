"""An engine until it is closed, and what makes token ids of prompts for it.

What a branch needs of the session that made it, and what a session is built on.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from minirksc.engine.engine import Engine
from minirksc.engine.prompts import Conversation, Piece, Prompt, read_prompt
from minirksc.engine.request import Salt, salt_key
from minirksc.errors import ConfigError, EngineClosedError, TokenizerError, brief
from minirksc.models.spec import ArchSpec
from minirksc.options import EngineConfig
from minirksc.text.tokenizer import Tokenizer
from minirksc.token_ids import read_token_ids


class OpenEngine:
    """An engine with its tokenizer.

    Args:
        engine: the engine, which computes.
        config: options that it was made with, max_model_len resolved.
        model_path: folder of its weights.

    Attributes:
        config, model_path: the arguments.
        spec: the architecture.
        tokenizer: None when the folder has none; token ids still work.
    """

    def __init__(self, engine: Engine, config: EngineConfig, model_path: Path) -> None:
        self._engine: Engine | None = engine
        self.config = config
        self.model_path = model_path
        self.spec: ArchSpec = engine.runner.model.spec
        self.tokenizer: Tokenizer | None = engine.tokenizer

    @property
    def engine(self) -> Engine:
        """The engine below.

        Raises:
            EngineClosedError: after close().
        """
        if self._engine is None:
            raise EngineClosedError(f"LLM({self.config.model!r}) was closed; make a new one")
        return self._engine

    @property
    def closed(self) -> bool:
        """True after close()."""
        return self._engine is None

    def close(self) -> None:
        """Lets go of the engine; its branches cannot be used after. A second call does nothing."""
        self._engine = None

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"LLM({self.config.model!r}) holds a model and its cache, and cannot be copied or pickled; "
            "make one in each process, with the same arguments"
        )

    def need_tokenizer(self, what: str) -> Tokenizer:
        """The tokenizer.

        Raises:
            TokenizerError: there is none, so `what` cannot be used.
        """
        if self.tokenizer is None:
            raise TokenizerError(f"{self.model_path} has no tokenizer, so {what} cannot be used; give token ids")
        return self.tokenizer

    def encode_fragment(self, tokens: Prompt) -> list[int]:
        """Token ids of what continues something, in any form of a prompt: text gets no BOS.

        Raises:
            ConfigError, PromptError: it is neither text nor token ids, or has a salt of its own.
            TokenizerError: text, and there is no tokenizer.
        """
        piece = read_prompt(tokens)
        if piece.salt is not None:
            raise ConfigError(f"cache_salt {brief(piece.salt)} beside what continues a branch, which has its own salt")
        if piece.text is None:
            return piece.token_ids
        return self.need_tokenizer("text").encode(piece.text, add_special_tokens=False)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out; "" without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(read_token_ids(token_ids))

    def encode(self, prompt: Any, salt: Salt | None) -> Piece:
        """One prompt, in any form of one or as a `Conversation`, with its token ids and the salt that counts for it.

        Raises:
            ConfigError: it has another salt of its own than the one of the call, or unknown keys.
            PromptError: it is neither text nor token ids nor a conversation.
            TokenizerError: there is no tokenizer, or its chat template fails.
        """
        if isinstance(prompt, Conversation):
            tokenizer = self.need_tokenizer("chat()")
            options = prompt.add_generation_prompt, prompt.tools, prompt.chat_template_kwargs
            return Piece(None, tokenizer.encode_chat(prompt.checked_messages(), *options), salt)
        piece = read_prompt(prompt)
        if piece.salt is not None and salt is not None and salt_key(piece.salt) != salt_key(salt):
            raise ConfigError(f"a prompt's cache_salt {brief(piece.salt)} is not the salt of the call; leave one out")
        token_ids = piece.token_ids if piece.text is None else self.need_tokenizer("text").encode(piece.text)
        return Piece(piece.text, token_ids, salt if piece.salt is None else piece.salt)
