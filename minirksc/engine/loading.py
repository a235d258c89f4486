"""From a model name to a running engine, in four steps.

What the folder says besides the weights is read; device, dtype and backend are chosen; the weights are loaded; and the
cache gets a part of what memory remains.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minirksc.cache.hybrid import HybridManager, WindowPool, min_blocks
from minirksc.cache.rsbcm import BlockBytes, BlockManager
from minirksc.checkpoints.folder import check_config
from minirksc.checkpoints.sources import resolve_model
from minirksc.engine import host
from minirksc.engine.engine import Engine
from minirksc.engine.graphs import MAX_GRAPH_BATCH, CudaRecorder, DecodeGraphs
from minirksc.engine.kv_tensors import block_bytes
from minirksc.engine.recorded import Recordings
from minirksc.engine.runner import Runner
from minirksc.engine.tapes import DecodeTapes
from minirksc.errors import CacheFullError, CheckpointError, ConfigError
from minirksc.json_file import read_json_object
from minirksc.kernels.backend import Backend, choose_backend
from minirksc.kernels.native.ops import why_not
from minirksc.kernels.weights.int8_weight import why_not_int8
from minirksc.kernels.weights.linear import NativePacker, auto_dtype
from minirksc.models.config.fields import Fields, stored_dtype
from minirksc.models.decoder import Decoder
from minirksc.models.families import load_config, spec_from_config
from minirksc.models.spec import ArchSpec
from minirksc.models.weights.rules import iter_weights
from minirksc.options import EngineConfig, SamplingParams
from minirksc.text.codecs import TOKENIZER_FILES
from minirksc.text.tokenizer import Tokenizer

KV_SHARE_OF_FREE_MEMORY = 0.4
MAX_DEFAULT_SEQUENCES = 32
"""The default cache holds at most so many sequences of full length; more is asked for by kv_cache_bytes."""

SILENT_S = 1.0
"""A progress bar is shown after so long."""

TRIM_BYTES = 64 << 20
"""After so many bytes of weights freed memory is given back: packed ones do not fit into the holes of the others."""

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Loaded:
    """A running engine and where it came from.

    Attributes:
        engine: the engine.
        config: options, with max_model_len resolved.
        model_path: folder of the checkpoint.
        load_s: time that `load` took.
        pack_s: part of it in which the model was made of the tensors that were read: above all, matrices put into the
            form that the backend multiplies with.
    """

    engine: Engine
    config: EngineConfig
    model_path: Path
    load_s: float
    pack_s: float


@dataclass(frozen=True)
class _Checkpoint:
    """What a folder says besides the weights: config.json as it is and as a spec, generation_config.json."""

    path: Path
    raw: dict[str, Any]
    spec: ArchSpec
    generation: dict[str, Any]
    tokenizer: Tokenizer | None


@dataclass(frozen=True)
class _Target:
    """Where and in what form a model will run."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    number_bytes: int  # least memory that a number of the weights takes
    backend: Backend


def load(config: EngineConfig, use_tqdm: bool = False) -> Loaded:
    """Loads the model and allocates its cache.

    Args:
        config: the options.
        use_tqdm: progress bar on stderr, if it takes a while.

    Raises:
        CheckpointError, UnsupportedModelError: the folder cannot be read or run.
        ConfigError: an option does not fit this machine or model.
        CacheFullError: kv_cache_bytes is smaller than one block, or more than there is.
    """
    start = time.perf_counter()
    checkpoint = _read_checkpoint(config)
    config = replace(config, max_model_len=_choose_max_model_len(config.max_model_len, checkpoint.spec))
    target = _choose_target(config, checkpoint)
    model, pack_s = _load_weights(checkpoint, target, use_tqdm)
    runner, blocks, size = _make_cache(config, target, model)
    engine = Engine(
        runner,
        blocks,
        config,
        size,
        _eos_token_ids(checkpoint),
        checkpoint.tokenizer,
        _sampling_defaults(checkpoint.generation),
    )
    return Loaded(engine, config, checkpoint.path, time.perf_counter() - start, pack_s)


