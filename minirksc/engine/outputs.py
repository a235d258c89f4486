"""One prompt on its way: the requests of its samples, and the result that they make."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from minirksc.engine.calls import Call
from minirksc.engine.engine import Engine
from minirksc.engine.request import CompletionOutput, Request, RequestOutput, Salt
from minirksc.engine.sampling import top_logprobs_of
from minirksc.options import SamplingParams


@dataclass(slots=True)
class Job:
    """A prompt and its n requests, or the error that kept it from starting.

    Attributes:
        prompt: the text; None where token ids were given.
        token_ids: of the prompt.
        params: of all samples, resolved.
        requests: one a sample.
        prompt_logprobs: by position, of those that are computed so far.
        error: why there are no requests.
    """

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    requests: list[Request] = field(default_factory=list)
    prompt_logprobs: dict[int, dict[int, float]] = field(default_factory=dict)
    error: Exception | None = None

    def add_requests(self, engine: Engine, call: Call, salt: Salt | None) -> None:
        """Hands the samples to the engine; sample i is what a request of its own with seed + i would give.

        Args:
            engine: theirs from now on.
            call: that they belong to.
            salt: of the prompt.

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
