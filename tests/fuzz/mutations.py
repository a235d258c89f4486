"""Ways to damage a checkpoint: its JSON by structure, its bytes, and what lies in place of its files."""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TEXTS = (
    "", " ", "\x00", "\x1b[31mred\x1b[0m\x07", "\u202eright to left", "e\u0301" * 40, "😀", "\ud800", "▁",
    "../../../etc/passwd",
    "/dev/zero", "/etc/shadow", "C:\\con", "a" * 100_000, "{{ 7 * 7 }}", "{% for i in range(99999) %}{% endfor %}",
    "%s%n",
    "NaN", "null", "true", "0", "-1", "1e999", "bfloat16", "float8_e4m3fn", "llama", "gemma3_text", "auto",
    "(a+)+$", "(", "\\p{L}",
    "silu", "default", "yarn", "<s>", "</s>", "<unk>", "[INST]", "QUJD", "=", "model.norm.weight",
)  # fmt: skip
NUMBERS = (
    0, 1, 2, 3, 7, -1, -2, 255, 256, 65_536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**18,
    10**400,
    0.5, -0.0, 1e-300, 1e-45, 1e30, 1e308, 3.999, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
WORDS = (
    0,
    1,
    2,
    8,
    9,
    31,
    255,
    65_535,
    1 << 20,
    1 << 31,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
MARK = "\x01raw "
"""Begins a string that goes into the file without its quotes."""
RAW = (
    "1" * 5000,
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "0123",
    "'x'",
    "[" * 100_000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "",
    '"\\ud800"',
)


def mutate(folder: Path, rng: random.Random, parts: list[list[int]]) -> str:
    """One mutation of some file of the folder; `parts` are the (offset, bytes) of numbers and strings of a GGUF file.

    Returns:
        What was done.
    """
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24
    )
    if not files:
        return "nothing left"
    path = rng.choice(files)
    size = path.stat().st_size
    roll = rng.random()
    if roll < 0.08:
        return f"{path.name}: {rng.choice(PLACES)(path, rng, files)}"
    if path.suffix == ".json" and roll < 0.85:
        return f"{path.name}: {_mutate_json(path, rng)}"
    if path.suffix == ".safetensors" and roll < 0.75 and size > 8:
        return f"{path.name}: {_mutate_header(path, rng)}"
    if path.suffix == ".gguf" and roll < 0.8 and parts:
        return f"{path.name}: {_mutate_part(path, rng, rng.choice(parts))}"
    data = bytearray(path.read_bytes())
    what = rng.choice(BYTES)(data, rng)
    path.write_bytes(data)
    return f"{path.name}: {what}"


# JSON


def mutated(value: Any, rng: random.Random) -> tuple[Any, str]:
    """(a changed document, what was done)."""
    places = list(_places(value, rng))
    if not places:
        return _junk(rng), "replaced"
    holder, key, trail = rng.choice(places)
    old = holder[key]
    kind = rng.choice(
        ("delete", "junk", "junk", "number", "text", "retype", "swap", "nest", "copy", "scale", "rename", "raw")
    )
    if kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = holder.pop(key)
    elif kind == "copy" and isinstance(holder, list):
        holder += [old] * rng.choice((1, 2, 3000))
    elif kind == "copy":
        holder[rng.choice(["model_type", "extra", "num_layers", key + "_", "quantization_config", "rope_scaling"])] = (
            old
        )
    elif kind == "swap":
        other_holder, other_key, _ = rng.choice(places)
        holder[key], other_holder[other_key] = other_holder[other_key], old
    else:
        holder[key] = {
            "number": lambda: rng.choice(NUMBERS),
            "text": lambda: rng.choice(TEXTS),
            "retype": lambda: _retyped(old),
            "nest": lambda: rng.choice(([old], {"a": old}, [[old]], {key if isinstance(key, str) else "0": old})),
            "scale": lambda: _scaled(old, rng),
            "raw": lambda: MARK + str(rng.randrange(len(RAW))),
        }.get(kind, lambda: _junk(rng))()
    return value, f"{kind} at {trail}" + (
        f": {str(holder[key])[:60]!r}" if kind not in ("delete", "rename", "copy") else ""
    )


def _places(value: Any, rng: random.Random, trail: str = "") -> Iterator[tuple[Any, Any, str]]:
    """(holder, key, path) of nodes; of a long container a few."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return
    for key, child in items if len(items) <= 40 else rng.sample(items, 6):
        yield value, key, f"{trail}/{str(key)[:30]}"
        yield from _places(child, rng, f"{trail}/{str(key)[:30]}")


def _junk(rng: random.Random) -> Any:
    return rng.choice((
        None, True, False, [], {}, [[]], {"": None}, rng.choice(NUMBERS), rng.choice(TEXTS), [rng.choice(NUMBERS)] * 3,
        [rng.choice(TEXTS)], {rng.choice(TEXTS): rng.choice(NUMBERS)}, ["x"] * 20_000,
        {str(i): i for i in range(5000)},
    ))  # fmt: skip


def _retyped(old: Any) -> Any:
    if isinstance(old, bool) or old is None:
        return str(old).lower()
    if isinstance(old, int | float):
        return str(old)
    if isinstance(old, str):
        return [*old] if len(old) < 50 else old.encode().hex()
    return list(old) if isinstance(old, dict) else {str(i): v for i, v in enumerate(old[:50])}


def _scaled(old: Any, rng: random.Random) -> Any:
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float):
        return rng.choice((old + 1, old - 1, -old, 2 * old, old * 1000, old * 10**9, old // 2, old + 0.5))
    return old * rng.choice((2, 300)) if isinstance(old, str | list) and len(old) < 1000 else old


def dumped(value: Any, rng: random.Random) -> bytes:
    """As JSON text, now and then in an unusual form: keys twice, another encoding, a mark at the beginning."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    for number, raw in enumerate(RAW):
        text = text.replace(json.dumps(MARK + str(number)), raw)
    if isinstance(value, dict) and value and rng.random() < 0.05:
        text = text[:-1] + ", " + json.dumps({rng.choice(list(value)): _junk(rng)})[1:]
    roll = rng.random()
    if roll < 0.02:
        return text.encode("utf-16", errors="surrogatepass")
    return (b"\xef\xbb\xbf" if roll < 0.05 else b"") + text.encode(errors="surrogatepass")


def _mutate_json(path: Path, rng: random.Random) -> str:
    try:
        value = json.loads(path.read_bytes())
        value, what = mutated(value, rng)
        path.write_bytes(dumped(value, rng))
    except (ValueError, RecursionError):  # an earlier mutation left no JSON
        return _cut(path, rng)
    return what


def _mutate_header(path: Path, rng: random.Random) -> str:
    """Of a safetensors file: its header's JSON, with the length as it should be or not."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    try:
        header, what = mutated(json.loads(data[8 : 8 + length]), rng)
        text = dumped(header, rng)
    except (ValueError, RecursionError):
        return _cut(path, rng)
    if rng.random() < 0.3:
        text += b" " * (-len(text) % 8)
    if rng.random() < 0.1:
        length, what = rng.choice(WORDS), f"{what}; length wrong"
    else:
        length = len(text)
    path.write_bytes(struct.pack("<Q", length) + text + data[8 + struct.unpack("<Q", data[:8])[0] :])
    return what


def _mutate_part(path: Path, rng: random.Random, part: list[int]) -> str:
    """Of a GGUF file: one number or string in place."""
    offset, size = part
    with path.open("r+b") as file:
        file.seek(offset)
        if size in (1, 2, 4, 8):
            new = (rng.choice(WORDS) % (1 << 8 * size)).to_bytes(size, "little")
        else:
            new = rng.choice(
                (os.urandom(0) or bytes(rng.randrange(256) for _ in range(size)), b"\x00" * size, b"A" * size)
            )
        file.write(new)
    return f"{size} bytes at {offset} are {new[:16].hex()}"


def _cut(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    what = _truncate(data, rng)
    path.write_bytes(data)
    return what


# Bytes


def _flip(data: bytearray, rng: random.Random) -> str:
    for _ in range(rng.choice((1, 1, 4, 64))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return "bits flipped"


def _truncate(data: bytearray, rng: random.Random) -> str:
    del data[rng.choice((0, 1, 7, 8, 9, rng.randrange(len(data) + 1), max(0, len(data) - 1))) :]
    return f"cut to {len(data)} bytes"


def _extend(data: bytearray, rng: random.Random) -> str:
    data += rng.choice((b"\x00", b" ", b"\xff" * 100, bytes(data[:5000]), b"\n{}", b"\x00" * (1 << 20)))
    return f"extended to {len(data)} bytes"


def _splice(data: bytearray, rng: random.Random) -> str:
    begin, length = rng.randrange(len(data) + 1), rng.choice((1, 4, 8, 100))
    piece = rng.choice(
        (b"", b"\x00" * length, b"\xff" * length, bytes(data[begin // 2 : begin // 2 + length]), b"\xed\xa0\x80")
    )
    data[begin : begin + rng.choice((0, length))] = piece
    return f"{len(piece)} bytes put in at {begin}"


def _word(data: bytearray, rng: random.Random) -> str:
    offset = rng.choice((0, 4, 8, 16, rng.randrange(len(data) + 1), rng.randrange(min(len(data), 512) + 1)))
    word = rng.choice(WORDS)
    data[offset : offset + 8] = struct.pack("<Q", word)
    return f"{word:#x} at {offset}"


def _empty(data: bytearray, rng: random.Random) -> str:
    data[:] = rng.choice((b"", LFS, b"{}", b"[]", b"null", b"\xef\xbb\xbf{}", b"<!DOCTYPE html>"))
    return f"is {bytes(data[:20])!r}"


def _nan(data: bytearray, rng: random.Random) -> str:
    offset = max(0, len(data) - 4 * rng.randrange(1, 2000))
    offset -= offset % 4
    data[offset : offset + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 1e38, -1e30)))
    return f"a number that is not finite or huge at {offset}"


BYTES: tuple[Callable[[bytearray, random.Random], str], ...] = (_flip, _truncate, _extend, _splice, _word, _empty, _nan)


# What lies in place of a file


def _in_place(make: Callable[[Path], Any], what: str) -> Callable[[Path, random.Random, list[Path]], str]:
    def place(path: Path, rng: random.Random, files: list[Path]) -> str:
        path.unlink()
        make(path)
        return what

    return place


def _sparse(path: Path, rng: random.Random, files: list[Path]) -> str:
    os.truncate(path, size := rng.choice((1 << 31, 1 << 36, 1 << 40)))
    return f"sparse, {size} bytes"


def _exchange(path: Path, rng: random.Random, files: list[Path]) -> str:
    other = rng.choice(files)
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    return f"exchanged with {other.name}"


PLACES: tuple[Callable[[Path, random.Random, list[Path]], str], ...] = (
    _in_place(lambda path: None, "deleted"),
    _in_place(os.mkfifo, "a FIFO"),
    _in_place(lambda path: path.symlink_to("/dev/zero"), "/dev/zero"),
    _in_place(lambda path: path.symlink_to("/dev/stdin"), "/dev/stdin"),
    _in_place(lambda path: path.symlink_to("/proc/self/mem"), "/proc/self/mem"),
    _in_place(lambda path: path.symlink_to(path.name), "a link to itself"),
    _in_place(Path.mkdir, "a folder"),
    _sparse,
    _exchange,
)
