"""Wrong calls of the compiled operations: valid ones in which one thing is changed, at random.

    python tests/kernels/wrong_calls.py SEED COUNT

A wrong call is refused by name, or gives what the plain form gives of the same arguments; either way nothing beyond its
tensors is read or written. Each tensor lies between two stretches of NaN, which must stay, and must not be in a result.
With `--bare` it lies alone, so that a sanitizer sees where it ends.
"""

import argparse
import copy
import importlib
import math
import random
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.block_mass_native import paged_attention_mass_native
from minirksc.kernels.attention.block_mass_torch import paged_attention_mass_torch
from minirksc.kernels.attention.paged_attention_native import paged_attention_native
from minirksc.kernels.attention.paged_attention_torch import paged_attention_torch
from minirksc.kernels.confidence import confidence_torch
from minirksc.kernels.draw import Draw, draw_native, draw_torch
from minirksc.kernels.gated_act import gated_act_reference
from minirksc.kernels.kv.kv_store import kv_store_torch
from minirksc.kernels.kv.layer_cache import LayerCache, read_slots, write_slots
from minirksc.kernels.native.ops import (
    add_rms_norm_native,
    confidence_native,
    gated_act_native,
    has_bf16_products,
    kv_store_native,
    rms_norm_native,
)
from minirksc.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from minirksc.kernels.weights.int8_weight import Int8Weight
from minirksc.kernels.weights.linear import PlainWeight
from minirksc.kernels.weights.native_weight import Bf16Weight, WidenedWeight

sys.path.append(str(Path(__file__).parent))
attention, forms = importlib.import_module("attention_cases"), importlib.import_module("forms")

GUARD = 4096  # bytes
REFUSALS = (
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    ArithmeticError,
)  # torch's own are among them
HUGE = (2**31, 2**40, 2**62)


class Call(NamedTuple):
    """An operation with arguments that it can take.

    Attributes:
        run: called with the arguments.
        plain: the same in torch; None: nothing to compare with.
        args: by name.
    """

    run: object
    plain: object
    args: dict


# Valid calls


def numbers(rng, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31))).to(dtype)


def dtype_of(rng):
    return rng.choice((torch.float32, torch.bfloat16))


def norm_call(rng):
    dtype, size = dtype_of(rng), rng.choice((1, 8, 24, 64))
    args = {"x": numbers(rng, 3, size, dtype=dtype), "weight": numbers(rng, size, dtype=dtype), "eps": 1e-5}
    return Call(rms_norm_native, rms_norm_reference, args)


def add_norm_call(rng):
    dtype, size = dtype_of(rng), rng.choice((1, 8, 24, 64))
    rows = {name: numbers(rng, 5, size, dtype=dtype) for name in ("hidden", "update")}
    weights = {name: numbers(rng, size, dtype=dtype) for name in ("update_norm", "weight")}
    return Call(add_rms_norm_native, add_rms_norm_reference, {**rows, **weights, "eps": 1e-5})


def act_call(rng):
    gate_up = numbers(rng, 3, 2 * rng.choice((1, 8, 20, 64)), dtype=dtype_of(rng))
    return Call(gated_act_native, gated_act_reference, {"gate_up": gate_up, "activation": "silu"})


def store_call(rng):
    dtype, is_tiled = dtype_of(rng), rng.random() < 0.5
    tokens, heads, kv_heads, size = 4, 4, 2, 16
    shape = (3, 1, 2, kv_heads, 16, size) if is_tiled else (3, 16, 2, kv_heads, size)
    args = {
        "qkv": numbers(rng, tokens, heads + 2 * kv_heads, size, dtype=dtype),
        "num_heads": heads,
        "q_norm": numbers(rng, size, dtype=dtype),
        "k_norm": numbers(rng, size, dtype=dtype),
        "v_norm": rng.random() < 0.5,
        "eps": 1e-5,
        "rope": tuple(numbers(rng, tokens, 1, size, dtype=dtype).clamp(-1, 1) for _ in range(2)),
        "query_growth": numbers(rng, tokens, 1, 1, dtype=dtype),
        "cache": LayerCache(numbers(rng, *shape, dtype=dtype)),
        "slots": torch.tensor([5, 17, 0, 47]),
    }
    args["rope"] = tuple(
        torch.cat((sign * x[..., :8], x[..., :8]), -1) for x, sign in zip(args["rope"], (1, -1), strict=True)
    )
    return Call(partial(forms.store, kv_store_native), partial(forms.store, plain_store), args)


