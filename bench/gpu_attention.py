"""Cases of `bench.gpu` for the attention: decode, shared prefixes and prompts over a paged cache.

All arms of a case get the same numbers. Ours reads them as the engine keeps them; the other libraries get keys and
values as two contiguous tensors, in blocks of the case's size wherever they can use it, and all plans they make of a
batch are made before the clock starts, as ours is. Blocks are shuffled.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import OURS
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.paged_attention import paged_attention_reference, paged_attention_triton
from minirksc.kernels.kv.layer_cache import LayerCache, multiply_out

TOLERANCE = 0.01
"""Largest |out - exact| / |exact| of a sequence, as norms. bfloat16 results and probabilities give about 0.002."""

NUM_CHECKED = 4
"""Sequences whose results are compared with the specification."""

OURS_INT8 = f"{OURS} int8"


@dataclass(frozen=True)
class AttentionCase:
    """One step's attention of one layer.

    Attributes:
        kind: kind of step: "decode", "prefix" (decode, with a prefix that all sequences share) or "prefill".
        batch: number of sequences.
        num_queries: number of new tokens of each.
        context_len: number of keys of each, the new ones included.
        prefix_len: number of leading keys that all share.
        head_dim: size of a query, key or value.
        block_size: tokens a block.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values.
        dtype: numbers of activations and of the cache.
    """

    kind: str
    batch: int
    num_queries: int
    context_len: int
    prefix_len: int
    head_dim: int
    block_size: int
    num_heads: int = 32
    num_kv_heads: int = 8
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Sizes in words."""
        if self.kind == "prefix":
            what = f"prefix {self.batch} x ({self.prefix_len} + {self.context_len - self.prefix_len})"
        elif self.kind == "decode":
            what = f"decode {self.batch} x {self.context_len}"
        else:
            what = f"prefill {self.num_queries} on {self.context_len - self.num_queries}"
        return f"{what} d{self.head_dim} b{self.block_size}"

    @property
    def num_stored(self) -> int:
        """Tokens in the cache, what is shared counted once."""
        return self.prefix_len + self.batch * (self.context_len - self.prefix_len)

    def kv_bytes(self, int8: bool = False) -> int:
        """Of keys and values, each once; with int8 and its scales."""
        per_head = self.head_dim + 4 if int8 else self.head_dim * self.dtype.itemsize
        return self.num_stored * 2 * self.num_kv_heads * per_head

    def min_bytes(self, int8: bool = False) -> int:
        """What must at least go through memory: keys and values, queries, results. No partials, no tables."""
        return self.kv_bytes(int8) + 2 * self.batch * self.num_queries * self.num_heads * self.head_dim * (
            self.dtype.itemsize
        )

    @property
    def flops(self) -> int:
        """Of both products, for the pairs of query and key that see each other."""
        before, n = self.context_len - self.num_queries, self.num_queries
        return 4 * self.num_heads * self.head_dim * self.batch * (n * before + n * (n + 1) // 2)


CONTEXTS = (1024, 8192, 32768)


def all_cases(quick: bool) -> list[AttentionCase]:
    """What is measured: head_dim 64, 128 and 256 in blocks of 16 and 64; quick: the cases that say most."""
    cases = []
    shapes = ((128, 16),) if quick else product((64, 128, 256), (16, 64))
    for head_dim, block_size in shapes:
        for batch, context_len in ((1, 8192), (8, 8192), (64, 1024)) if quick else product((1, 8, 64), CONTEXTS):
            cases.append(AttentionCase("decode", batch, 1, context_len, 0, head_dim, block_size))
        for batch, prefix_len in ((8, 4096),) if quick else ((8, 4096), (16, 8192)):
            cases.append(AttentionCase("prefix", batch, 1, prefix_len + 256, prefix_len, head_dim, block_size))
        for num_queries, before in ((2048, 0), (512, 8192)):
            cases.append(AttentionCase("prefill", 1, num_queries, before + num_queries, 0, head_dim, block_size))
    return cases


class Blocks(NamedTuple):
    """Keys and values as other libraries want them.

    Attributes:
        k, v: `[num_blocks, size, num_kv_heads, head_dim]` each, contiguous.
        tables: block ids of each sequence.
        size: tokens a block.
    """

    k: Tensor
    v: Tensor
    tables: list[list[int]]
    size: int

    def table(self) -> Tensor:
        """`[sequences, blocks]` int32; all sequences have equally many."""
        return torch.tensor(self.tables, dtype=torch.int32, device=self.k.device)


class AttentionInputs:
    """The tensors of a case, and what rivals are given of them.

    Attributes:
        case: case that they are made for.
        q: `[tokens, num_heads, head_dim]`.
        cache: one layer of the engine's cache.
        batch: batch of all sequences.
        scale: factor of scores.
    """

    def __init__(self, case: AttentionCase, device: torch.device, seed: int = 0) -> None:
        random = torch.Generator(device).manual_seed(seed)
        num_shared = case.prefix_len // case.block_size
        assert num_shared * case.block_size == case.prefix_len, "only whole blocks are shared"
        num_own = -(-case.context_len // case.block_size) - num_shared
        num_blocks = num_shared + case.batch * num_own
        ids = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        shared, own = ids[:num_shared], ids[num_shared:]
        tables = [shared + own[i * num_own : (i + 1) * num_own] for i in range(case.batch)]
        shape = (num_blocks, case.block_size, 2, case.num_kv_heads)
        num_tokens = case.batch * case.num_queries

        def normal(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=case.dtype, device=device).normal_(generator=random)

        self.case, self.scale = case, case.head_dim**-0.5
        self.q = normal(num_tokens, case.num_heads, case.head_dim)
        self.cache = LayerCache(normal(*shape, case.head_dim))
        self.tables = tables
        self.batch = self._batch(range(case.batch))
        self._random = random

    @cached_property
    def int8_cache(self) -> LayerCache:
        """Random numbers of an int8 cache: not those of the other one, since nothing here depends on them."""
        kv = self.cache.kv
        numbers = torch.empty(kv.shape, dtype=torch.int8, device=kv.device).random_(-127, 128, generator=self._random)
        scales = torch.empty(kv.shape[:-1], device=kv.device).uniform_(0.01, 0.02, generator=self._random)
        return LayerCache(numbers, scales)

    @property
    def cu_seqlens_q(self) -> list[int]:
        """First query of each sequence."""
        return list(self.batch.cu_seqlens_q)

    @cached_property
    def blocks(self) -> Blocks:
        """In blocks of the case's size."""
        k, v = (self.cache.kv[:, :, i].contiguous() for i in (0, 1))
        return Blocks(k, v, self.tables, self.case.block_size)

    def in_blocks_of(self, size: int) -> Blocks:
        """The same tokens in larger blocks, for a library that needs them; what is shared stays shared."""
        per = size // self.case.block_size
        assert self.case.prefix_len % size == 0, "only whole blocks are shared"
        # What pads a table lies beyond the context, which nothing reads.
        padded = [table + [table[-1]] * (-len(table) % per) for table in self.tables]
        groups = [[tuple(table[i : i + per]) for i in range(0, len(table), per)] for table in padded]
        ids = {group: i for i, group in enumerate(dict.fromkeys(group for row in groups for group in row))}
        tables = [[ids[group] for group in row] for row in groups]
        order = torch.tensor(list(ids), device=self.cache.kv.device).flatten()
        k, v = (self.cache.kv[:, :, i][order].unflatten(0, (-1, per)).flatten(1, 2) for i in (0, 1))
        return Blocks(k, v, tables, size)

    def ours(self, int8: bool = False) -> Callable[[], Tensor]:
        """A call of the engine's attention on either cache; its work list is made at the first one."""
        cache, batch = self.int8_cache if int8 else self.cache, self._batch(range(self.case.batch))
        return lambda: paged_attention_triton(self.q, self._no_kv, cache, batch, self.scale, None)

    def error(self, out: Tensor, int8: bool = False) -> float:
        """Largest relative error of the checked sequences; inf for a result of another shape or with NaN."""
        if out.shape != self.q.shape:
            return float("inf")
        n = self.case.num_queries
        count = self.case.batch
        errors = []
        for i in sorted({count * j // NUM_CHECKED for j in range(NUM_CHECKED)} | {count - 1}):
            exact = self._exact(i, int8).float()
            difference = (out[i * n : (i + 1) * n].float() - exact).norm() / exact.norm()
            errors.append(float(difference.nan_to_num(float("inf"))))
        return max(errors)

    @property
    def _no_kv(self) -> Tensor:
        return self.cache.kv[:0, 0]  # the attention reads the cache alone

    def _exact(self, sequence: int, int8: bool) -> Tensor:
        """`[num_queries, num_heads, head_dim]` of one sequence, from a cache of its own: as few bytes as it takes."""
        table, n = self.tables[sequence], self.case.num_queries
        where = torch.tensor(table, device=self.q.device)
        cache = self.int8_cache if int8 else self.cache
        kv = multiply_out(cache.kv[where], None if cache.scales is None else cache.scales[where], self.case.dtype)
        batch = self._batch([0], [list(range(len(table)))])
        q = self.q[sequence * n : (sequence + 1) * n]
        return paged_attention_reference(q, self._no_kv, LayerCache(kv), batch, self.scale, None)

    def _batch(self, sequences: Sequence[int], tables: list[list[int]] | None = None) -> AttentionBatch:
        tables = tables or [self.tables[i] for i in sequences]
        n = self.case.num_queries
        return AttentionBatch(
            cu_seqlens_q=[i * n for i in range(len(tables) + 1)],
            context_lens=[self.case.context_len] * len(tables),
            block_tables=tables,
            kv_tables=tables,
            slots=torch.empty(0, dtype=torch.int64, device=self.q.device),  # nothing is stored
            block_size=self.case.block_size,
            device=self.q.device,
        )


def sizes(case: AttentionCase) -> dict[str, Any]:
    """The case as plain data, for the results."""
    return {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
