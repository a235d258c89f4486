"""`LLM`: the engine as people use it. Prompts in, results out; branches; scores.

Everything here is a loop over `Engine.step`. Nothing is approximated, unless quantize="int8" or
kv_cache_dtype="int8" asks for it.
"""

import math
import os
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minirksc.asks import Probe, make_paper_probe, make_probe
from minirksc.branch import Branch, BranchProgress
from minirksc.calls import Call
from minirksc.config import EngineConfig, SamplingParams
from minirksc.engine import Engine
from minirksc.errors import (
    BranchError,
    ConfigError,
    EngineClosedError,
    MinirkscError,
    NumericalError,
    TokenizerError,
)
from minirksc.eviction_log import Eviction
from minirksc.gates import DepthGate, Seat
from minirksc.host import read_cpus, resident_bytes
from minirksc.job import Job
from minirksc.kernels.native_ops import why_not
from minirksc.loading import load
from minirksc.models.spec import ArchSpec
from minirksc.prompts import Prompt, params_list, prompt_list, text_and_ids
from minirksc.request import Request, RequestOutput, Stats, StreamChunk
from minirksc.scoring import score_requests
from minirksc.threads import plan_threads
from minirksc.tokenizer import Tokenizer


class LLM:
    """A model, its KV cache and its tokenizer.

    Args:
        model: a checkpoint folder or an alias such as "smollm2-135m".
        use_tqdm: progress bar on stderr, if loading takes a while.
        options: fields of `EngineConfig`: dtype, device, kv_cache_bytes, kv_cache_dtype, quantize, block_size,
            max_batch_tokens, max_model_len, threads, backend, eviction, seed and so on.

    Attributes:
        engine: the engine, for those who drive add_request, abort and step themselves.
        tokenizer: None when the folder has none; token ids still work.
        spec: the architecture.
        config: options, with max_model_len resolved.
        model_path: the folder that the weights came from.
        sampling_defaults: what generation_config.json says about sampling.

    Raises:
        ConfigError: an option is unknown or out of range.
        CheckpointError, UnsupportedModelError: the checkpoint cannot be read or run.
        CacheFullError: the cache is smaller than one block.

    Warns:
        UserWarning: threads, or what OpenMP was told by the environment, do not fit the CPUs.
    """

    def __init__(self, model: str | Path = "smollm2-135m", *, use_tqdm: bool = False, **options: Any) -> None:
        config = EngineConfig.from_dict({"model": str(model), **options})
        self._threads_before = torch.get_num_threads()
        plan = plan_threads(config.threads, self._threads_before, read_cpus(), os.environ)
        for warning in plan.warnings:
            warnings.warn(warning, stacklevel=2)
        self._has_set_threads = config.threads is not None or plan.threads != self._threads_before
        try:
            if self._has_set_threads:
                torch.set_num_threads(plan.threads)
            loaded = load(config, use_tqdm)
        except BaseException:
            self._restore_threads()
            raise
        self._engine: Engine | None = loaded.engine
        self.config = loaded.config
        self.spec: ArchSpec = loaded.spec
        self.model_path = loaded.model_path
        self.tokenizer: Tokenizer | None = loaded.tokenizer
        self.sampling_defaults = loaded.sampling_defaults
        self._load_s, self._pack_s = loaded.load_s, loaded.pack_s
        self._num_seeds = 0
        self._lenses: dict[tuple[int, ...] | None, Callable[[Tensor], Tensor]] = {}

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
        """Frees model and cache; a second call does nothing."""
        if self._engine is not None:
            self._engine = None
            self._lenses.clear()
            self._restore_threads()

    def _restore_threads(self) -> None:
        """They are the process's, not ours."""
        if self._has_set_threads:
            torch.set_num_threads(self._threads_before)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Generation

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = False,
        return_errors: bool = False,
    ) -> list[RequestOutput]:
        """Completes prompts, all of them batched together.

        Args:
            prompts: one or many, each text, token ids or {"prompt_token_ids": [...]}.
            params: for all, or one a prompt; None: `SamplingParams()`.
            use_tqdm: progress bar on stderr.
            return_errors: put a prompt's error into its result instead of raising it.

        Returns:
            One result a prompt, in order.

        Raises:
            PromptError, CacheFullError, NumericalError, TokenizerError: unless return_errors.
        """
        items = prompt_list(prompts)
        jobs: list[Job] = []
        with self.engine.call() as call:
            for prompt, one in zip(items, params_list(params, len(items)), strict=True):
                jobs.append(self._start(call, prompt, one, return_errors))
            with tqdm(total=len(call.requests), disable=not use_tqdm, unit="request") as bar:
                for _ in self._run(call.requests):
                    bar.update(sum(request.finished for request in call.requests) - bar.n)
        results = [job.result() for job in jobs]
        for result in results:
            if result.error is not None and not return_errors:
                raise result.error
        return results

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[StreamChunk, None, RequestOutput]:
        """Completes one prompt and yields text as it becomes final; the result is the return value.

        Closing the generator early aborts the generation and frees its blocks.

        Raises:
            PromptError, CacheFullError, NumericalError, TokenizerError.
        """
        made: list[weakref.ref[Generator[StreamChunk, None, RequestOutput]]] = []

        def is_alive() -> bool:
            stream = made[0]()
            return stream is not None and stream.gi_frame is not None  # type: ignore[attr-defined]

        stream = self._stream(prompt, params or SamplingParams(), is_alive)
        made.append(weakref.ref(stream))
        return stream

    def _stream(
        self, prompt: Prompt, params: SamplingParams, is_alive: Callable[[], bool]
    ) -> Generator[StreamChunk, None, RequestOutput]:
        with self.engine.call(is_alive) as call:
            job = self._start(call, prompt, params, return_errors=False)
            shown = [(0, 0)] * len(job.requests)  # characters and tokens of each sample so far
            for _ in self._run(job.requests):
                for index, request in enumerate(job.requests):
                    if request.error is not None:
                        raise request.error
                    num_chars, num_tokens = shown[index]
                    shown[index] = (len(request.text), len(request.output_token_ids))
                    if shown[index] != (num_chars, num_tokens):
                        yield StreamChunk(
                            index=index,
                            text=request.text[num_chars:],
                            token_ids=request.output_token_ids[num_tokens:],
                            finish_reason=request.finish_reason,
                        )
        return job.result()

    def chat(
        self,
        conversations: SequenceOf[Any],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        add_generation_prompt: bool = True,
        tools: SequenceOf[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers conversations through the checkpoint's own chat template.

        Args:
            conversations: one list of {"role": ..., "content": ...}, or a list of such lists.
            params: as in `generate`.
            use_tqdm: as in `generate`.
            add_generation_prompt: end each conversation with the beginning of the assistant's turn.
            tools: functions that the model may call, each described by a JSON schema.
            chat_template_kwargs: other variables that the template knows, such as {"enable_thinking": False}.

        Raises:
            ChatTemplateError: there is no template, it fails, or it does not know a variable.
        """
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
        tokenizer = self.need_tokenizer("chat()")
        prompts = [
            tokenizer.encode_chat(list(c), add_generation_prompt, tools, chat_template_kwargs) for c in conversations
        ]
        return self.generate(prompts, params, use_tqdm=use_tqdm)

    def logits(self, token_ids: SequenceOf[int]) -> Tensor:
        """Next-token logits at every position: `[tokens, vocab]` float32 on the CPU.

        Raises:
            PromptError, CacheFullError.
        """
        out = torch.empty((len(token_ids), self.spec.vocab_size))
        with self.engine.call() as call:
            self.engine.add_request(
                self.engine.new_sequence(token_ids, share=False),
                self._resolve(SamplingParams()),
                prefill_only=True,
                logits_start=0,
                on_logits=lambda first, rows: _store(out, first, rows),
                call=call,
            )
            self._run_all(call.requests)
        return out

    # Branches

    def branch(self, prompt: Prompt, *, share: bool = True, seed: int | None = None) -> Branch:
        """A root branch, its prompt computed once.

        Args:
            prompt: text or token ids.
            share: False keeps its blocks out of all sharing but that of its own forks.
            seed: of its samples and its forks'; None: the next of this LLM's.

        Raises:
            PromptError, CacheFullError, TokenizerError.
        """
        return self.branches([prompt], share=share, seed=seed)[0]

    def branches(
        self,
        prompts: SequenceOf[Prompt],
        *,
        share: bool = True,
        seed: int | None = None,
        seats: SequenceOf[Seat | None] | None = None,
    ) -> list[Branch]:
        """Root branches, their prompts computed together.

        Args:
            prompts: each text or token ids.
            share: as in `branch`.
            seed: as in `branch`, the same for all; None: the next of this LLM's, one a branch.
            seats: at depth gates, one a prompt, None for none. A branch whose prompt left has `exit_layer` and no KV:
                prune it, or have its prompt computed by whatever is done with it next.

        Raises:
            PromptError, CacheFullError, TokenizerError: none of them is made.
        """
        made: list[Branch] = []
        params = self._resolve(SamplingParams())
        with self.engine.call() as call:
            for index, prompt in enumerate(prompts):
                _, token_ids = self._encode(prompt)
                own_seed = self._next_seed() if seed is None else seed
                sequence = self.engine.new_sequence(token_ids, share=share, seed=own_seed)
                sequence.kept = True
                call.sequences.append(sequence)
                made.append(Branch(self, sequence))
                seat = None if seats is None else seats[index]
                self.engine.add_request(sequence, params, prefill_only=True, seat=seat, call=call)
            self._run_all(call.requests)
            for branch, request in zip(made, call.requests, strict=True):
                branch.exit_layer = request.exit_layer
                branch.num_saved_layer_rows = request.num_saved_layer_rows
                branch.num_cached_tokens = request.num_cached_tokens or 0
            call.sequences.clear()  # they are the branches'
        return made

    def extend(
        self,
        branches: SequenceOf[Branch],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        on_step: Callable[[SequenceOf[BranchProgress]], Mapping[int, str]] | None = None,
    ) -> None:
        """Decodes branches together, each until its own stop; results are in the branches.

        The random numbers of a branch depend on its seed, its path and the position alone: neither on its
        siblings nor on what was pruned.

        Args:
            branches: distinct branches of this LLM.
            params: for all, or one a branch; without n and the logprobs options.
            on_step: called after each step with the progress of every branch; names branches that stop here and why:
                index -> finish_reason.

        Raises:
            BranchError: one is pruned, foreign or given twice.
            PromptError, CacheFullError, NumericalError: after the other branches have ended.
        """
        if len(set(map(id, branches))) < len(branches):
            raise BranchError("a branch is given twice; extend() takes each branch once")
        pairs = list(zip(branches, params_list(params, len(branches)), strict=True))
        for branch, one in pairs:
            branch._check_owner(self)
            if one.n != 1:
                raise ConfigError(f"extend() takes n=1, not {one.n}; fork the branch instead")
            if one.logprobs is not None or one.prompt_logprobs is not None:
                raise ConfigError("extend() reports Branch.logprobs, of chosen tokens; leave logprobs options out")
        with self.engine.call() as call:
            progress: list[BranchProgress] = []
            for branch, one in pairs:
                sequence = branch._sequence
                request = self.engine.add_request(sequence, self._resolve(one), seed=sequence.branch_seed, call=call)
                progress.append(BranchProgress(branch, request))
            for _ in self._run(call.requests):
                for index, reason in on_step(progress).items() if on_step else ():
                    self.engine.abort(call.requests[index], reason)
            self._raise_first_error(call.requests)

    def score(
        self,
        branches: SequenceOf[Branch],
        question: str | SequenceOf[int] | SequenceOf[SequenceOf[int]],
        choices: SequenceOf[str | SequenceOf[int]],
        gate: DepthGate | None = None,
    ) -> Tensor:
        """How probable each choice is as the continuation of `question` after each branch.

        One batched pass; the branches stay as they were. Choices of one token each are read off one row of logits;
        of longer ones the whole sequence is scored.

        Args:
            branches: of this LLM.
            question: text or token ids, appended to each branch for this pass only; or token ids for each branch.
            choices: at least two, text or token ids.
            gate: at which all sit, each by its index. Whoever left has NaN for a result: the gate knows what it saw.

        Returns:
            `[branches, choices]` float32; each row sums to 1.

        Raises:
            BranchError, PromptError, CacheFullError, NumericalError.
            ConfigError: too few choices, not one question a branch, or a gate with choices of several tokens.
        """
        for branch in branches:
            branch._check_owner(self)
        choice_ids = [self.encode_fragment(choice) for choice in choices]
        if len(choice_ids) < 2 or not all(choice_ids):
            raise ConfigError(f"score() needs at least two choices of at least one token, got {choices!r}")
        if gate is not None and max(map(len, choice_ids)) > 1:
            raise ConfigError(f"a gate reads one row of logits a branch; choices {choice_ids} have more than one token")
        scores = torch.full((len(branches), len(choice_ids)), math.nan)
        sequences = [branch._sequence for branch in branches]
        with self.engine.call() as call:
            score_requests(
                self.engine,
                call,
                sequences,
                self._questions(question, len(branches)),
                choice_ids,
                self._resolve(SamplingParams()),
                scores,
                gate,
            )
            self._run_all(call.requests)
        left = [request.exit_layer is not None for request in call.requests]
        rows = scores if gate is None else scores[[not has_left for has_left in left]]
        if not rows.isfinite().all():
            raise NumericalError("the model gave NaN or infinite logits for a choice; try dtype='float32'")
        return scores.softmax(-1)

    def _questions(
        self, question: str | SequenceOf[int] | SequenceOf[SequenceOf[int]], num_branches: int
    ) -> list[list[int]]:
        """Token ids of the question of each branch."""
        if isinstance(question, str) or all(isinstance(token, int) for token in question):
            return [self.encode_fragment(question)] * num_branches  # type: ignore[arg-type]
        if len(question) != num_branches:
            raise ConfigError(f"{len(question)} questions for {num_branches} branches; give one, or one a branch")
        return [list(tokens) for tokens in question]  # type: ignore[arg-type]

    def probe(self, tau: float | None, *, aligned: bool, uncalibrated: bool) -> Probe:
        """A gate that compares wordings of a problem, for seats of `branches`; see `minirksc.asks.make_probe`."""
        can_move_kv = self.engine.runner.model.can_move_kv
        return make_probe(self.spec, tau, aligned=aligned, can_move_kv=can_move_kv, uncalibrated=uncalibrated)

    def paper_probe(self, tau: float | None, *, aligned: bool) -> Probe:
        """The paper's own rule as such a gate; see `minirksc.asks.make_paper_probe`."""
        return make_paper_probe(self.spec, tau, aligned=aligned)

    # Housekeeping

    def stats(self) -> Stats:
        """Counters since start, and what the engine runs on; see the keys for units."""
        runner = self.engine.runner
        model = runner.model
        head_dims = {layer.head_dim for layer in self.spec.layers}
        resident, peak = resident_bytes()
        return {
            **self.engine.stats(),
            "load_s": self._load_s,
            "pack_s": self._pack_s,  # of load_s
            # Of the whole process, everything that it has loaded included; None where the system does not say.
            "resident_bytes": resident,
            "peak_resident_bytes": peak,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_cache_dtype": str(runner.cache.dtype).removeprefix("torch."),
            "quantize": self.config.quantize,
            "weight_bytes": model.weight_bytes,
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "backend": model.backend.name,
            # Why a CPU does without the compiled operations.
            "backend_note": None if model.backend.name != "torch" else why_not(model.dtype, head_dims),
            "num_recorded_steps": 0 if runner.recorded is None else runner.recorded.num_steps,
            "eager_steps": {} if runner.recorded is None else dict(runner.recorded.eager_steps),
        }

    def evictions(self) -> list[Eviction]:
        """What had to make room in the prefix cache lately, oldest first: why, and whether it was needed again."""
        return self.engine.blocks.evictions

    def lens(self, token_ids: SequenceOf[int] | None = None) -> Callable[[Tensor], Tensor]:
        """Reads hidden states of any layer as logits; see `Decoder.lens`. Kept, since making it copies the head.

        Args:
            token_ids: whose logits; None: all of the vocabulary.
        """
        key = None if token_ids is None else tuple(token_ids)
        if key not in self._lenses:
            self._lenses[key] = self.engine.runner.model.lens(key)
        return self._lenses[key]

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block that no sequence uses."""
        self.engine.blocks.reset()

    def encode_fragment(self, tokens: str | SequenceOf[int]) -> list[int]:
        """Token ids of text that continues something: no BOS. Token ids pass through."""
        if isinstance(tokens, str):
            return self.need_tokenizer("text").encode(tokens, add_special_tokens=False)
        return list(tokens)

    def decode(self, token_ids: SequenceOf[int]) -> str:
        """Text of token ids, special tokens left out; "" without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids)

    # Inside

    def need_tokenizer(self, what: str) -> Tokenizer:
        """The tokenizer.

        Raises:
            TokenizerError: there is none, so `what` cannot be used.
        """
        if self.tokenizer is None:
            raise TokenizerError(f"{self.model_path} has no tokenizer, so {what} cannot be used; give token ids")
        return self.tokenizer

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text or None, token ids) of one prompt."""
        is_text = isinstance(prompt, str) or (isinstance(prompt, Mapping) and "prompt" in prompt)
        return text_and_ids(prompt, self.need_tokenizer("text") if is_text else None)

    def _resolve(self, params: SamplingParams) -> SamplingParams:
        return params.resolved(self.sampling_defaults)

    def _next_seed(self) -> int:
        """Requests without a seed get the LLM's own, one after the other: a run can be repeated."""
        self._num_seeds += 1
        return self.config.seed + self._num_seeds - 1

    def _start(self, call: Call, prompt: Prompt, params: SamplingParams, return_errors: bool) -> Job:
        job = Job(None, [], params)
        try:
            job.prompt, job.token_ids = self._encode(prompt)
            job.params = params = self._resolve(params)
            job.add_requests(self.engine, call, self._next_seed() if params.seed is None else params.seed)
        except MinirkscError as error:
            for request in job.requests:
                self.engine.abort(request)
            if not return_errors:
                raise
            job.requests.clear()
            job.error = error
        return job

    def _run(self, requests: SequenceOf[Request]) -> Iterator[None]:
        """Steps the engine until all of these have finished; a pause after every step."""
        while not all(request.finished for request in requests):
            self.engine.step()
            yield

    def _run_all(self, requests: SequenceOf[Request]) -> None:
        """Runs until all have finished; raises the first error among them."""
        for _ in self._run(requests):
            pass
        self._raise_first_error(requests)

    def _raise_first_error(self, requests: SequenceOf[Request]) -> None:
        for request in requests:
            if request.error is not None:
                raise request.error


def _store(out: Tensor, first: int, rows: Tensor) -> None:
    out[first : first + len(rows)] = rows
