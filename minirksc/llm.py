"""`LLM`: the engine as people use it. Prompts in, results out; branches; scores.

Everything here loads a model, or hands on to a `Session`. Nothing is approximated, unless quantize="int8" or
kv_cache_dtype="int8" asks for it.
"""

import functools
import os
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from minirksc.engine.engine import Engine
from minirksc.engine.host import read_cpus, resident_bytes
from minirksc.engine.loading import load
from minirksc.engine.outputs import Job, RequestOutput, StreamChunk
from minirksc.engine.prompts import (
    Conversation,
    Params,
    Prompt,
    conversation_list,
    either_params,
    one_or_many,
    params_list,
)
from minirksc.engine.request import Salt
from minirksc.engine.session import Session, raise_named
from minirksc.engine.stats import Stats
from minirksc.engine.threads import choose_threads
from minirksc.options import EngineConfig, SamplingParams

P = ParamSpec("P")
R = TypeVar("R")


def _by_session(method: Callable[Concatenate[Session, P], R]) -> Callable[Concatenate["LLM", P], R]:
    """A method of an LLM that its session does; signature and documentation are those of the session's."""

    @functools.wraps(method)
    def call(llm: "LLM", /, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = getattr(llm.session(), method.__name__)(*args, **kwargs)
        return result

    return call


class LLM:
    """A model, its KV cache and its tokenizer.

    Args:
        model: a checkpoint folder or an alias such as "smollm2-135m".
        use_tqdm: whether a progress bar is shown on stderr, if loading takes a while.
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
        choice = choose_threads(config.threads, self._threads_before, read_cpus(), os.environ)
        for warning in choice.warnings:
            warnings.warn(warning, stacklevel=2)
        self._has_set_threads = config.threads is not None or choice.threads != self._threads_before
        try:
            if self._has_set_threads:
                torch.set_num_threads(choice.threads)
            loaded = load(config, use_tqdm)
        except BaseException:
            self._restore_threads()
            raise
        self._session = session = Session(loaded.engine, loaded.config, loaded.model_path)
        self.config, self.spec, self.model_path = session.config, session.spec, session.model_path
        self.tokenizer, self.sampling_defaults = session.tokenizer, loaded.engine.sampling_defaults
        self._load_s, self._pack_s = loaded.load_s, loaded.pack_s

    @property
    def engine(self) -> Engine:
        """The engine below.

        Raises:
            EngineClosedError: after close().
        """
        return self._session.engine

    @property
    def closed(self) -> bool:
        """True after close()."""
        return self._session.closed

    def session(self) -> Session:
        """What a solver works in: branches, extended and scored on this LLM's engine."""
        return self._session

    def close(self) -> None:
        """Frees model and cache; a second call does nothing."""
        if not self.closed:
            self._session.close()
            self._restore_threads()

    def _restore_threads(self) -> None:
        """Puts back the number of torch's threads, which are the process's."""
        if self._has_set_threads:
            torch.set_num_threads(self._threads_before)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Generation

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: Params | Iterable[Params] = None,
        use_tqdm: bool = False,
        return_errors: bool = False,
        *,
        sampling_params: Params | Iterable[Params] = None,
        salt: Salt | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all of them batched together.

        Args:
            prompts: one or many, each text, token ids, {"prompt": "..."} or {"prompt_token_ids": [...]}.
            params: sampling parameters of all or one a prompt, each `SamplingParams` or a dict of its fields; None: its
                defaults.
            use_tqdm: whether a progress bar is shown on stderr.
            return_errors: whether a prompt's error is put into its result instead of raised, whatever is wrong with it.
            sampling_params: another name of `params`, that of vLLM.
            salt: text or bytes that calls have in common whose cached blocks are shared; None: those that have none. A
                prompt may bring its own as {"prompt": "...", "cache_salt": "..."}.

        Returns:
            One result a prompt, in order.

        Raises:
            ConfigError: the parameters are neither one nor one a prompt.
            ConfigError, PromptError, CacheFullError, NumericalError, TokenizerError: unless return_errors.
        """
        items, _ = one_or_many(prompts)
        params = either_params(params, sampling_params)
        jobs: list[Job] = []
        with self.engine.call() as call:
            for index, (prompt, one) in enumerate(zip(items, params_list(params, len(items)), strict=True)):
                jobs.append(self._session.start(call, prompt, one, salt))
                if not return_errors:
                    raise_named(jobs[-1].error, "prompt", index, len(items))
            with tqdm(total=len(call.requests), disable=not use_tqdm, unit="request") as bar:
                for _ in self._session.run(call.requests):
                    bar.update(sum(request.finished for request in call.requests) - bar.n)
        results = [job.result() for job in jobs]
        for index, result in enumerate(() if return_errors else results):
            raise_named(result.error, "prompt", index, len(items))
        return results

    def stream(
        self, prompt: Prompt, params: Params = None, *, sampling_params: Params = None, salt: Salt | None = None
    ) -> Generator[StreamChunk, None, RequestOutput]:
        """Completes one prompt and yields text as it becomes final; the result is the return value.

        Other calls may be made between two chunks, and other streams read in turn: what they compute for this prompt
        comes with the next chunk. Closing the generator early aborts the generation and frees its blocks.

        Raises:
            ConfigError, PromptError, CacheFullError, NumericalError, TokenizerError.
        """
        params = either_params(params, sampling_params)
        made: list[weakref.ref[Generator[StreamChunk, None, RequestOutput]]] = []

        def is_alive() -> bool:
            stream = made[0]()
            return stream is not None and stream.gi_frame is not None  # type: ignore[attr-defined]

        stream = self._stream(prompt, params, salt, is_alive)
        made.append(weakref.ref(stream))
        return stream

    def _stream(
        self, prompt: Any, params: Any, salt: Salt | None, is_alive: Callable[[], bool]
    ) -> Generator[StreamChunk, None, RequestOutput]:
        with self.engine.call(is_alive) as call:
            job = self._session.start(call, prompt, params, salt)
            if job.error is not None:
                raise job.error
            for _ in self._session.run(job.requests):
                # Until nothing is new: between two chunks the engine may have been stepped by another call.
                while chunks := job.new_chunks():
                    yield from chunks
        return job.result()

    def chat(
        self,
        conversations: Iterable[Any],
        params: Params | Iterable[Params] = None,
        use_tqdm: bool = False,
        return_errors: bool = False,
        *,
        add_generation_prompt: bool = True,
        tools: SequenceOf[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sampling_params: Params | Iterable[Params] = None,
        salt: Salt | None = None,
    ) -> list[RequestOutput]:
        """Answers conversations through the checkpoint's own chat template.

        Args:
            conversations: one list of {"role": ..., "content": ...}, a list of such lists, or a single message.
            params: sampling parameters as in `generate`.
            use_tqdm: whether a progress bar is shown on stderr.
            return_errors: whether an error is put into the result, as in `generate`.
            add_generation_prompt: whether the beginning of the assistant's turn ends each conversation.
            tools: functions that the model may call, each described by a JSON schema.
            chat_template_kwargs: other variables that the template knows, such as {"enable_thinking": False}.
            sampling_params: another name of `params`, that of vLLM.
            salt: text or bytes that calls have in common whose cached blocks are shared.

        Raises:
            ChatTemplateError: there is no template, it fails, or it does not know a variable; unless return_errors.
        """
        self.need_tokenizer("chat()")
        prompts = [
            Conversation(conversation, add_generation_prompt, tools, chat_template_kwargs)
            for conversation in conversation_list(conversations)
        ]
        params = either_params(params, sampling_params)
        return self.generate(prompts, params, use_tqdm, return_errors, salt=salt)  # type: ignore[arg-type]

    def logits(self, token_ids: Iterable[int], *, salt: Salt | None = None) -> Tensor:
        """Next-token logits at every position: `[tokens, vocab]` float32 on the CPU.

        Args:
            token_ids: tokens to compute, all of them, whatever is cached.
            salt: salt of the calls that may use what is computed here; None: no other call may.

        Raises:
            PromptError, CacheFullError.
        """
        sequence = self.engine.new_sequence(token_ids, share=salt is not None, salt=salt)
        out = torch.empty((len(sequence.token_ids), self.spec.vocab_size))  # [tokens, vocab]

        def store(first: int, rows: Tensor) -> None:
            out[first : first + len(rows)] = rows

        with self.engine.call() as call:
            self.engine.add_request(
                sequence, SamplingParams(), prefill_only=True, logits_start=0, on_logits=store, call=call
            )
            self._session.run_all(call.requests)
        return out

    # Branches

    branch = _by_session(Session.branch)
    branches = _by_session(Session.branches)
    extend = _by_session(Session.extend)
    score = _by_session(Session.score)

    # Housekeeping

    def stats(self) -> Stats:
        """Counters since start, and what the engine runs on; see the keys for units."""
        resident, peak = resident_bytes()
        return {
            **self._session.stats(),
            "load_s": self._load_s,
            "pack_s": self._pack_s,  # of load_s
            # Of the whole process, everything that it has loaded included; None where the system does not say.
            "resident_bytes": resident,
            "peak_resident_bytes": peak,
        }

    evictions = _by_session(Session.evictions)
    lens = _by_session(Session.lens)
    need_tokenizer = _by_session(Session.need_tokenizer)
    encode_fragment = _by_session(Session.encode_fragment)
    decode = _by_session(Session.decode)

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block that no sequence uses."""
        self.engine.reset_prefix_cache()