def plain_store(qkv, norms, placement):
    cache, slots = placement.cache, placement.slots
    if cache is None or not cache.is_tiled:
        return kv_store_torch(qkv, norms, placement)
    blocks, tiles, _, kv_heads, tile, size = cache.kv.shape
    flat = torch.zeros(blocks, tiles * tile, 2, kv_heads, size, dtype=cache.kv.dtype)
    kv_store_torch(qkv, norms, placement._replace(cache=LayerCache(flat)))
    write_slots(cache.kv, slots, read_slots(flat, slots))


def confidence_call(rng):
    logits = numbers(rng, 3, rng.choice((1, 9, 5000)), dtype=rng.choice((torch.float32, torch.bfloat16)))
    return Call(confidence_native, confidence_torch, {"logits": logits})


def draw_call(rng):
    draws = [Draw(0.7, rng.choice((0, 3)), rng.choice((1.0, 0.55)), 0.0, rng.random()) for _ in range(3)]
    return Call(draw_native, draw_torch, {"logits": numbers(rng, 3, rng.choice((1, 9, 600))), "draws": draws})


def attention_args(rng, queries):
    dtype = dtype_of(rng)
    lens = [max(n, m) for n, m in zip(queries, (40, 17, 70), strict=True)]
    options = {"head_dim": 32, "block_size": 16, "window": rng.choice((None, 9)), "seed": rng.randrange(99)}
    q, kv, cache, batch = attention.make_case(queries, lens, dtype=dtype, **options)
    if attention.has_tiles(q, cache) and rng.random() < 0.7:
        cache = attention.in_tiles(cache)
    names = ("q", "kv", "layer_cache", "batch", "scale", "softcap")
    return dict(zip(names, (q.clone(), kv.clone(), cache, batch, 0.2, rng.choice((None, 5.0))), strict=True))


def with_slots(plain):
    """The torch form on a cache that may be in tiles."""

    def run(q, kv, layer_cache, batch, scale, softcap):
        if layer_cache.is_tiled:
            blocks, tiles, _, kv_heads, tile, size = layer_cache.kv.shape
            slots = read_slots(layer_cache.kv, torch.arange(blocks * tiles * tile))
            layer_cache = LayerCache(slots.view(blocks, tiles * tile, 2, kv_heads, size))
        return plain(q, kv, layer_cache, batch, scale, softcap)

    return run


def attention_call(rng):
    args = attention_args(rng, rng.choice(([1, 1, 1], [1, 5, 1], [40, 1, 33])))
    return Call(paged_attention_native, with_slots(paged_attention_torch), args)


def mass_call(rng):
    args = attention_args(rng, [1, 1, 1])
    while not args["layer_cache"].is_tiled:  # others go the way of torch
        args = attention_args(rng, [1, 1, 1])
    return Call(paged_attention_mass_native, with_slots(paged_attention_mass_torch), args)


def product_call(rng):
    kind = rng.choice([WidenedWeight.pack, *([Bf16Weight.pack, Int8Weight] if has_bf16_products else [])])
    dtype = torch.float32 if kind == WidenedWeight.pack else torch.bfloat16
    weight = numbers(rng, rng.choice((1, 33, 40)), 2 * rng.choice((1, 16, 33)), dtype=torch.bfloat16).to(dtype)
    args = {"x": numbers(rng, 3, weight.shape[1], dtype=dtype), "bias": numbers(rng, len(weight), dtype=dtype)}
    plain = None if kind is Int8Weight else PlainWeight(weight)
    packed = kind(weight)
    return Call(lambda x, bias: packed(x, bias), plain, args)


