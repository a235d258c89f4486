"""Other libraries' attention kernels, for `bench.gpu`: each is called only where it is installed and can be imported.

A rival makes a call out of a case's inputs; everything that does not depend on a layer (plans, tables, workspaces) is
made before. What a library cannot do raises `Unsupported`; whatever else it raises is reported as its result. All get
the scale 1 / sqrt(head_dim), which is what all of them use by themselves too.

Written for flash-attn 2.8, flash-attn 3 (hopper), FlashInfer 0.6, vLLM 0.32 and SGLang 0.5.23; arguments that other
versions do not have are left out.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bench.gpu_attention import AttentionInputs
from bench.harness import version_of

Call = Callable[[], Tensor]
"""Computes the case once; the result is `[tokens, num_heads, head_dim]`."""

FLASH_ATTN_BLOCK = 256
"""flash-attn 2 takes a paged cache only in blocks of a multiple of this."""

WORKSPACE_BYTES = 256 << 20
SGLANG_SPLITS = 8
"""Parts of a sequence, its server's default."""


class Unsupported(Exception):
    """The library has no kernel for the case."""


@dataclass(frozen=True)
class Rival:
    """A library's kernels.

    Attributes:
        name: name in the results.
        package: package that is asked for its version.
        modules: places to import from, for versions that moved it; the first that can be imported is used.
        prepare: function (module, inputs) -> the call.
        kinds: kinds of the cases it is measured on.
    """

    name: str
    package: str
    modules: tuple[str, ...]
    prepare: Callable[[Any, AttentionInputs], Call]
    kinds: tuple[str, ...] = ("decode", "prefix", "prefill")


@dataclass(frozen=True)
class FoundRival:
    """A rival that can be imported."""

    rival: Rival
    module: Any
    version: str

    def prepare(self, inputs: AttentionInputs) -> Call:
        """The call for a case; raises `Unsupported` where it has no kernel for it."""
        return self.rival.prepare(self.module, inputs)


def discover(rivals: Sequence[Rival]) -> tuple[list[FoundRival], dict[str, str]]:
    """Which rivals are there, and why the others are not.

    Returns:
        (found, name -> reason).
    """
    found, missing = [], {}
    for rival in rivals:
        reasons = []
        for name in rival.modules:
            try:
                module = importlib.import_module(name)
            except Exception as error:  # a library built for another GPU or torch may raise anything
                reasons.append(f"{name}: {describe(error)}")
            else:
                found.append(FoundRival(rival, module, _version(rival.package, module)))
                break
        else:
            missing[rival.name] = "; ".join(reasons)
    return found, missing


