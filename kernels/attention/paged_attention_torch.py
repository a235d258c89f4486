"""Paged attention as few large calls of the CPU's flash kernel, which also returns the log-sum-exp of its scores.

Partial results over disjoint keys are merged by it:
- the prefix that several decode rows share is read once for all of them (`prefix_attention`);
- a run of consecutive block ids is a view of the cache, never a copy (int8 is multiplied out where it is read);
- what short decode rows do not share is gathered into a small reused buffer, so that many make one call;
- a prefill attends to its past as to a shared prefix, and to its own new keys causally;
- a prefill that the window or a soft cap touches goes in tiles of queries, each over the keys it can see.
Slots that no sequence owns, or that are behind the window, are never read, whatever they hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.prefix_attention import Segment, merge_into
from minirksc.kernels.attention.reads import PrefillReads, Run, find_reads
from minirksc.kernels.kv.layer_cache import LayerCache, multiply_out

MAX_GATHER_TOKENS = 4096
"""Padded tokens of decode rows' own keys up to which one gather and one call for them beat a call a row."""

MAX_RUNS = 8
"""Above so many runs a sequence's keys are gathered instead of attended run by run."""

TILE = 256
"""Queries of a tile; a window's mask wastes at most so many keys a query."""

Keys = list[Run] | Tensor
"""Where keys are: few runs, or `[keys]` int64 slots."""


@dataclass(slots=True)
class Prefill:
    """New tokens of one sequence.

    Attributes:
        reads: positions of its queries and keys.
        past: places of the keys before the new ones.
    """

    reads: PrefillReads
    past: Keys


@dataclass(slots=True)
class OwnKeys:
    """What decode rows at places [begin, end) read alone.

    Attributes:
        begin, end: first place, and the one behind the last.
        keys: keys of a single place, where they are; of several, `[places * longest]` int64 slots that are gathered.
        mask: `[places, 1, 1, longest]` float32, 0 or -inf; None: nothing to mask.
    """

    begin: int
    end: int
    keys: Keys
    mask: Tensor | None = None


@dataclass(slots=True)
class AttentionPlan:
    """What the torch form does in each layer; made once a step.

    Sequences with one query token stand in an order, that of their places, in which sharers are neighbours.

    Attributes:
        prefills: sequences with several query tokens.
        rows: `[places]` int64, batch row of each place; None: place i is row i, and there are no prefills.
        shared: segments, and where their keys are.
        own: keys of all places, in their order; empty where there are no places.
        own_ranges: positions [begin, end) of these, of each place.
        gathered: `[slots, 2, num_kv_heads, head_dim]`, the cache's dtype, a buffer for all layers; None: not yet made.
    """

    prefills: list[Prefill]
    rows: Tensor | None
    shared: list[tuple[Segment, Keys]]
    own: list[OwnKeys]
    own_ranges: list[list[tuple[int, int]]]
    gathered: Tensor | None = None