def rows_call(rng):
    kind = rng.choice([WidenedWeight, *([Bf16Weight] if has_bf16_products else [])])
    weight = numbers(rng, 40, 6, dtype=torch.bfloat16).to(kind.dtype)
    return Call(kind.pack(weight).rows, PlainWeight(weight).rows, {"indices": torch.tensor([3, 39, 0])})


def pack_call(rng):
    kind = rng.choice([WidenedWeight, *([Bf16Weight] if has_bf16_products else [])])
    weight = numbers(rng, 33, 6, dtype=torch.bfloat16).to(kind.dtype)

    def run(weight):
        packed = kind.pack(weight)
        return None if packed is None else packed.rows(torch.arange(len(weight)))

    return Call(run, lambda weight: weight.contiguous(), {"weight": weight})


CALLS = [
    *(norm_call, add_norm_call, act_call, store_call, confidence_call, draw_call),
    *(attention_call, product_call, rows_call, pack_call),
    *([mass_call] if has_bf16_products else []),
]


NOT_COMPARED = {
    # New keys of a prompt are in the cache and in `kv`: the forms read one or the other.
    *((attention_call, name) for name in ("kv", "layer_cache", "batch")),
    (mass_call, "kv"),
    (mass_call, "scale"),  # torch computes weights a second time, which differ where scores are huge
    (attention_call, "scale"),  # of 0 torch's flash kernel makes NaN
}

# What is changed


def changed_tensor(rng, x):
    whole = not (x.is_floating_point() or x.is_complex())
    ways = [
        lambda: x.to(
            rng.choice((torch.float64, torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.int8))
        ),
        lambda: x.transpose(0, -1),
        lambda: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda: x[..., :-1],
        lambda: x[..., ::2],
        lambda: x[..., :0],
        lambda: x[:-1],
        lambda: x[1:],
        lambda: x[:0],
        lambda: x[:1].expand(x.shape),
        lambda: torch.cat((x, x)),
        lambda: torch.cat((x, x), -1),
        lambda: torch.cat((x, x), -1)[..., : x.shape[-1]],
        lambda: x.flatten(),
        lambda: x.unsqueeze(0),
        lambda: x[0],
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        lambda: x.tolist(),
        lambda: None,
    ]
    if whole and x.numel():

        def with_value(value):
            x.flatten()[rng.randrange(x.numel())] = value
            return x

        values = (-1, -2, 39, 40, 47, 48, *HUGE, *(-n for n in HUGE))
        ways = [*ways, *[lambda value=value: with_value(value) for value in values]]
    return rng.choice(ways)()


def changed_number(rng, x):
    return rng.choice((0, -1, x + 1, x - 1, 2 * x, 3, 1.5, None, "x", *HUGE))


def changed_batch(rng, batch):
    name = rng.choice(("cu_seqlens_q", "context_lens", "block_tables", "kv_tables", "block_size", "window"))
    values = (0, -1, 1, 2, 15, 17, 1000, *HUGE)
    given = getattr(batch, name)
    if name in ("block_size", "window"):
        setattr(batch, name, rng.choice(values))
        return batch
    changed = copy.deepcopy(list(given))
    at = rng.randrange(len(changed))
    if not isinstance(changed[at], list):
        changed[at] = rng.choice((changed[at] + 1, changed[at] - 1, *values))
    elif rng.random() < 0.3:
        changed[at] = changed[at][: rng.randrange(len(changed[at]))]
    else:
        changed[at][rng.randrange(len(changed[at]))] = rng.choice(values)
    setattr(batch, name, changed if rng.random() < 0.9 else changed[:-1])
    return batch


def changed(rng, x):
    if isinstance(x, torch.Tensor):
        return changed_tensor(rng, x)
    if isinstance(x, LayerCache):
        return rng.choice((lambda: LayerCache(changed_tensor(rng, x.kv)), lambda: None))()
    if isinstance(x, AttentionBatch):
        return changed_batch(rng, x)
    if isinstance(x, tuple) and not isinstance(x, Draw):
        at = rng.randrange(len(x))
        return (*x[:at], changed(rng, x[at]), *x[at + 1 :])
    if isinstance(x, list):
        return rng.choice((x[:-1], [*x, x[0]], [], [x[0]._replace(top_k=HUGE[0]), *x[1:]], None))
    if isinstance(x, str):
        return rng.choice(("other", "", None))
    return changed_number(rng, 1 if x is None else x)


