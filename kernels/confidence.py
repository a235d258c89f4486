"""How sure the model is of its next token: likeliest token, its probability, entropy, log-sum-exp and mean logit.

For logits x with maximum m: s = sum exp(x - m), lse = m + log s, p = exp(x - lse), top-1 probability = 1 / s,
entropy = lse - sum p x (nats), which is log s - t / s with t = sum (x - m) exp(x - m). Computed in float32. -inf
logits have probability zero and add nothing. A row with NaN or +inf, or with nothing but -inf, has no finite
log-sum-exp, and its probability and entropy are NaN; its argmax means nothing, but is in the vocabulary. Ties go to
the smallest index. The mean is over the whole vocabulary: of a row with a logit of -inf it is -inf.

The kernel reads the logits once. A program holds one part of a row in registers and finds (m, argmax, s, t) and the
sum of it; a second launch brings the parts of a row to one maximum and adds them up. Not one program a row: a decode
step has few rows, and their parts together keep all multiprocessors reading.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.kernels.jit import DTYPES, launch_options, tl, triton

MAX_PART = 4096  # logits a program holds: 16 a thread
MAX_VOCAB = 2**24  # 4096 parts of a row


class Confidence(NamedTuple):
    """One entry a row of logits.

    Attributes:
        argmax: `[rows]` int64.
        top1_probability: `[rows]` float32.
        entropy: `[rows]` float32, nats.
        logsumexp: `[rows]` float32.
        mean_logit: `[rows]` float32.
    """

    argmax: Tensor
    top1_probability: Tensor
    entropy: Tensor
    logsumexp: Tensor
    mean_logit: Tensor

    def self_certainty(self, vocab: int) -> Tensor:
        """How far the distribution is from the uniform one: KL(uniform, p) = lse - mean - log vocab, in nats.

        Args:
            vocab: number of logits in a row.

        Returns:
            `[rows]` float32, 0 for equal logits; infinite where a logit is -inf, since the uniform has it.

        Source: Kang et al. 2025, arXiv 2502.18581.
        """
        return self.logsumexp - self.mean_logit - math.log(vocab)


def confidence_reference(logits: Tensor) -> Confidence:
    """The specification.

    Args:
        logits: `[rows, vocab]`, any float dtype.
    """
    x = logits.float()
    lse = x.logsumexp(-1)
    logprobs = x - lse.unsqueeze(-1)  # [rows, vocab]
    p = logprobs.exp()
    entropy = -torch.where(p > 0, p * logprobs, torch.where(p.isnan(), p, 0.0)).sum(-1)
    argmax = (x == x.amax(-1, keepdim=True)).int().argmax(-1)
    top1 = p.gather(-1, argmax.unsqueeze(-1)).squeeze(-1)
    return Confidence(argmax, top1, entropy, lse, x.mean(-1))


def confidence_torch(logits: Tensor) -> Confidence:
    """The same in five passes over the logits and one temporary."""
    x = logits.float()
    top, argmax = x.max(-1)
    weights = (x - top.unsqueeze(-1)).exp_()  # [rows, vocab], relative to the largest: no overflow
    total = weights.sum(-1)
    expected = torch.linalg.vecdot(weights, x) / total
    if bool(expected.isnan().any()):
        # A weight of zero on a logit of -inf gives NaN, and must add nothing.
        expected = torch.linalg.vecdot(weights, x.clamp(min=torch.finfo(torch.float32).min)) / total
    lse = top + total.log()
    return Confidence(argmax, 1 / total, lse - expected, lse, x.mean(-1))


@triton.jit
def _confidence_kernel(
    logits_ptr,
    parts_ptr,  # [rows, 4, PARTS] float32: m, s, t and the sum of the logits
    argmax_ptr,  # [rows, PARTS] int32
    stride_row,
    VOCAB: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride_row + cols, mask=cols < VOCAB, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    argmax = tl.min(tl.where(x == top, cols, VOCAB), 0)
    # Of a part that is all -inf nothing must be subtracted: -inf - -inf is NaN.
    below = x - tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(below)
    parts_ptr += row * 4 * PARTS + part
    tl.store(parts_ptr, top)
    tl.store(parts_ptr + PARTS, tl.sum(weights, 0))
    tl.store(parts_ptr + 2 * PARTS, tl.sum(tl.where(weights > 0, below, 0.0) * weights, 0))
    tl.store(parts_ptr + 3 * PARTS, tl.sum(tl.where(cols < VOCAB, x, 0.0), 0))
    tl.store(argmax_ptr + row * PARTS + part, argmax)


@triton.jit
def _merge_kernel(
    parts_ptr,
    part_argmax_ptr,
    argmax_ptr,
    top1_ptr,
    entropy_ptr,
    lse_ptr,
    mean_ptr,
    VOCAB: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    mask = part < PARTS
    parts_ptr += row * 4 * PARTS + part
    tops = tl.load(parts_ptr, mask=mask, other=float("-inf"))
    sums = tl.load(parts_ptr + PARTS, mask=mask, other=0.0)
    below_sums = tl.load(parts_ptr + 2 * PARTS, mask=mask, other=0.0)
    logit_sums = tl.load(parts_ptr + 3 * PARTS, mask=mask, other=0.0)
    argmaxes = tl.load(part_argmax_ptr + row * PARTS + part, mask=mask, other=VOCAB)
    top = tl.max(tops, 0)
    argmax = tl.min(tl.where(tops == top, argmaxes, VOCAB), 0)
    below = tops - tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(below)
    total = tl.sum(weights * sums, 0)
    # Relative to the row's maximum, t of a part is (m of the part - m of the row) s more.
    expected = tl.sum(weights * (below_sums + tl.where(weights > 0, below, 0.0) * sums), 0) / total
    tl.store(argmax_ptr + row, tl.where(argmax < VOCAB, argmax, 0).to(tl.int64))
    tl.store(top1_ptr + row, tl.where(total > 0, 1 / total, float("nan")))
    tl.store(entropy_ptr + row, tl.log(total) - expected)
    tl.store(lse_ptr + row, top + tl.log(total))
    tl.store(mean_ptr + row, tl.sum(logit_sums, 0) / VOCAB)


def part_launch(vocab: int) -> tuple[int, int]:
    """(logits of a part, warps of its program): a warp gets 512 logits, 16 a thread."""
    block = min(MAX_PART, triton.next_power_of_2(vocab))
    return block, max(1, block // 512)


def confidence_triton(logits: Tensor) -> Confidence:
    """The kernels: two launches, and nothing read by the host.

    Raises:
        ConfigError: a dtype, a shape or a stride that the kernels cannot serve.
    """
    if logits.dtype not in DTYPES:
        raise ConfigError(f"logits are {logits.dtype}; the kernel takes float32, float16 and bfloat16")
    if logits.dim() != 2 or not 0 < logits.shape[1] <= MAX_VOCAB:
        raise ConfigError(f"logits have shape {list(logits.shape)}; they must be [rows, 1 to {MAX_VOCAB}]")
    rows, vocab = logits.shape
    argmax = torch.empty(rows, dtype=torch.int64, device=logits.device)
    result = Confidence(argmax, *(torch.empty(rows, device=logits.device, dtype=torch.float32) for _ in range(4)))
    if rows == 0:
        return result
    if vocab > 1 and logits.stride(1) != 1:
        raise ConfigError(f"rows of logits have stride {logits.stride(1)}; they must be contiguous, of stride 1")
    block, num_warps = part_launch(vocab)
    num_parts = triton.cdiv(vocab, block)
    parts = torch.empty((rows, 4, num_parts), dtype=torch.float32, device=logits.device)
    part_argmax = torch.empty((rows, num_parts), dtype=torch.int32, device=logits.device)
    _confidence_kernel[(rows, num_parts)](
        logits,
        parts,
        part_argmax,
        logits.stride(0),
        VOCAB=vocab,
        PARTS=num_parts,
        BLOCK=block,
        **launch_options(num_warps),
    )
    merge_block = triton.next_power_of_2(num_parts)
    _merge_kernel[(rows,)](
        parts,
        part_argmax,
        *result,
        VOCAB=vocab,
        PARTS=num_parts,
        BLOCK=merge_block,
        **launch_options(max(1, merge_block // 512)),
    )
    return result