def paged_attention_torch(
    q: Tensor, kv: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> Tensor:
    """The same in few large calls; arguments and result as in `paged_attention_reference`."""
    plan = batch.plan("torch", make_plan)
    layer = LayerAttention.of(layer_cache, q.dtype, scale, softcap)
    if plan.rows is None:
        return decode(q, layer, plan)[0]
    out = torch.empty_like(q)
    attend_prefills(out, q, kv, layer, batch, plan.prefills)
    if plan.own:
        out[plan.rows] = decode(q[plan.rows], layer, plan)[0]
    return out


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Attention of one layer, whose cache is read slot by slot in the dtype of the queries.

    Attributes:
        kv: `[slots, 2, num_kv_heads, head_dim]`.
        scales: `[slots, 2, num_kv_heads]`; None where kv is not int8.
        dtype: type of the queries.
        scale: factor of the scores.
        softcap: bound of the scores; None for none.
    """

    kv: Tensor
    scales: Tensor | None
    dtype: torch.dtype
    scale: float
    softcap: float | None

    @staticmethod
    def of(cache: LayerCache, dtype: torch.dtype, scale: float, softcap: float | None) -> "LayerAttention":
        """The attention of a layer that has this cache."""
        scales = None if cache.scales is None else cache.scales.flatten(0, 1)
        return LayerAttention(cache.kv.flatten(0, 1), scales, dtype, scale, softcap)

    def keys(self) -> "LayerAttention":
        """The same without the values: `[slots, 1, num_kv_heads, head_dim]`."""
        scales = None if self.scales is None else self.scales[:, :1]
        return LayerAttention(self.kv[:, :1], scales, self.dtype, self.scale, self.softcap)

    def run(self, begin: int, length: int) -> Tensor:
        """Consecutive slots, `[length, 2, num_kv_heads, head_dim]`; not a copy, unless it is int8."""
        end = begin + length
        return multiply_out(self.kv[begin:end], None if self.scales is None else self.scales[begin:end], self.dtype)

    def gather(self, slots: Tensor, out: Tensor | None = None) -> Tensor:
        """Any slots, `[slots, 2, num_kv_heads, head_dim]`; `out` takes the cache's own numbers."""
        kv = torch.index_select(self.kv, 0, slots, out=out)
        return multiply_out(kv, None if self.scales is None else self.scales.index_select(0, slots), self.dtype)

    def over(self, q: Tensor, kv: Tensor, causal: bool = False, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention over keys that are given, with the log-sum-exp of the scores.

        Args:
            q: `[batch, queries, num_heads, head_dim]`.
            kv: `[batch, keys, 2, num_kv_heads, head_dim]`.
            causal: whether query i sees keys 0..i alone; not with a soft cap.
            mask: numbers added to the scores, broadcast to `[batch, num_heads, queries, keys]`; None for none.

        Returns:
            (out `[batch, queries, num_heads, head_dim]`, lse `[batch, queries, num_heads]` float32).
        """
        if self.softcap is not None:
            assert not causal
            return _softcapped(q, kv, self.scale, self.softcap, mask)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2),
            kv[:, :, 0].transpose(1, 2),
            kv[:, :, 1].transpose(1, 2),
            0.0,
            causal,
            attn_mask=mask,
            scale=self.scale,
        )
        return out.transpose(1, 2), lse.transpose(1, 2)


def _softcapped(q: Tensor, kv: Tensor, scale: float, softcap: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `LayerAttention.over`, by plain matrix products: the flash kernel has no place for the cap."""
    batch, num_queries, num_heads, _ = q.shape
    num_kv_heads = kv.shape[3]
    grouped = q.reshape(batch, num_queries, num_kv_heads, -1, q.shape[-1]).permute(0, 2, 3, 1, 4)
    keys, values = kv.permute(2, 0, 3, 1, 4).unsqueeze(3)  # [batch, num_kv_heads, 1, keys, head_dim] each
    # In float32 before the cap: rounded to 16 bits, large scores would lose what the cap leaves of them.
    # scores: [batch, num_kv_heads, group, queries, keys]
    scores = torch.matmul(grouped.float(), keys.float().transpose(-1, -2))
    scores.mul_(scale / softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.add_(mask.unsqueeze(-3))
    lse = torch.logsumexp(scores, dim=-1)  # [batch, num_kv_heads, group, queries]
    weights = scores.sub_(lse.unsqueeze(-1)).exp_().to(q.dtype)
    out = torch.matmul(weights, values).permute(0, 3, 1, 2, 4)  # [batch, queries, num_kv_heads, group, head_dim]
    return out.flatten(2, 3), lse.permute(0, 3, 1, 2).reshape(batch, num_queries, num_heads)


def _over_keys(q: Tensor, layer: LayerAttention, keys: Keys) -> tuple[Tensor, Tensor]:
    """Attention of q `[queries, num_heads, head_dim]`, all of which see all of the keys.

    Returns:
        (out `[queries, num_heads, head_dim]`, lse `[queries, num_heads]`).
    """
    if isinstance(keys, Tensor):
        out, lse = layer.over(q[None], layer.gather(keys)[None])
        return out[0], lse[0]
    first, *others = (layer.run(*run)[None] for run in keys)
    out, lse = layer.over(q[None], first)
    for other in others:
        merge_into(out, lse, *layer.over(q[None], other))
    return out[0], lse[0]


def attend_prefills(
    out: Tensor, q: Tensor, kv: Tensor, layer: LayerAttention, batch: AttentionBatch, prefills: Sequence[Prefill]
) -> None:
    """Fills in the rows of `out` that are prefills'; q, kv and out are the batch's."""
    for prefill in prefills:
        rows = slice(prefill.reads.begin, prefill.reads.begin + prefill.reads.num_queries)
        if prefill.reads.is_cut or layer.softcap is not None:
            out[rows] = _prefill_in_tiles(q[rows], kv[rows], layer, batch, prefill)
        else:
            out[rows] = _prefill(q[rows], kv[rows], layer, prefill)


def _prefill(q: Tensor, kv: Tensor, layer: LayerAttention, prefill: Prefill) -> Tensor:
    """New tokens of one sequence: causal among themselves, all of the past visible."""
    out, lse = layer.over(q[None], kv[None], causal=True)
    if prefill.reads.num_past:
        merge_into(out[0], lse[0], *_over_keys(q, layer, prefill.past))
    return out[0]


def _prefill_in_tiles(q: Tensor, kv: Tensor, layer: LayerAttention, batch: AttentionBatch, prefill: Prefill) -> Tensor:
    """The same with a window or a soft cap: each tile of queries over the keys that some of them see."""
    past, num_past = prefill.past, prefill.reads.num_past
    parts = [layer.gather(past)] if isinstance(past, Tensor) else [layer.run(*run) for run in past]
    keys = torch.cat([*parts, kv]) if num_past else kv  # [num_past + queries, 2, num_kv_heads, head_dim]
    out = torch.empty_like(q)
    for begin in range(0, len(q), TILE):
        end = min(begin + TILE, len(q))
        first = batch.first_visible(num_past + begin)
        shape = end - begin, num_past + end - first
        mask = batch.plan(("torch mask", *shape), partial(_tile_mask, *shape))
        tile, _ = layer.over(q[None, begin:end], keys[None, first : num_past + end], mask=mask)
        out[begin:end] = tile[0]
    return out


def _tile_mask(num_queries: int, num_keys: int, batch: AttentionBatch) -> Tensor:
    """`[1, 1, queries, keys]` of 0 and -inf: the last query is at the last key."""
    visible = batch.visible(num_queries, num_keys)
    return torch.zeros(visible.shape, device=batch.device).masked_fill_(~visible, float("-inf"))[None, None]


def decode(q: Tensor, layer: LayerAttention, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """One query a place: what each reads alone, then what it shares.

    Args:
        q: `[places, num_heads, head_dim]`.
        layer: attention of the layer.
        plan: plan of the batch.

    Returns:
        (out `[places, num_heads, head_dim]`, lse `[places, num_heads]` float32).
    """
    parts = [_over_own_keys(q[own.begin : own.end], layer, own, plan) for own in plan.own]
    outs, lses = zip(*parts, strict=True)
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(outs), torch.cat(lses))
    for segment, keys in plan.shared:
        places = slice(segment.row_begin, segment.row_end)
        merge_into(out[places], lse[places], *_over_keys(q[places], layer, keys))
    return out, lse


def _over_own_keys(q: Tensor, layer: LayerAttention, own: OwnKeys, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """Attention of q `[places, num_heads, head_dim]`, each over its own keys; as `_over_keys`."""
    num_rows, num_heads, head_dim = q.shape
    if num_rows == 1:
        return _over_keys(q, layer, own.keys)
    assert isinstance(own.keys, Tensor)
    shape = layer.kv.shape[1:]  # (2, num_kv_heads, head_dim)
    if plan.gathered is None or plan.gathered.shape[1:] != shape:
        # One buffer for all layers of a shape: a fresh one each would cost its page faults.
        longest = max(len(one.keys) for one in plan.own if one.end - one.begin > 1)
        plan.gathered = layer.kv.new_empty(longest, *shape)
    kv = layer.gather(own.keys, out=plan.gathered[: len(own.keys)]).view(num_rows, -1, *shape)
    # The heads of a group become queries of their KV head: their keys are then read once.
    packed = q.view(num_rows, shape[1], -1, head_dim).transpose(1, 2)
    out, lse = layer.over(packed, kv, mask=own.mask)  # [rows, group, num_kv_heads, head_dim]
    return (
        out.transpose(1, 2).reshape(num_rows, num_heads, head_dim),
        lse.transpose(1, 2).reshape(num_rows, num_heads),
    )


def make_plan(batch: AttentionBatch) -> AttentionPlan:
    """Finds the calls that serve the batch."""
    device = batch.device
    prefills, decode = find_reads(batch)
    in_order = not prefills and decode.rows == list(range(len(decode.rows)))
    return AttentionPlan(
        prefills=find_prefills(prefills, device),
        rows=None if in_order else torch.tensor(decode.rows, dtype=torch.int64, device=device),
        shared=[(segment, _keys(runs, device)) for segment, runs in decode.shared],
        own=[_own_keys(decode.own, begin, end, device) for begin, end in _groups(decode.own)],
        own_ranges=decode.own_ranges,
    )


def find_prefills(prefills: Sequence[PrefillReads], device: torch.device) -> list[Prefill]:
    """The prompts of a batch with the keys before them as they are attended to."""
    return [Prefill(reads, _keys(reads.runs(reads.first_key, reads.first_query), device)) for reads in prefills]


def _keys(runs: list[Run], device: torch.device) -> Keys:
    """The runs themselves, or their slots where they are too many to be attended one by one."""
    if len(runs) <= MAX_RUNS:
        return runs
    return torch.tensor([slot for begin, n in runs for slot in range(begin, begin + n)], device=device)


def _groups(own: list[list[Run]]) -> list[tuple[int, int]]:
    """Places [begin, end) whose own keys are gathered together."""
    groups: list[tuple[int, int]] = []
    begin, longest = 0, 0
    for place, length in enumerate(map(_num_keys, own)):
        longest = max(longest, length)
        if longest * (place + 1 - begin) > MAX_GATHER_TOKENS and place > begin:
            groups.append((begin, place))
            begin, longest = place, length
    return [*groups, (begin, len(own))] if own else []


def _own_keys(own: list[list[Run]], begin: int, end: int, device: torch.device) -> OwnKeys:
    """The keys that places [begin, end) read alone, padded to the longest.

    Padding repeats a slot that the place owns: it holds finite numbers, so that a weight of zero hides it.
    """
    some = own[begin:end]
    if len(some) == 1:
        return OwnKeys(begin, end, _keys(some[0], device))
    lens = [_num_keys(runs) for runs in some]
    longest = max(lens)
    slots, mask = [], []
    for runs, length in zip(some, lens, strict=True):
        slots += [slot for first, n in runs for slot in range(first, first + n)]
        slots += [runs[0][0]] * (longest - length)
        mask += [0.0] * length + [float("-inf")] * (longest - length)
    own_slots = torch.tensor(slots, device=device)
    if min(lens) == longest:
        return OwnKeys(begin, end, own_slots)
    return OwnKeys(begin, end, own_slots, torch.tensor(mask, device=device).view(len(lens), 1, 1, longest))


def _num_keys(runs: Sequence[Run]) -> int:
    return sum(n for _, n in runs)
