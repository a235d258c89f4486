"""Token sequences on one engine: how they are made, forked, cut, pinned and released.

Nothing is computed here: a sequence gains KV by a request (`minirksc.engine.engine`). Its blocks are the block
manager's, and that it may be used is checked here.
"""

import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch

from minirksc.cache.rsbcm import BlockManager
from minirksc.engine.calls import Call, Interruptible
from minirksc.engine.request import Salt, Sequence, salt_key
from minirksc.engine.scheduler import Scheduler
from minirksc.errors import BranchError, PromptError, brief
from minirksc.token_ids import read_token_ids


class Sequences(Interruptible):
    """The sequences of one engine.

    Args:
        scheduler: the scheduler of their requests, over the block manager that holds their tables.
        vocab_size: number of token ids.
        max_model_len: longest sequence, prompt and generated tokens together.
        device: device on which the engine computes.
    """

    def __init__(self, scheduler: Scheduler, vocab_size: int, max_model_len: int, device: torch.device) -> None:
        super().__init__(device)
        self.scheduler = scheduler
        self.max_model_len = max_model_len
        self._blocks = scheduler.blocks
        self._vocab_size = vocab_size
        self._owner = object()  # what its sequences know it by
        self._sequence_ids = itertools.count()

    @property
    def blocks(self) -> BlockManager:
        """The block manager, put in order first if a call has broken off."""
        self._mend()
        return self._blocks

    def new_sequence(
        self,
        token_ids: Iterable[int],
        *,
        share: bool = True,
        salt: Salt | None = None,
        seed: int = 0,
    ) -> Sequence:
        """A root sequence; nothing is computed or reserved yet.

        Args:
            token_ids: tokens of the prompt.
            share: whether its blocks are shared; False: with its own forks alone.
            salt: name that sequences must have in common to share blocks; None: they have none in common.
            seed: key of the samples of a branch on it.

        Raises:
            PromptError: it is empty, longer than max_model_len, or has a token id outside the vocabulary.
            ConfigError: the salt is none.
        """
        prompt = self.check_token_ids(token_ids, num_before=0)
        if not prompt:
            raise PromptError("the prompt is empty; give at least one token")
        key = salt_key(salt)
        seq_id = next(self._sequence_ids)
        key = key if share else b"private %d" % seq_id
        return Sequence(seq_id, prompt, salt=key, branch_seed=seed, owner=self._owner)

    def check_token_ids(self, token_ids: Iterable[int], num_before: int) -> list[int]:
        """Token ids that are to follow `num_before` others, as a list of int.

        Raises:
            PromptError: too many for max_model_len, or one is no whole number or outside the vocabulary.
        """
        checked = read_token_ids(token_ids, self._vocab_size)
        num_tokens = num_before + len(checked)
        if num_tokens > self.max_model_len:
            raise PromptError(
                f"{num_tokens} tokens are more than max_model_len {self.max_model_len}; shorten the prompt"
            )
        return checked

    def check_idle(self, sequence: Sequence) -> None:
        """Refuses a sequence that cannot be changed or given to a request.

        Raises:
            BranchError: it is in an unfinished request, was released, or is another engine's.
        """
        self._check_owner(sequence)
        request = self.scheduler.requests.get(sequence.seq_id)
        if request is not None:
            raise BranchError(
                f"sequence {sequence.seq_id} is in request {request.request_id}, which has not finished; "
                "fork it, or wait for the end"
            )

    def _check_owner(self, sequence: Sequence) -> None:
        if not isinstance(sequence, Sequence):
            raise BranchError(f"{brief(sequence)} is no sequence; make one with new_sequence or fork_sequence")
        if sequence.owner is not self._owner:
            state = "was released, or made by hand" if sequence.owner is None else "is another engine's"
            raise BranchError(f"sequence {sequence.seq_id} {state}; make one with new_sequence or fork_sequence")

    def fork_sequence(self, parent: Sequence, index: int, call: Call | None = None, *, kept: bool = True) -> Sequence:
        """A child that shares every block of its parent; nothing is copied.

        Args:
            parent: sequence that is forked; it stays as it is.
            index: number of the fork; the last part of the child's path.
            call: the call at whose end the child is released, unless it is taken out of it.
            kept: whether the child's blocks stay when a request on it ends, until `release`.

        Raises:
            BranchError: the parent was released, or is another engine's.
            EngineBusyError, EngineForkedError.
        """
        self._enter()
        self._check_owner(parent)
        child = replace(
            parent,
            seq_id=next(self._sequence_ids),
            token_ids=list(parent.token_ids),
            path=(*parent.path, index),
            depth=parent.depth + 1,
            kept=kept,
        )
        with self._changes:
            if call is not None:
                call.sequences.append(child)
            self._blocks.fork(parent.seq_id, child.seq_id, child.depth)
            self.scheduler.keep(child)
        return child

    def cut_kv(self, sequence: Sequence, num_tokens: int) -> None:
        """Forgets the KV of an idle sequence from num_tokens on, before its tokens there are replaced.

        Raises:
            BranchError: the sequence cannot be changed, see `check_idle`.
            EngineBusyError, EngineForkedError.
        """
        self._enter()
        self.check_idle(sequence)
        seq_id = sequence.seq_id
        if seq_id in self._blocks and self._blocks.num_tokens(seq_id) > num_tokens:
            with self._changes:
                # The last remaining token is computed once more, for its logits.
                if self._blocks.can_rewind(seq_id, num_tokens - 1):
                    self._blocks.rewind(seq_id, num_tokens - 1)
                else:  # what its window would see is gone
                    self.scheduler.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Gives back the blocks of a kept sequence; a request that runs on it is aborted."""
        with self._enter():
            self._release(sequence)

    def pin(self, sequence: Sequence) -> None:
        """Keeps the blocks of a kept sequence from eviction; see `BlockManager.pin`."""
        with self._enter():
            self._blocks.pin(sequence.seq_id)

    def unpin(self, sequence: Sequence) -> None:
        """Takes `pin` back."""
        with self._enter():
            self._blocks.unpin(sequence.seq_id)

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block that no sequence uses, and unpins all."""
        with self._enter():
            self._blocks.reset()

    def _release(self, sequence: Sequence) -> None:
        self._let_go(sequence)
        request = self.scheduler.requests.get(sequence.seq_id)
        if request is not None:
            self._abort(request)
        self.scheduler.release(sequence)
        sequence.owner = None