def _version(package: str, module: Any) -> str:
    """Version of an installed package, else what its module says."""
    return version_of(package) or str(getattr(module, "__version__", "unknown"))


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def accepted(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that this version of a function has; all where it takes any."""
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in arguments.items() if takes_any or name in parameters}


def _writing(out: Tensor, function: Callable[..., Any], /, **arguments: Any) -> Call:
    """A call of a function that writes into `out`, with the arguments that its version has."""
    known = accepted(function, **arguments)

    def call() -> Tensor:
        function(**known)
        return out

    return call


def _ints(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)


def _flash_attn(module: Any, inputs: AttentionInputs) -> Call:
    case, q = inputs.case, inputs.q
    size = -(-case.block_size // FLASH_ATTN_BLOCK) * FLASH_ATTN_BLOCK
    if case.prefix_len % size:
        raise Unsupported(f"a shared prefix that is no multiple of blocks of {size}")
    blocks = inputs.in_blocks_of(size)
    lens, table = _ints(list(inputs.batch.context_lens), q), blocks.table()
    if case.num_queries == 1:
        batched = q.unsqueeze(1)  # [batch, 1, num_heads, head_dim]
        return lambda: module.flash_attn_with_kvcache(
            batched, blocks.k, blocks.v, cache_seqlens=lens, block_table=table, causal=True
        ).squeeze(1)
    cu_q = _ints(inputs.cu_seqlens_q, q)
    cu_k = _ints([0, *accumulate(inputs.batch.context_lens)], q)
    return lambda: module.flash_attn_varlen_func(
        q, blocks.k, blocks.v, cu_q, cu_k, case.num_queries, case.context_len, causal=True, block_table=table
    )


def _flash_attn_3(module: Any, inputs: AttentionInputs) -> Call:
    case, q, blocks = inputs.case, inputs.q, inputs.blocks
    lens, table = _ints(list(inputs.batch.context_lens), q), blocks.table()
    batched = q.view(case.batch, case.num_queries, *q.shape[1:])  # all sequences have equally many queries

    def call() -> Tensor:
        out = module.flash_attn_with_kvcache(
            batched, blocks.k, blocks.v, cache_seqlens=lens, page_table=table, causal=True
        )
        return (out[0] if isinstance(out, tuple) else out).view(q.shape)

    return call


def _csr(tables: Sequence[Sequence[int]], lens: Sequence[int], size: int, like: Tensor) -> tuple[Tensor, ...]:
    """Block tables as (first of each sequence, block ids, tokens in the last block)."""
    indptr = [0, *accumulate(len(table) for table in tables)]
    last = [(n - 1) % size + 1 for n in lens]
    return _ints(indptr, like), _ints([block for table in tables for block in table], like), _ints(last, like)


def _flashinfer(module: Any, inputs: AttentionInputs) -> Call:
    case, q, blocks = inputs.case, inputs.q, inputs.blocks
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    csr = _csr(blocks.tables, inputs.batch.context_lens, blocks.size, q)
    heads = (case.num_heads, case.num_kv_heads, case.head_dim, blocks.size)
    dtypes = {"q_data_type": q.dtype, "kv_data_type": q.dtype}
    if case.num_queries == 1:
        # As its own documentation advises for four and more query heads a KV head.
        tensor_cores = case.num_heads // case.num_kv_heads >= 4
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
        wrapper.plan(*csr, *heads, **accepted(wrapper.plan, **dtypes))
    else:
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(_ints(inputs.cu_seqlens_q, q), *csr, *heads, causal=True, **accepted(wrapper.plan, **dtypes))
    return lambda: wrapper.run(q, (blocks.k, blocks.v))


def _flashinfer_cascade(module: Any, inputs: AttentionInputs) -> Call:
    case, q, blocks = inputs.case, inputs.q, inputs.blocks
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    num_shared = case.prefix_len // blocks.size
    shared = _csr([blocks.tables[0][:num_shared]], [case.prefix_len], blocks.size, q)
    own_lens = [case.context_len - case.prefix_len] * case.batch
    own = _csr([table[num_shared:] for table in blocks.tables], own_lens, blocks.size, q)
    queries = [_ints([0, len(q)], q), _ints(inputs.cu_seqlens_q, q)]
    wrapper = module.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    levels = [list(level) for level in zip(shared, own, strict=True)]
    heads = (case.num_heads, case.num_kv_heads, case.head_dim, blocks.size)
    dtypes = accepted(wrapper.plan, q_data_type=q.dtype, kv_data_type=q.dtype)
    wrapper.plan(queries, *levels, *heads, causal=True, **dtypes)
    return lambda: wrapper.run(q, (blocks.k, blocks.v))


def _vllm(module: Any, inputs: AttentionInputs) -> Call:
    case, q, blocks = inputs.case, inputs.q, inputs.blocks
    out = torch.empty_like(q)
    # As its engine calls it: 16 parts a sequence while there are few sequences.
    num_parts, threshold = 16, 128 // case.num_kv_heads
    parts = (threshold, case.num_heads, num_parts)
    head_pad = 1 << (case.head_dim - 1).bit_length()

    def workspace(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    return _writing(
        out,
        module.unified_attention,
        q=q,
        k=blocks.k,
        v=blocks.v,
        out=out,
        cu_seqlens_q=_ints(inputs.cu_seqlens_q, q),
        max_seqlen_q=case.num_queries,
        seqused_k=_ints(list(inputs.batch.context_lens), q),
        max_seqlen_k=case.context_len,
        softmax_scale=inputs.scale,
        causal=True,
        window_size=(-1, -1),
        block_table=blocks.table(),
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        seq_threshold_3D=threshold,
        num_par_softmax_segments=num_parts,
        softmax_segm_output=workspace(*parts, head_pad),
        softmax_segm_max=workspace(*parts),
        softmax_segm_expsum=workspace(*parts),
    )


def _sglang_slots(inputs: AttentionInputs, num_leading: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(keys, values) by slot, and the slots of each sequence's leading tokens: (first of each, slots)."""
    blocks = inputs.blocks
    table = blocks.table().long()
    slots = (table[:, :, None] * blocks.size + torch.arange(blocks.size, device=table.device)).flatten(1)
    leading = slots[:, :num_leading].flatten()
    indptr = _ints([i * num_leading for i in range(len(table) + 1)], inputs.q)
    return blocks.k.flatten(0, 1), blocks.v.flatten(0, 1), indptr, leading


def _sglang_decode(module: Any, inputs: AttentionInputs) -> Call:
    case, q, max_splits = inputs.case, inputs.q, SGLANG_SPLITS
    k, v, indptr, slots = _sglang_slots(inputs, case.context_len)
    out = torch.empty_like(q)
    parts = torch.empty((case.batch, case.num_heads, max_splits, case.head_dim), device=q.device)
    return _writing(
        out,
        module.decode_attention_fwd,
        q=q,
        k_buffer=k,
        v_buffer=v,
        o=out,
        kv_indptr=indptr,
        kv_indices=slots,
        attn_logits=parts,
        attn_lse=torch.empty(parts.shape[:-1], device=q.device),
        num_kv_splits=_ints([max_splits] * case.batch, q),
        max_kv_splits=max_splits,
        sm_scale=inputs.scale,
        k_scale=1.0,
        v_scale=1.0,
    )


def _sglang_extend(module: Any, inputs: AttentionInputs) -> Call:
    case, q = inputs.case, inputs.q
    before = case.context_len - case.num_queries
    k, v, indptr, slots = _sglang_slots(inputs, before)
    _, _, _, all_slots = _sglang_slots(inputs, case.context_len)
    new = all_slots.view(case.batch, -1)[:, before:].flatten()
    out = torch.empty_like(q)
    return _writing(
        out,
        module.extend_attention_fwd,
        q_extend=q,
        k_extend=k[new],
        v_extend=v[new],
        o_extend=out,
        k_buffer=k,
        v_buffer=v,
        qo_indptr=_ints(inputs.cu_seqlens_q, q),
        kv_indptr=indptr,
        kv_indices=slots,
        custom_mask=None,
        is_causal=True,
        mask_indptr=None,
        max_len_extend=case.num_queries,
        k_scale=1.0,
        v_scale=1.0,
        sm_scale=inputs.scale,
    )


def _sglang_modules(name: str) -> tuple[str, ...]:
    return f"sglang.kernels.ops.attention.{name}", f"sglang.srt.layers.attention.triton_ops.{name}"


RIVALS = (
    Rival("flash-attn", "flash-attn", ("flash_attn",), _flash_attn),
    Rival("flash-attn 3", "flash-attn-3", ("flash_attn_interface",), _flash_attn_3),
    Rival("flashinfer", "flashinfer-python", ("flashinfer",), _flashinfer),
    Rival("flashinfer cascade", "flashinfer-python", ("flashinfer",), _flashinfer_cascade, ("prefix",)),
    Rival(
        "vllm triton",
        "vllm",
        ("vllm.v1.attention.ops.triton_unified_attention", "vllm.attention.ops.triton_unified_attention"),
        _vllm,
    ),
    Rival("sglang triton, decode", "sglang", _sglang_modules("decode_attention"), _sglang_decode, ("decode", "prefix")),
    Rival("sglang triton", "sglang", _sglang_modules("extend_attention"), _sglang_extend, ("prefill",)),
)
