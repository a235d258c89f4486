"""What the kernels that use the KV cache can take; everything else is refused before anything is launched."""

import torch
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.kernels.attention.launch_table import max_head_dim, max_short_rows, product_dtype
from minirksc.kernels.jit import DTYPES
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.kernels.kv.placement import HeadNorms, Placement
from minirksc.kernels.rms_norm import check_norm_weight

MAX_HEAD_DIM = 1024
MAX_BLOCK_SIZE = 256


def check_kv_store(qkv: Tensor, norms: HeadNorms, placement: Placement) -> None:
    """Refuses what `kv_store_triton` cannot serve.

    Args:
        qkv: heads, as in `kv_store_reference`.
        norms: norms of the layer's heads.
        placement: positions of the tokens, and the place of their keys and values.

    Raises:
        ConfigError: a dtype, a shape or a stride is wrong.
    """
    num_heads = norms.num_heads
    rope, query_growth, cache, slots = placement
    if qkv.dtype not in DTYPES:
        raise ConfigError(f"qkv is {qkv.dtype}; the kernel takes float32, float16 and bfloat16")
    if qkv.dim() != 3 or not 0 < num_heads <= qkv.shape[1] or (qkv.shape[1] - num_heads) % 2:
        heads = "[tokens, num_heads + 2 * num_kv_heads, head_dim]"
        raise ConfigError(f"qkv has shape {list(qkv.shape)} with {num_heads} heads of q; it must be {heads}")
    tokens, _, head_dim = qkv.shape
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ConfigError(f"head_dim is {head_dim}; the kernel takes even ones up to {MAX_HEAD_DIM}")
    if qkv.stride(2) != 1:
        raise ConfigError(f"heads of qkv have stride {qkv.stride(2)}; they must be contiguous, of stride 1")
    check_norm_weight("q_norm", norms.q_norm, head_dim, qkv.dtype)
    check_norm_weight("k_norm", norms.k_norm, head_dim, qkv.dtype)
    if rope is not None:
        check_rope(rope, tokens, head_dim)
    if query_growth is not None and (
        query_growth.shape != (tokens, 1, 1) or not query_growth.is_contiguous() or query_growth.dtype not in DTYPES
    ):
        given = f"query_growth is {list(query_growth.shape)} {query_growth.dtype}"
        raise ConfigError(f"{given}; it must be [{tokens}, 1, 1], contiguous, float32, float16 or bfloat16")
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    if (cache is None) != (num_kv_heads == 0):
        given = f"{num_kv_heads} heads of k and v and {'no' if cache is None else 'a'} cache"
        raise ConfigError(f"{given}; new keys and values need a cache, and without them there must be none")
    if cache is not None:
        check_cache(cache)
        if cache.kv.shape[3:] != (num_kv_heads, head_dim) or cache.kv.dtype not in (qkv.dtype, torch.int8):
            given = f"the cache holds {list(cache.kv.shape[3:])} {cache.kv.dtype} a token"
            raise ConfigError(f"{given}; it must be [{num_kv_heads}, {head_dim}] {qkv.dtype}, as qkv, or int8")
        check_slots("slots", slots, tokens)


def check_slots(name: str, slots: Tensor, tokens: int) -> None:
    """Refuses slots that a kernel cannot read.

    Args:
        name: name of the argument.
        slots: slots of the tokens.
        tokens: number of tokens.

    Raises:
        ConfigError: a dtype, a shape or a stride is wrong.
    """
    if slots.shape != (tokens,) or slots.dtype not in (torch.int64, torch.int32) or not slots.is_contiguous():
        given = f"{name} are {list(slots.shape)} {slots.dtype}"
        raise ConfigError(f"{given}; they must be [{tokens}], one a token, contiguous, int64 or int32")


