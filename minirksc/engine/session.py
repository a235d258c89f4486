"""A session: work on one engine. Requests run to their end; branches are made, extended and scored.

Everything here is a loop over `Engine.step`. It knows neither how a model was loaded nor what the branches are for:
`minirksc.llm` is above it, and the solver.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from torch import Tensor

from minirksc.cache.eviction import Eviction as Eviction
from minirksc.engine.branch import Branch, BranchProgress, branch_list, early_ends
from minirksc.engine.calls import Call
from minirksc.engine.gates import LayerGate, Seat
from minirksc.engine.open_engine import OpenEngine
from minirksc.engine.outputs import Job
from minirksc.engine.prompts import Params, Prompt, either_params, one_or_many, params_list
from minirksc.engine.request import Request, Salt
from minirksc.engine.scoring import read_choices, read_questions, score_requests
from minirksc.engine.stats import Stats, runs_on
from minirksc.errors import BranchError, ConfigError, MinirkscError, NumericalError, named
from minirksc.options import SamplingParams
from minirksc.text.tokenizer import Tokenizer as Tokenizer
from minirksc.token_ids import read_token_ids


class Session(OpenEngine):
    """Work on one engine; arguments and attributes are those of `OpenEngine`."""

    # Requests

    def start(self, call: Call, prompt: Any, params: Any, salt: Salt | None) -> Job:
        """A prompt with its requests, or with the error that kept it from starting.

        Args:
            call: the call to which the requests belong.
            prompt: prompt in any form that `LLM.generate` takes, or a `Conversation`.
            params: sampling parameters of its samples, in any form of these.
            salt: salt of the call, which counts where the prompt has none.
        """
        job = Job(None, [], SamplingParams())
        try:
            job.prompt, job.token_ids, own_salt = self.encode(prompt, salt)
            job.params = SamplingParams.of(params).resolved(self.engine.sampling_defaults)
            job.add_requests(self.engine, call, own_salt)
        except MinirkscError as error:
            for request in job.requests:
                self.engine.abort(request)
            job.requests.clear()
            job.error = error
        return job

    def run(self, requests: SequenceOf[Request]) -> Iterator[None]:
        """Steps the engine until all of these have finished; a pause after every step."""
        while not all(request.finished for request in requests):
            self.engine.step()
            yield

    def run_all(self, requests: SequenceOf[Request], what: str = "request") -> None:
        """Runs requests until all have finished.

        Args:
            requests: requests of one call.
            what: name of what each is for, in the message of an error.

        Raises:
            MinirkscError: the first error among them.
        """
        for _ in self.run(requests):
            pass
        _raise_first_error(requests, what)

    # Branches

    def branch(
        self, prompt: Prompt, *, share: bool = True, seed: int | None = None, salt: Salt | None = None
    ) -> Branch:
        """A root branch, its prompt computed once.

        Args:
            prompt: prompt in any form that `LLM.generate` takes.
            share: False keeps its blocks out of all sharing but that of its own forks.
            seed: seed of its samples and its forks'; None: the next of this LLM's.
            salt: salt, as in `LLM.generate`, of all that is done with it and its forks.

        Raises:
            ConfigError, PromptError, CacheFullError, TokenizerError.
        """
        _, token_ids, own_salt = self.encode(prompt, salt)
        return self.branches([{"prompt_token_ids": token_ids}], share=share, seed=seed, salt=own_salt)[0]

    def branches(
        self,
        prompts: Iterable[Prompt],
        *,
        share: bool = True,
        seed: int | None = None,
        seats: SequenceOf[Seat | None] | None = None,
        salt: Salt | None = None,
    ) -> list[Branch]:
        """Root branches, their prompts computed together.

        Args:
            prompts: prompts, one or many, in any form that `LLM.generate` takes.
            share: False keeps their blocks out of all sharing but that of their own forks.
            seed: seed of all of them; None: the next of this LLM's, one a branch.
            seats: seats at gates, one a prompt, None for none. A branch whose prompt departed has `exit_layer` and no
                KV: prune it, or have its prompt computed by whatever is done with it next.
            salt: salt of all that is done with them and their forks.

        Raises:
            ConfigError, PromptError, CacheFullError, TokenizerError: none of them is made.
        """
        items, _ = one_or_many(prompts)
        seats = [None] * len(items) if seats is None else seats
        if len(seats) != len(items):
            raise ConfigError(f"{len(seats)} seats for {len(items)} prompts; give one each, None for none")
        SamplingParams(seed=seed)  # checks its range
        made: list[Branch] = []
        with self.engine.call() as call:
            for index, (prompt, seat) in enumerate(zip(items, seats, strict=True)):
                try:
                    _, token_ids, own_salt = self.encode(prompt, salt)
                    own_seed = self.engine.next_seed() if seed is None else seed
                    sequence = self.engine.new_sequence(token_ids, share=share, salt=own_salt, seed=own_seed)
                    sequence.kept = True
                    call.sequences.append(sequence)
                    made.append(Branch(self, sequence))
                    self.engine.add_request(sequence, SamplingParams(), prefill_only=True, seat=seat, call=call)
                except MinirkscError as error:
                    raise_named(error, "prompt", index, len(items))
            self.run_all(call.requests, "prompt")
            for branch, request in zip(made, call.requests, strict=True):
                branch.exit_layer = request.exit_layer
                branch.num_saved_layer_rows = request.num_saved_layer_rows
                branch.num_cached_tokens = request.num_cached_tokens or 0
            call.sequences.clear()  # they are the branches'
        return made

    def extend(
        self,
        branches: Iterable[Branch],
        params: Params | Iterable[Params] = None,
        on_step: Callable[[SequenceOf[BranchProgress]], Mapping[int, str] | None] | None = None,
        *,
        keep_stop: bool = True,
        sampling_params: Params | Iterable[Params] = None,
    ) -> None:
        """Decodes branches together, each until its own stop; results are in the branches.

        The random numbers of a branch depend on its seed, its path and the position alone: neither on its
        siblings nor on what was pruned.

        Args:
            branches: distinct branches of this LLM.
            params: sampling parameters of all, or one a branch; without n and the logprobs options.
            on_step: function called after each step with the progress of every branch; names branches that stop here
                and why: index -> finish_reason.
            keep_stop: whether what ended a branch, a stop string or an end token, stays in its tokens (never in its
                text). False: it goes on as if that had never been generated: tokens are dropped from
                the first one on that holds any of it. Where that one also spells text before it, this is tokenised
                anew and appended; it stays in `Branch.text`, and is not in `Branch.output_token_ids`.
            sampling_params: another name of `params`, that of vLLM.

        Raises:
            BranchError: one is pruned, foreign, in another call or given twice.
            ConfigError, PromptError, CacheFullError: a branch cannot be decoded as asked; none has changed.
            CacheFullError, NumericalError: after the other branches have ended.
        """
        owned = branch_list(branches, self)
        if len(set(map(id, owned))) < len(owned):
            raise BranchError("a branch is given twice; extend() takes each branch once")
        each = [SamplingParams.of(one) for one in params_list(either_params(params, sampling_params), len(owned))]
        for one in each:
            if one.n != 1:
                raise ConfigError(f"extend() takes n=1, not {one.n}; fork the branch instead")
            if one.logprobs is not None or one.prompt_logprobs is not None:
                raise ConfigError("extend() reports Branch.logprobs, of chosen tokens; leave logprobs options out")
            if one.include_stop_str_in_output and not keep_stop:
                raise ConfigError("keep_stop=False takes out what include_stop_str_in_output shows; leave one out")
        with self.engine.call() as call:
            for index, (branch, one) in enumerate(zip(owned, each, strict=True)):
                try:
                    branch.add_request(one, call)
                except MinirkscError as error:
                    raise_named(error, "branch", index, len(owned))
            progress = [BranchProgress(branch, request) for branch, request in zip(owned, call.requests, strict=True)]
            try:
                for _ in self.run(call.requests):
                    for index, reason in early_ends(on_step(progress) if on_step else None, len(owned)):
                        self.engine.abort(call.requests[index], reason)
            finally:
                for branch in () if keep_stop else owned:
                    branch.take_out_stop()
            _raise_first_error(call.requests, "branch")

    def score(
        self,
        branches: Iterable[Branch],
        question: Prompt | Iterable[Prompt],
        choices: Iterable[Prompt],
        gate: LayerGate | None = None,
    ) -> Tensor:
        """How probable each choice is as the continuation of `question` after each branch.

        One batched pass; the branches stay as they were. Choices of one token each are read off one row of logits;
        of longer ones the whole sequence is scored.

        Args:
            branches: branches of this LLM; cached blocks are shared as the salt of each allows.
            question: text or token ids, appended to each branch for this pass only; or a list of one for each branch.
            choices: texts or token ids, at least two.
            gate: gate at which all sit, each by its index. One that departed has NaN for a result: the gate knows why.

        Returns:
            `[branches, choices]` float32; each row sums to 1.

        Raises:
            BranchError, PromptError, CacheFullError, NumericalError.
            ConfigError: too few choices, not one question a branch, or a gate with choices of several tokens.
        """
        owned = branch_list(branches, self)
        choice_ids = read_choices(self, choices)
        if gate is not None and max(map(len, choice_ids)) > 1:
            raise ConfigError(f"a gate reads one row of logits a branch; choices {choice_ids} have more than one token")
        with self.engine.call() as call:
            sequences = [branch.sequence for branch in owned]
            scores = score_requests(
                self.engine, call, sequences, read_questions(self, question, len(owned)), choice_ids, gate
            )
            self.run_all(call.requests)
        # What departed has no score.
        rows = scores if gate is None else scores[[request.exit_layer is None for request in call.requests]]
        if not rows.isfinite().all():
            raise NumericalError("the model gave NaN or infinite logits for a choice; try dtype='float32'")
        return scores.softmax(-1)

    # Looking

    def stats(self) -> Stats:
        """Counters of the engine since its start, and what it runs on; see the keys for units."""
        engine = self.engine
        return {**engine.stats(), **runs_on(engine.runner, self.config.quantize, self.config.ignore_config_keys)}

    def evictions(self) -> list[Eviction]:
        """What had to make room in the prefix cache lately, oldest first: why, and whether it was needed again."""
        return self.engine.blocks.evictions

    def lens(self, token_ids: Iterable[int] | None = None) -> Callable[[Tensor], Tensor]:
        """Reads hidden states of any layer as logits; see `Decoder.lens`.

        Args:
            token_ids: tokens whose logits are read; None: all of the vocabulary.

        Raises:
            PromptError: a token id is none.
        """
        ids = None if token_ids is None else read_token_ids(token_ids, self.spec.vocab_size)
        return self.engine.runner.model.lens(ids)


def raise_named(error: Exception | None, what: str, index: int, count: int) -> None:
    """Raises an error, if there is one; of several things, it says which one it is about.

    Args:
        error: error of one of them.
        what: name of what they are.
        index: place of the one.
        count: number of all.
    """
    if error is not None:
        raise error if count == 1 else named(error, f"{what} {index}")


def _raise_first_error(requests: SequenceOf[Request], what: str) -> None:
    for index, request in enumerate(requests):
        raise_named(request.error, what, index, len(requests))