def _read_checkpoint(config: EngineConfig) -> _Checkpoint:
    path = resolve_model(config.model)
    check_config(path)
    raw = load_config(path)
    spec = spec_from_config(raw, config.ignore_config_keys)
    # Without one token ids still work, and text is refused by name; a damaged one is an error.
    has_tokenizer = any((path / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = Tokenizer.from_folder(path) if has_tokenizer else None
    if tokenizer is not None:
        tokenizer.check_fits(spec.vocab_size)
    return _Checkpoint(path, raw, spec, read_json_object(path / "generation_config.json"), tokenizer)


def _choose_target(config: EngineConfig, checkpoint: _Checkpoint) -> _Target:
    device = _choose_device(config.device)
    dtype = auto_dtype(stored_dtype(checkpoint.raw), device) if config.dtype == "auto" else getattr(torch, config.dtype)
    head_dims = {layer.head_dim for layer in checkpoint.spec.layers}
    backend = choose_backend(config.backend, device, dtype, head_dims)
    backend.check_block_size(config.block_size)
    if config.kv_split != "fixed" and not backend.splits_keys:
        raise ConfigError(
            f"kv_split {config.kv_split!r} is for the triton backend, and this is {backend.name}; leave it out"
        )
    number_bytes = dtype.itemsize
    if config.quantize == "int8":
        missing = why_not(dtype, head_dims) if config.backend == "auto" else None
        reason = missing or (why_not_int8(dtype) if backend.name == "native" else f"this is the {backend.name} one")
        if reason is not None:
            raise ConfigError(f"quantize 'int8' is for the native backend of a CPU, but {reason}; leave it out")
        backend = replace(backend, packer=partial(NativePacker, int8=True))
        number_bytes = 1
    kv_dtype = torch.int8 if config.kv_cache_dtype == "int8" else dtype
    return _Target(device, dtype, kv_dtype, number_bytes, backend)


def _load_weights(checkpoint: _Checkpoint, target: _Target, use_tqdm: bool) -> tuple[Decoder, float]:
    """(the model, seconds that went into making it of the tensors that were read)."""
    spec, total = checkpoint.spec, _total_bytes(target.device)
    max_numbers = None if total is None else total // target.number_bytes
    reading = _Reading(iter_weights(checkpoint.path, spec, target.dtype, max_numbers), target.device)
    begin = time.perf_counter()
    with tqdm(total=spec.num_layers, disable=not use_tqdm, delay=SILENT_S, leave=False, unit="layer") as bar:
        model = Decoder(spec, reading.tensors(bar), target.backend)
    pack_s = time.perf_counter() - begin - reading.read_s
    host.trim_heap()
    host.keep_freed_blocks()
    return model, pack_s


def _make_cache(config: EngineConfig, target: _Target, model: Decoder) -> tuple[Runner, BlockManager, BlockBytes]:
    """(model with a cache as large as it may be, the block manager of its blocks, what one block takes)."""
    spec, device = model.spec, target.device
    assert config.max_model_len is not None
    window = spec.retained_window
    if window is not None and window >= config.max_model_len:
        window = None  # it never hides anything
    size = block_bytes(spec, config.block_size, target.kv_dtype, window)
    budget = _cache_budget(config, spec, size, _free_bytes(device) if config.kv_cache_bytes is None else 0)
    num_blocks, num_window_blocks = _num_blocks(config, size, window, budget)
    try:
        runner = Runner(model, num_blocks, num_window_blocks, config.block_size, target.kv_dtype)
    except (OSError, RuntimeError) as error:  # what mmap and torch raise where there is no room
        raise CacheFullError(
            f"no room for a KV cache of {budget} bytes, and {_free_bytes(device)} are free; "
            "lower kv_cache_bytes (--kv-cache-bytes)"
        ) from error
    runner.recorded = None if config.enforce_eager else _recordings(config, target, runner)
    if window is None:
        return runner, BlockManager(num_blocks, config.block_size, config.eviction), size
    windows = WindowPool(num_window_blocks, window, config.block_size)
    return runner, HybridManager(num_blocks, config.block_size, windows, config.eviction), size


def _recordings(config: EngineConfig, target: _Target, runner: Runner) -> Recordings[Any] | None:
    """What replays decode steps in the form that the backend can record; None: it can record none."""
    model, layers, recording = runner.model, runner.cache.layers, target.backend.recording
    if recording == "tape":
        return DecodeTapes(model, layers)
    if recording != "graph" or target.device.type != "cuda":
        return None
    assert config.max_model_len is not None
    max_batch = min(config.max_batch_requests, MAX_GRAPH_BATCH)
    return DecodeGraphs(model, layers, config.block_size, max_batch, config.max_model_len, CudaRecorder(target.device))


@dataclass
class _Reading:
    """Hands the weights on, and measures how long they take to come.

    Attributes:
        weights: tensors of `iter_weights`.
        device: device that they go to.
        read_s: time spent on reading so far.
    """

    weights: Iterator[tuple[str, Tensor]]
    device: torch.device
    read_s: float = 0.0

    def tensors(self, bar: Any) -> Iterator[tuple[str, Tensor]]:
        """All of them; the bar goes on layer by layer."""
        num_bytes = 0
        while True:
            begin = time.perf_counter()
            named = next(self.weights, None)
            if named is None:
                return
            name, tensor = named
            tensor = tensor.to(self.device)
            self.read_s += time.perf_counter() - begin
            if name.startswith("layers."):
                bar.update(int(name.split(".")[1]) - bar.n)
            num_bytes += tensor.nbytes
            if num_bytes > TRIM_BYTES:
                host.trim_heap()
                num_bytes = 0
            yield name, tensor


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: no CUDA device is visible; use device='cpu'")
    return device


def _choose_max_model_len(asked: int | None, spec: ArchSpec) -> int:
    if asked is not None and asked > spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {asked} is more than the {spec.max_position_embeddings} positions that the model "
            "was made for; lower max_model_len"
        )
    return asked or spec.max_position_embeddings


def _cache_budget(config: EngineConfig, spec: ArchSpec, size: BlockBytes, free: int) -> int:
    """Bytes for the KV cache: as asked for, else a part of those that are free once the weights are loaded."""
    if config.kv_cache_bytes is not None:
        return int(config.kv_cache_bytes)
    per_sequence = -(-spec.max_position_embeddings // config.block_size) * (size.full + size.window)
    return min(int(free * KV_SHARE_OF_FREE_MEMORY), MAX_DEFAULT_SEQUENCES * per_sequence)


def _num_blocks(config: EngineConfig, size: BlockBytes, window: int | None, budget: int) -> tuple[int, int]:
    """(blocks, blocks of the window pool) that fit into so many bytes.

    Where there are two pools each gets half of the bytes: whatever a workload would make of all of them, with the best
    split for it, it can make of this with twice as many. A window never needs more blocks than there are.
    """
    least = 0 if window is None else min_blocks(window, config.block_size)
    needed = size.full * max(least, 1) + size.window * least
    if budget < needed:
        what = "one block" if window is None else f"what one window of {window} tokens takes"
        chosen = "" if config.kv_cache_bytes is not None else ", chosen from what is free,"
        raise CacheFullError(
            f"kv_cache_bytes {budget}{chosen} is less than {what}: with block_size {config.block_size} this model "
            f"needs {needed} bytes; raise kv_cache_bytes (--kv-cache-bytes) or lower block_size"
        )
    if window is None:
        return budget // size.full, 0
    num_window_blocks = max(budget // 2 // size.window, least)
    num_blocks = (budget - num_window_blocks * size.window) // size.full
    if num_blocks < num_window_blocks:
        num_blocks = num_window_blocks = budget // (size.full + size.window)
    return num_blocks, num_window_blocks


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host.free_bytes()


def _total_bytes(device: torch.device) -> int | None:
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else host.total_bytes()


def _sampling_defaults(generation: dict[str, Any]) -> dict[str, float]:
    defaults = {name: generation[name] for name in SAMPLING_DEFAULTS if generation.get(name) is not None}
    switches = Fields(generation, "generation_config.json")
    switches.default(do_sample=True)
    if not switches.flag("do_sample"):
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except ConfigError as error:
        raise CheckpointError(f"generation_config.json: {error}; mend the file") from error
    return defaults


def _eos_token_ids(checkpoint: _Checkpoint) -> frozenset[int]:
    """All that any of the checkpoint's files names: each of them may know one that the others do not."""
    spec, tokenizer = checkpoint.spec, checkpoint.tokenizer
    ids = {*spec.eos_token_ids, *Fields(checkpoint.generation, "generation_config.json").token_ids("eos_token_id")}
    if tokenizer is not None:
        ids |= tokenizer.eos_token_ids
    return frozenset(i for i in ids if i < spec.vocab_size)  # no other can be drawn