def check_rope(rope: tuple[Tensor, Tensor], tokens: int, head_dim: int) -> None:
    """Refuses tables that a kernel cannot read.

    Args:
        rope: tables (cos, sin) as of `rope_tables`.
        tokens: number of tokens that there must be.
        head_dim: largest rotary_dim.

    Raises:
        ConfigError: a dtype, a shape or a stride is wrong.
    """
    cos, sin = rope
    rotary_dim = cos.shape[-1]
    if cos.shape != (tokens, 1, rotary_dim) or rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        limit = f"[{tokens}, 1, rotary_dim], with an even rotary_dim up to {head_dim}"
        raise ConfigError(f"the tables of rope have shape {list(cos.shape)}; they must be {limit}")
    if cos.dtype not in DTYPES or (sin.dtype, sin.shape) != (cos.dtype, cos.shape):
        given = f"{list(cos.shape)} {cos.dtype} and {list(sin.shape)} {sin.dtype}"
        raise ConfigError(f"the tables of rope are {given}; both must be alike, float32, float16 or bfloat16")
    if cos.stride(2) != 1 or sin.stride() != cos.stride():
        strides = f"{cos.stride()} and {sin.stride()}"
        raise ConfigError(f"the tables of rope have strides {strides}; they must be alike, with rows of stride 1")


def check_cache(cache: LayerCache) -> None:
    """Refuses a cache that a kernel cannot read.

    Args:
        cache: cache of one layer.

    Raises:
        ConfigError: a dtype, a shape or a stride is wrong.
    """
    kv, scales = cache
    if kv.dim() != 5 or kv.shape[2] != 2 or not kv.is_contiguous():
        limit = "[num_blocks, block_size, 2, num_kv_heads, head_dim] and contiguous"
        raise ConfigError(f"the cache has shape {list(kv.shape)} and strides {kv.stride()}; it must be {limit}")
    if kv.shape[4] % 2 or not 0 < kv.shape[4] <= MAX_HEAD_DIM:
        raise ConfigError(f"head_dim of the cache is {kv.shape[4]}; the kernel takes even ones up to {MAX_HEAD_DIM}")
    if kv.dtype not in (DTYPES if scales is None else (torch.int8,)):
        has = "no scales" if scales is None else "scales"
        limit = "float32, float16 or bfloat16 without, or int8 with scales"
        raise ConfigError(f"the cache is {kv.dtype} with {has}; it must be {limit}")
    if scales is not None and (
        scales.shape != kv.shape[:-1] or scales.dtype != torch.float32 or not scales.is_contiguous()
    ):
        given = f"the scales of the cache are {list(scales.shape)} {scales.dtype}"
        raise ConfigError(f"{given}; they must be {list(kv.shape[:-1])} float32, contiguous")


def check_attention(q: Tensor, cache: LayerCache, block_size: int) -> None:
    """Refuses what `paged_attention_triton` cannot serve.

    Args:
        q: `[tokens, num_heads, head_dim]`.
        cache: cache of the layer.
        block_size: number of tokens a block.

    Raises:
        ConfigError: a dtype, a shape or a stride is wrong.
    """
    check_cache(cache)
    kv = cache.kv
    num_heads, head_dim = q.shape[1:]
    if q.dtype not in DTYPES:
        raise ConfigError(f"paged_attention: queries of {q.dtype}; it takes float32, float16 and bfloat16")
    if kv.dtype not in (q.dtype, torch.int8):
        raise ConfigError(f"paged_attention: a cache of {kv.dtype} for queries of {q.dtype}; it takes theirs or int8")
    products = product_dtype(q.dtype, kv.dtype)
    if head_dim > max_head_dim(products):
        raise ConfigError(
            f"paged_attention: head_dim {head_dim} in {q.dtype}; it takes {max_head_dim(torch.float32)} in float32 and "
            f"{max_head_dim(torch.bfloat16)} in 16 bits (dtype='bfloat16')"
        )
    most = max_short_rows(head_dim, products)
    if kv.shape[4] != head_dim or num_heads % kv.shape[3] or num_heads // kv.shape[3] > most:
        raise ConfigError(
            f"paged_attention: {num_heads} query heads of {head_dim} on {kv.shape[3]} KV heads of {kv.shape[4]}; "
            f"it takes equal sizes, and 1 to {most} query heads for each KV head"
        )
    if block_size & (block_size - 1) or not 1 <= block_size <= MAX_BLOCK_SIZE or kv.shape[1] != block_size:
        raise ConfigError(
            f"paged_attention: blocks of {block_size} tokens on a cache of blocks of {kv.shape[1]}; "
            f"it takes powers of two to {MAX_BLOCK_SIZE}"
        )
    if q.stride(2) != 1 or q.stride(1) != head_dim:
        raise ConfigError(f"paged_attention: queries of strides {q.stride()}; a token's heads must lie side by side")
