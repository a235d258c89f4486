"""Attention of a mixed batch (prefills, chunks of prefills, decode rows) over the paged KV cache.

Formula, per query token i of a sequence with `context_len` keys: softmax(s(q_i k_j * scale)) v_j over all j that are
not after i and, with a window W, not before i - W + 1; query heads read KV head `head // (num_heads /
num_kv_heads)`. With a soft cap c, s(x) = c tanh(x / c), else s(x) = x. Softmax in float32.
"""

import torch
from minirksc.kernels.attention_batch import AttentionBatch
from torch import Tensor


def paged_attention_reference(
    q: Tensor, kv: Tensor, layer_cache: Tensor, batch: AttentionBatch, scale: float, softcap: float | None
) -> Tensor:
    """The specification, sequence by sequence in float32.

    Args:
        q: `[tokens, num_heads, head_dim]`.
        kv: `[tokens, 2, num_kv_heads, head_dim]`, new keys and values; unused here, they are in the cache.
        layer_cache: `[num_blocks, block_size, 2, num_kv_heads, head_dim]`.
        batch: where queries and keys are.
        scale: multiplied to the scores.
        softcap: c of c * tanh(score / c); None for none.

    Returns:
        `[tokens, num_heads, head_dim]`, dtype of q.
    """
    out = torch.empty_like(q)
    group, size = q.shape[1] // layer_cache.shape[3], batch.block_size
    for i, (context_len, table) in enumerate(zip(batch.context_lens, batch.kv_tables, strict=True)):
        begin, end = batch.cu_seqlens_q[i], batch.cu_seqlens_q[i + 1]
        first_query = context_len - (end - begin)
        first_key = batch.first_visible(first_query)
        slots = [table[p // size] * size + p % size for p in range(first_key, context_len)]
        own = layer_cache.flatten(0, 1)[slots].float()  # [keys, 2, num_kv_heads, head_dim]
        keys, values = own.repeat_interleave(group, dim=2).unbind(1)  # [keys, num_heads, head_dim]
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query_at = torch.arange(first_query, context_len, device=q.device)[:, None]
        key_at = torch.arange(first_key, context_len, device=q.device)
        visible = key_at <= query_at  # [queries, keys]
        if batch.window is not None:
            visible &= key_at > query_at - batch.window
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)  # [num_heads, queries, keys]
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out
