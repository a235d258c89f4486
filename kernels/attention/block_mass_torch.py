"""Attention with the mass of each block (`block_mass`) on the CPU, for decode steps.

The flash kernel keeps its weights to itself, but `paged_attention_torch` knows each query's log-sum-exp over all that
it sees. So the output is that form's own, bit for bit, and a second look at the keys gives exp(score - lse): final
weights, whatever the piece, so that nothing need be merged. Keys that several rows share are looked at once for all of
them, as the plan of the attention says.

Scores are float32, of keys in the dtype of the queries, and held for `PIECE` keys at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.block_mass import check_decode
from minirksc.kernels.attention.paged_attention_torch import Keys, LayerAttention, OwnKeys, decode, make_plan
from minirksc.kernels.kv.layer_cache import LayerCache

PIECE = 1024
"""Keys whose float32 copies and scores stay in the cache of a core."""


def paged_attention_mass_torch(
    q: Tensor, kv: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The same in few large calls; arguments, result and errors as in `paged_attention_mass_reference`."""
    check_decode(batch)
    plan = batch.plan("torch", make_plan)
    columns = batch.plan("torch mass", _own_columns)
    layer = LayerAttention.of(layer_cache, q.dtype, scale, softcap)
    at_places = q if plan.rows is None else q[plan.rows]
    out, lse = decode(at_places, layer, plan)
    width = max(map(len, batch.kv_tables))
    mass = torch.zeros((len(q), width), dtype=torch.float32, device=q.device)
    weigh = _Weigh(at_places.float(), lse, layer.keys())
    for own, column in zip(plan.own, columns, strict=True):
        mass[own.begin : own.end].scatter_add_(1, column, weigh.own(own))
    for segment, keys in plan.shared:
        weights = weigh(segment.row_begin, segment.row_end, keys)  # [places, keys], whole blocks
        blocks = weights.unflatten(1, (-1, batch.block_size)).sum(-1)
        mass[segment.row_begin : segment.row_end, segment.block_begin : segment.block_end] = blocks
    if plan.rows is None:
        return out, mass
    return torch.empty_like(out).index_copy_(0, plan.rows, out), torch.empty_like(mass).index_copy_(0, plan.rows, mass)


@dataclass(frozen=True, slots=True)
class _Weigh:
    """The weights of keys, mean over heads."""

    q: Tensor  # [places, num_heads, head_dim] float32
    lse: Tensor  # [places, num_heads] float32, over all that a place sees
    layer: LayerAttention  # without its values

    def __call__(self, begin: int, end: int, keys: Keys) -> Tensor:
        """Weights of places [begin, end), all of which see all of the keys: `[places, keys]` float32."""
        num_kv_heads = self.layer.kv.shape[2]
        grouped = self.q[begin:end].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        lse = self.lse[begin:end].t().reshape(num_kv_heads, -1, 1)  # [num_kv_heads, group * places, 1]
        weights = [
            self._weights(grouped, piece.permute(1, 2, 0), lse).view(-1, end - begin, len(piece)).mean(0)
            for piece in self._pieces(keys)
        ]
        return torch.cat(weights, 1)

    def own(self, own: OwnKeys) -> Tensor:
        """Weights of some places over the keys that each reads alone: `[places, longest]` float32, 0 for padding."""
        if own.end - own.begin == 1:
            return self(own.begin, own.end, own.keys)
        assert isinstance(own.keys, Tensor)
        q = self.q[own.begin : own.end]
        num_places, num_heads, head_dim = q.shape
        num_kv_heads = self.layer.kv.shape[2]
        keys = self.layer.gather(own.keys).view(num_places, -1, num_kv_heads, head_dim).float()
        grouped = q.unflatten(1, (num_kv_heads, -1)).flatten(0, 1)  # [places * num_kv_heads, group, head_dim]
        lse = self.lse[own.begin : own.end].reshape(len(grouped), -1, 1)
        weights = self._weights(grouped, keys.permute(0, 2, 3, 1).flatten(0, 1), lse)
        weights = weights.view(num_places, num_heads, -1).mean(1)
        return weights if own.mask is None else weights.masked_fill_(own.mask[:, 0, 0] != 0, 0.0)

    def _weights(self, q: Tensor, keys: Tensor, lse: Tensor) -> Tensor:
        """`[batch, queries, keys]` of q `[batch, queries, head_dim]`, keys `[batch, head_dim, keys]` and lse alike."""
        if self.layer.softcap is None:
            return torch.baddbmm(lse, q, keys, beta=-1, alpha=self.layer.scale).exp_()
        scores = torch.bmm(q, keys).mul_(self.layer.scale / self.layer.softcap).tanh_()
        return scores.mul_(self.layer.softcap).sub_(lse).exp_()

    def _pieces(self, keys: Keys) -> Iterator[Tensor]:
        """The keys, `[at most PIECE, num_kv_heads, head_dim]` float32 each."""
        if isinstance(keys, Tensor):
            for slots in keys.split(PIECE):
                yield self.layer.gather(slots)[:, 0].float()
            return
        for begin, length in keys:
            for first in range(begin, begin + length, PIECE):
                yield self.layer.run(first, min(PIECE, begin + length - first))[:, 0].float()


def _own_columns(batch: AttentionBatch) -> list[Tensor]:
    """For each part of the plan, the block of each key that its places read alone: `[places, longest]` int64."""
    plan = batch.plan("torch", make_plan)
    columns = [
        torch.cat([torch.arange(*keys, device=batch.device) for keys in ranges]) // batch.block_size
        for ranges in plan.own_ranges
    ]
    return [pad_sequence(columns[own.begin : own.end], batch_first=True) for own in plan.own]
