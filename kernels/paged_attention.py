"""Attention of a mixed batch (prefills, chunks of prefills, decode rows) over the paged KV cache.

Formula, per query token i of a sequence with `context_len` keys: softmax(q_i k_j * scale) v_j over all j that
are not after i; query heads read KV head `head // (num_heads / num_kv_heads)`. Softmax in float32.

The torch form turns the batch into few large calls of the CPU flash kernel, which also returns the
log-sum-exp of its scores, and merges partials by it:
- the prefix that several decode rows share is read once for all of them (`prefix_attention`);
- a run of consecutive block ids is a view of the cache, never a copy;
- what short decode rows do not share is gathered into one small reused buffer, so that they make one call;
- a prefill attends to its past as to a shared prefix, and to its own new keys causally.
Slots that no sequence owns are never read, whatever they hold.

Does not know requests or models; the batch arrives as an `AttentionBatch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from minirksc.kernels.prefix_attention import Segment, merge_into, shared_segments
from torch import Tensor

MAX_GATHER_TOKENS = 4096
"""Padded tokens of the decode rows' own keys up to which one gather and one call beat a call a row."""

MAX_RUNS = 8
"""Above so many runs a sequence's keys are gathered instead of attended run by run."""

Run = tuple[int, int]
"""(first slot, number of tokens) of keys that lie consecutively in the cache."""


Keys = list[Run] | Tensor
"""Where keys are: few runs, or `[keys]` int64 slots."""


@dataclass(slots=True)
class AttentionPlan:
    """What the torch form does in each layer; made once a step.

    Sequences with one query token stand in an order, that of their places, in which sharers are neighbours.
    """

    prefills: list[tuple[int, int, Keys]]  # (first row, number of query tokens, past)
    num_decode: int
    rows: (
        Tensor | None
    )  # [num_decode] int64: batch row of each place; None: place i is row i, and there are no prefills
    shared: list[tuple[Segment, Keys]]
    own: list[Keys]  # per place, what it reads alone; empty where own_slots has it
    own_slots: Tensor | None  # [num_decode * longest] int64
    own_mask: Tensor | None  # [num_decode, 1, 1, longest] float32, 0 or -inf; None: nothing to mask
    own_kv: Tensor | None = None  # [num_decode * longest, 2, num_kv_heads, head_dim], for all layers


@dataclass(slots=True)
class AttentionBatch:
    """Where each sequence's queries and keys are. All lists have one entry a sequence.

    Attributes:
        cu_seqlens_q: `[sequences + 1]`, first query row of each sequence.
        context_lens: keys of each sequence, the new ones included (their KV is already stored).
        block_tables: block ids of each sequence.
        block_size: tokens a block.
        device: of the cache.
    """

    cu_seqlens_q: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    block_size: int
    device: torch.device
    _plan: AttentionPlan | None = field(default=None, repr=False)

    def plan(self) -> AttentionPlan:
        """The plan of this step, made on first use and kept for the other layers."""
        if self._plan is None:
            self._plan = _make_plan(self)
        return self._plan