# One call


class Guarded:
    """Tensors between stretches that nobody may touch."""

    def __init__(self):
        self.buffers = []

    def __call__(self, x):
        if isinstance(x, LayerCache):
            return LayerCache(*map(self, x))
        if isinstance(x, tuple) and not isinstance(x, Draw):
            return tuple(map(self, x))
        if not isinstance(x, torch.Tensor) or x.layout != torch.strided or not x.is_cpu:
            return x
        room = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
        bytes_ = torch.full((GUARD + room * x.itemsize + GUARD,), 255, dtype=torch.uint8)  # NaN in each format
        self.buffers.append((bytes_, room * x.itemsize))
        guarded = bytes_.view(x.dtype).as_strided(x.shape, x.stride(), GUARD // x.itemsize)
        if x.stride().count(0) == 0:
            guarded.copy_(x)
        else:
            guarded.as_strided((room,), (1,)).copy_(x.as_strided((room,), (1,)))
        return guarded

    def are_whole(self):
        return all((b[:GUARD] == 255).all() and (b[GUARD + n :] == 255).all() for b, n in self.buffers)


def tensors_of(x):
    if isinstance(x, torch.Tensor):
        return [x] if x.layout == torch.strided and x.is_cpu else []
    return [one for part in x for one in tensors_of(part)] if isinstance(x, tuple | list) else []


def same(found, expected):
    found, expected = found.double(), expected.double()
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0.05, atol=0.05, equal_nan=True)


def copied(x):
    """As it is, strides too."""
    if isinstance(x, torch.Tensor):
        return x.clone() if x.layout != torch.strided or not x.is_cpu else copy.deepcopy(x)
    if isinstance(x, LayerCache):
        return LayerCache(*map(copied, x))
    if isinstance(x, tuple) and not isinstance(x, Draw):
        return tuple(map(copied, x))
    if isinstance(x, AttentionBatch):
        return copy.replace(x, _plans={}) if hasattr(copy, "replace") else fresh(x)
    return x


def fresh(batch):
    names = ("cu_seqlens_q", "context_lens", "block_tables", "kv_tables", "slots", "block_size", "device", "window")
    return AttentionBatch(**{name: getattr(batch, name) for name in names})


def one_call(seed, bare=False):
    """None, or what is wrong with what the call of this seed did."""
    rng = random.Random(seed)
    make = rng.choice(CALLS)
    run, plain, args = make(rng)
    name = rng.choice(list(args))
    args[name] = changed(rng, args[name])
    others = {key: copied(value) for key, value in args.items()}
    guard = Guarded()
    if not bare:
        args = {key: guard(value) for key, value in args.items()}
    where = f"seed {seed}: {make.__name__}, {name} changed"
    try:
        result = run(**args)
    except REFUSALS:
        result = None
        is_refused = True
    else:
        is_refused = False
    if not guard.are_whole():
        return f"{where}: wrote beyond a tensor"
    if is_refused or plain is None or (make, name) in NOT_COMPARED or (make is pack_call and result is None):
        return None
    try:
        expected = plain(**others)
    except REFUSALS as error:
        return f"{where}: was taken, and torch says {type(error).__name__}: {str(error)[:100]}"
    found = [*tensors_of(result), *(t for value in args.values() for t in tensors_of(value))]
    wanted = [*tensors_of(expected), *(t for value in others.values() for t in tensors_of(value))]
    if make is draw_call and not math.isfinite(float(tensors_of(others["logits"])[0].sum())):
        return None
    if len(found) != len(wanted) or not all(map(same, found, wanted)):
        return f"{where}: another result than torch's"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--bare", action="store_true")
    options = parser.parse_args()
    wrong = [one_call(seed, options.bare) for seed in range(options.seed, options.seed + options.count)]
    found = [one for one in wrong if one is not None]
    print(*found, f"{options.count} calls, {len(found)} wrong", sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
