"""What an engine has done and what it runs on, as plain data."""

from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minirksc.cache.rsbcm import BlockBytes, BlockManager
from minirksc.engine.gated_pass import GatedPass
from minirksc.engine.runner import Runner
from minirksc.engine.scheduler import ScheduledRequest, Scheduler
from minirksc.kernels.native.ops import why_not

Stats = dict[str, Any]


@dataclass(slots=True)
class Counters:
    """What an engine has done since its start.

    Attributes:
        num_steps: steps that computed something.
        num_prefilled_tokens: tokens that were computed, but for those that their own request has sampled.
        num_decoded_tokens: tokens that were sampled.
        num_layer_rows: tokens times the layers that computed them.
        num_saved_layer_rows: the same, for what gates made unnecessary.
        prefill_s: time of steps that computed some prompt.
        decode_s: time of all others.
        num_tokens_in_decode_s: tokens that were sampled in these.
    """

    num_steps: int = 0
    num_prefilled_tokens: int = 0
    num_decoded_tokens: int = 0
    num_layer_rows: int = 0
    num_saved_layer_rows: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_tokens_in_decode_s: int = 0

    def count_step(
        self, scheduled: SequenceOf[ScheduledRequest], gated: GatedPass, num_layers: int, seconds: float
    ) -> None:
        """Adds one step; what it sampled is counted token by token.

        Args:
            scheduled: what it computed.
            gated: what its gates have spared it.
            num_layers: layers of the model.
            seconds: time that it took.
        """
        num_rows = sum(item.num_tokens for item in scheduled)
        num_prefilled = sum(item.num_tokens for item in scheduled if not item.is_decode) - gated.num_departed_rows
        self.num_steps += 1
        self.num_layer_rows += num_rows * num_layers - gated.num_saved_layer_rows
        self.num_saved_layer_rows += gated.num_saved_layer_rows
        self.num_prefilled_tokens += num_prefilled
        if num_prefilled:
            self.prefill_s += seconds
        else:
            self.decode_s += seconds
            self.num_tokens_in_decode_s += num_rows


def work_done(counters: Counters, scheduler: Scheduler, blocks: BlockManager, size: BlockBytes) -> Stats:
    """Counters since start and the state of the cache.

    num_layer_rows are tokens times the layers that computed them, num_saved_layer_rows those that gates made
    unnecessary; tokens that departed between layers are not in num_prefilled_tokens.

    Where layers with a window have a pool apart, `num_window_blocks_*` count its blocks, and `kv_bytes_used_window`
    is what they hold; all other layers are in `num_blocks_*` and `kv_bytes_used_full`.

    Args:
        counters: counters of the engine.
        scheduler: scheduler of the engine.
        blocks: block manager of the engine.
        size: bytes of one block.
    """
    windows, done = blocks.window_counts, asdict(counters)
    num_timed = done.pop("num_tokens_in_decode_s")
    return {
        **done,
        "decode_tokens_per_s": num_timed / counters.decode_s if counters.decode_s else 0.0,
        "num_cached_tokens": scheduler.num_cached_tokens,
        "num_evicted_blocks": blocks.num_evicted_blocks,
        "num_recomputed_tokens": blocks.num_recomputed_tokens,
        "num_blocks_pinned": blocks.num_pinned,
        "num_preemptions": scheduler.num_preemptions,
        "num_blocks_total": blocks.num_blocks,
        "num_blocks_used": blocks.num_used,
        "num_blocks_cached": blocks.num_cached,
        "num_blocks_free": blocks.num_free,
        "block_size": blocks.block_size,
        "num_window_blocks_total": windows.total,
        "num_window_blocks_used": windows.used,
        "num_window_blocks_cached": windows.cached,
        "num_window_blocks_free": windows.free,
        "kv_cache_bytes": blocks.num_blocks * size.full + windows.total * size.window,
        "kv_bytes_used_full": blocks.num_used * size.full,
        "kv_bytes_used_window": windows.used * size.window,
    }


def runs_on(runner: Runner, quantize: str, ignored_config_keys: SequenceOf[str]) -> Stats:
    """What computes, in which precision, and what was chosen for it.

    Args:
        runner: runner of the engine.
        quantize: option of `EngineConfig`.
        ignored_config_keys: fields of config.json that the options say to ignore.
    """
    model, spec = runner.model, runner.model.spec
    head_dims = {layer.head_dim for layer in spec.layers}
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(runner.cache.dtype).removeprefix("torch."),
        # How FP8 weights were stored, which are widened to dtype as they are read; None for all others.
        "checkpoint_precision": None if spec.layout.fp8 is None else str(spec.layout.fp8),
        "quantize": quantize,
        "ignored_config_keys": list(ignored_config_keys),
        "weight_bytes": model.weight_bytes,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "backend": model.backend.name,
        # Why a CPU does without the compiled operations.
        "backend_note": None if model.backend.name != "torch" else why_not(model.dtype, head_dims),
        "num_recorded_steps": 0 if runner.recorded is None else runner.recorded.num_steps,
        "eager_steps": {} if runner.recorded is None else dict(runner.recorded.eager_steps),
    }