def paged_attention_reference(
    q: Tensor, kv: Tensor, layer_cache: Tensor, batch: AttentionBatch, scale: float
) -> Tensor:
    """The specification, sequence by sequence in float32.

    Args:
        q: `[tokens, num_heads, head_dim]`.
        kv: `[tokens, 2, num_kv_heads, head_dim]`, new keys and values; unused here, they are in the cache.
        layer_cache: `[num_blocks, block_size, 2, num_kv_heads, head_dim]`.
        batch: where queries and keys are.
        scale: multiplied to the scores.

    Returns:
        `[tokens, num_heads, head_dim]`, dtype of q.
    """
    out = torch.empty_like(q)
    group = q.shape[1] // layer_cache.shape[3]
    for i, (context_len, table) in enumerate(zip(batch.context_lens, batch.block_tables, strict=True)):
        begin, end = batch.cu_seqlens_q[i], batch.cu_seqlens_q[i + 1]
        own = layer_cache[list(table)].flatten(0, 1)[:context_len].float()
        keys, values = own.repeat_interleave(group, dim=2).unbind(1)  # [keys, num_heads, head_dim]
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * scale
        query_at = torch.arange(context_len - (end - begin), context_len, device=q.device)
        visible = torch.arange(context_len, device=q.device) <= query_at[:, None]  # [queries, keys]
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)  # [num_heads, queries, keys]
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def paged_attention(q: Tensor, kv: Tensor, layer_cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """The same in few large calls; arguments and result as in `paged_attention_reference`."""
    plan = batch.plan()
    cache = layer_cache.flatten(0, 1)  # [slots, 2, num_kv_heads, head_dim]
    if plan.rows is None:
        return _decode(q, cache, plan, scale)
    out = torch.empty_like(q)
    for begin, num_queries, past in plan.prefills:
        rows = slice(begin, begin + num_queries)
        out[rows] = _prefill(q[rows], kv[rows], cache, past, scale)
    if plan.num_decode:
        out[plan.rows] = _decode(q[plan.rows], cache, plan, scale)
    return out


def _flash(
    q: Tensor, kv: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One call of torch's CPU flash kernel.

    Args:
        q: `[batch, queries, num_heads, head_dim]`.
        kv: `[batch, keys, 2, num_kv_heads, head_dim]`.
        scale: multiplied to the scores.
        causal: query i sees keys 0..i.
        mask: added to the scores, broadcast to `[batch, num_heads, queries, keys]`.

    Returns:
        (out `[batch, queries, num_heads, head_dim]`, lse `[batch, queries, num_heads]` float32).
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2),
        kv[:, :, 0].transpose(1, 2),
        kv[:, :, 1].transpose(1, 2),
        0.0,
        causal,
        attn_mask=mask,
        scale=scale,
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _over_keys(q: Tensor, cache: Tensor, keys: Keys, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q `[queries, num_heads, head_dim]`, all of which see all of the keys.

    Returns:
        (out `[queries, num_heads, head_dim]`, lse `[queries, num_heads]`).
    """
    if isinstance(keys, Tensor):
        out, lse = _flash(q[None], cache.index_select(0, keys)[None], scale)
        return out[0], lse[0]
    first, *others = (cache[begin : begin + n][None] for begin, n in keys)
    out, lse = _flash(q[None], first, scale)
    for other in others:
        merge_into(out, lse, *_flash(q[None], other, scale))
    return out[0], lse[0]


def _prefill(q: Tensor, kv: Tensor, cache: Tensor, past: Keys, scale: float) -> Tensor:
    """New tokens of one sequence: causal among themselves, all of the past visible."""
    out, lse = _flash(q[None], kv[None], scale, causal=True)
    if len(past):
        merge_into(out[0], lse[0], *_over_keys(q, cache, past, scale))
    return out[0]


def _decode(q: Tensor, cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Queries of all places, `[num_decode, num_heads, head_dim]`: what each reads alone, then what it shares."""
    out, lse = _decode_own(q, cache, plan, scale)
    for segment, keys in plan.shared:
        places = slice(segment.row_begin, segment.row_end)
        merge_into(out[places], lse[places], *_over_keys(q[places], cache, keys, scale))
    return out


def _decode_own(q: Tensor, cache: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Each place over the keys that it reads alone; one call, or one a place where keys are many."""
    if plan.own_slots is None:
        parts = [_over_keys(q[i : i + 1], cache, keys, scale) for i, keys in enumerate(plan.own)]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = cache.shape[2]
    if plan.own_kv is None:  # one buffer for all layers: a fresh one each would cost its page faults
        plan.own_kv = cache.new_empty(len(plan.own_slots), *cache.shape[1:])
    torch.index_select(cache, 0, plan.own_slots, out=plan.own_kv)
    kv = plan.own_kv.view(num_rows, -1, *cache.shape[1:])  # [rows, longest, 2, num_kv_heads, head_dim]
    # The heads of a group become queries of their KV head: their keys are then read once.
    packed = q.view(num_rows, num_kv_heads, -1, head_dim).transpose(1, 2)
    out, lse = _flash(packed, kv, scale, mask=plan.own_mask)  # [rows, group, num_kv_heads, head_dim]
    return (
        out.transpose(1, 2).reshape(num_rows, num_heads, head_dim),
        lse.transpose(1, 2).reshape(num_rows, num_heads),
    )


def _make_plan(batch: AttentionBatch) -> AttentionPlan:
    size, device = batch.block_size, batch.device
    prefills: list[tuple[int, int, Keys]] = []
    decode = []
    for i, context_len in enumerate(batch.context_lens):
        begin, end = batch.cu_seqlens_q[i], batch.cu_seqlens_q[i + 1]
        if end - begin == 1:
            decode.append(i)
        else:
            past = _runs(batch.block_tables[i], 0, context_len - (end - begin), size)
            prefills.append((begin, end - begin, _keys(past, device)))
    # The block that holds the newest key stays a row's own, so that every row has keys of its own.
    order, segments, own_begin = shared_segments(
        [batch.block_tables[i] for i in decode],
        [(batch.context_lens[i] - 1) // size for i in decode],
    )
    decode = [decode[place] for place in order]
    own = [
        _runs(batch.block_tables[i], first * size, batch.context_lens[i], size)
        for i, first in zip(decode, own_begin, strict=True)
    ]
    shared = [
        (s, _runs(batch.block_tables[decode[s.row_begin]], s.block_begin * size, s.block_end * size, size))
        for s in segments
    ]
    rows = [batch.cu_seqlens_q[i] for i in decode]
    in_order = not prefills and rows == list(range(len(rows)))
    own_slots, own_mask = _own_gather(own, device)
    return AttentionPlan(
        prefills=prefills,
        num_decode=len(decode),
        rows=None if in_order else torch.tensor(rows, dtype=torch.int64, device=device),
        shared=[(segment, _keys(runs, device)) for segment, runs in shared],
        own=[] if own_slots is not None else [_keys(runs, device) for runs in own],
        own_slots=own_slots,
        own_mask=own_mask,
    )


def _keys(runs: list[Run], device: torch.device) -> Keys:
    """The runs themselves, or their slots where they are too many to be attended one by one."""
    if len(runs) <= MAX_RUNS:
        return runs
    return torch.tensor([slot for begin, n in runs for slot in range(begin, begin + n)], device=device)


def _runs(table: Sequence[int], begin: int, end: int, block_size: int) -> list[Run]:
    """Slots of positions [begin, end) as runs; begin is a multiple of block_size."""
    runs: list[Run] = []
    for index in range(begin // block_size, -(-end // block_size)):
        slot = table[index] * block_size
        n = min(block_size, end - index * block_size)
        if runs and runs[-1][0] + runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], runs[-1][1] + n)
        else:
            runs.append((slot, n))
    return runs


def _own_gather(own: list[list[Run]], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Slots and mask of the rows' own keys, padded to the longest row; (None, None): a call a row.

    Padding repeats a slot that the row owns: it holds finite numbers, so that a weight of zero hides it.
    """
    lens = [sum(n for _, n in runs) for runs in own]
    longest = max(lens, default=0)
    if len(lens) < 2 or longest * len(lens) > MAX_GATHER_TOKENS:
        return None, None
    slots, mask = [], []
    for runs, length in zip(own, lens, strict=True):
        slots += [slot for begin, n in runs for slot in range(begin, begin + n)]
        slots += [runs[0][0]] * (longest - length)
        mask += [0.0] * length + [float("-inf")] * (longest - length)
    own_slots = torch.tensor(slots, device=device)
    if min(lens) == longest:
        return own_slots, None
    return own_slots, torch.tensor(mask, device=device).view(len(lens), 1, 1, longest)
