"""What a prompt gives: its requests, what is new of them since the last time, and the result that they make."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from minirksc.engine.calls import Call
from minirksc.engine.engine import Engine
from minirksc.engine.request import Request, Salt
from minirksc.engine.sampling import top_logprobs_of
from minirksc.options import SamplingParams


@dataclass(slots=True)
class CompletionOutput:
    """One generated sample.

    Attributes:
        index: which of the prompt's n samples.
        text: without the stop string unless it was asked for.
        token_ids: generated tokens, the one that ended it included.
        cumulative_logprob: sum over token_ids, under the raw model distribution.
        logprobs: per token {token id: logprob}, the chosen token and the top k; None unless asked for.
        finish_reason: "stop" or "abort"; "length" at max_tokens, or before where the cache has no room. A sample that
            failed has no output: its error is the prompt's.
        stop_reason: the stop string or token id that ended it; None for EOS and length.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, float]] | None
    finish_reason: str | None
    stop_reason: str | int | None


@dataclass(slots=True)
class RequestOutput:
    """Everything that one prompt gave.

    Attributes:
        request_id: number of the first sample's request.
        prompt: the text, None when token ids were given.
        prompt_token_ids: what the model saw.
        outputs: one a sample.
        num_cached_tokens: prompt tokens that the first sample took from the prefix cache, in whole blocks.
        prompt_logprobs: per prompt token {token id: logprob} (None for the first); None unless asked for.
        error: why the prompt failed, when errors are returned instead of raised.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, float] | None] | None = None
    error: Exception | None = None


@dataclass(slots=True, frozen=True)
class StreamChunk:
    """New text of one sample, safe to show.

    Attributes:
        index: which of the prompt's n samples.
        text: new since the last chunk; never half a character or the beginning of a stop string.
        token_ids: new since the last chunk.
        finish_reason: None until the sample's last chunk, which may have neither text nor tokens.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclass(slots=True)
class ChunkReader:
    """Reads a request piece by piece: each reader gets everything exactly once, wherever the engine is stepped.

    Attributes:
        request: request that is read.
        index: which of the prompt's n samples it is.
    """

    request: Request
    index: int
    _num_pieces: int = 0
    _num_tokens: int = 0
    _has_ended: bool = False

    def read(self) -> StreamChunk | None:
        """What is new since the last time, the end included; None when nothing is.

        Raises:
            MinirkscError: the request has failed, and all that came before has been read.
        """
        request = self.request
        pieces = request.pieces[self._num_pieces :]
        token_ids = request.output_token_ids[self._num_tokens :]
        self._num_pieces += len(pieces)
        self._num_tokens += len(token_ids)
        if request.error is not None and not token_ids:
            raise request.error
        ends = request.finished and request.error is None
        if self._has_ended or not (token_ids or pieces or ends):
            return None
        self._has_ended = ends
        return StreamChunk(self.index, "".join(pieces), token_ids, request.finish_reason if ends else None)


@dataclass(slots=True)
class Job:
    """What one prompt of a call became: its n requests, or the error that kept them from starting.

    Attributes:
        prompt: the text; None where token ids were given.
        token_ids: tokens of the prompt.
        params: sampling parameters of all samples, resolved.
        requests: one a sample.
        prompt_logprobs: position -> {token id: logprob}, as far as they are computed.
        error: why there are no requests.
    """

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    requests: list[Request] = field(default_factory=list)
    prompt_logprobs: dict[int, dict[int, float]] = field(default_factory=dict)
    error: Exception | None = None
    _readers: list[ChunkReader] = field(default_factory=list)

    def add_requests(self, engine: Engine, call: Call, salt: Salt | None) -> None:
        """Hands the samples to the engine; sample i is what a request of its own with seed + i would give.

        Args:
            engine: engine that runs them.
            call: the call to which they belong.
            salt: salt of the prompt.

        Raises:
            ConfigError, PromptError, CacheFullError: those that were added remain.
        """
        one = replace(self.params, n=1, seed=None, prompt_logprobs=None)
        seed = engine.next_seed() if self.params.seed is None else self.params.seed
        for index in range(self.params.n):
            wants_prompt = index == 0 and self.params.prompt_logprobs is not None
            request = engine.add_request(
                engine.new_sequence(self.token_ids, salt=salt),
                one,
                seed=seed + index,
                logits_start=0 if wants_prompt else None,
                on_logits=self._store_prompt_logprobs if wants_prompt else None,
                call=call,
            )
            self.requests.append(request)
            self._readers.append(ChunkReader(request, index))

    def new_chunks(self) -> list[StreamChunk]:
        """What is new of all samples since the last time, the ends included; [] when nothing is.

        Raises:
            MinirkscError: a sample has failed, and all that came before has been read.
        """
        return [chunk for reader in self._readers if (chunk := reader.read()) is not None]

    def _store_prompt_logprobs(self, first: int, logits: Tensor) -> None:
        # The logits at position p are those of the token at p + 1.
        following = self.token_ids[first + 1 : first + 1 + len(logits)]
        top = top_logprobs_of(logits[: len(following)], following, self.params.prompt_logprobs or 0)
        self.prompt_logprobs.update(enumerate(top, start=first + 1))

    def result(self) -> RequestOutput:
        """What has come of it; samples that failed are left out, and the first error is named."""
        error = self.error or next((request.error for request in self.requests if request.error), None)
        prompt_logprobs: list[dict[int, float] | None] | None = None
        if self.params.prompt_logprobs is not None:
            prompt_logprobs = [self.prompt_logprobs.get(p) for p in range(len(self.token_ids))]
        return RequestOutput(
            request_id=self.requests[0].request_id if self.requests else -1,
            prompt=self.prompt,
            prompt_token_ids=self.token_ids,
            outputs=[_completion(i, request) for i, request in enumerate(self.requests) if request.error is None],
            num_cached_tokens=(self.requests[0].num_cached_tokens or 0) if self.requests else 0,
            prompt_logprobs=prompt_logprobs,
            error=error,
        )


def _completion(index: int, request: Request) -> CompletionOutput:
    checker = request.checker
    assert checker is not None
    return CompletionOutput(
        index=index,
        text=request.text,
        token_ids=request.output_token_ids,
        cumulative_logprob=sum(request.logprobs),
        logprobs=request.top_logprobs if request.params.logprobs is not None else None,
        finish_reason=request.finish_reason,
        stop_reason=checker.stop_reason,
    )
