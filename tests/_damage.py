"""Valid files made wrong: cut, overwritten, and with lies where their formats speak of sizes, names and places."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS = [0, -1, 1, 2, 3, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30, 10**400]
FLOATS = [0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")]
WORDS = ["", ".", "..", "/", "../../etc", "F64", "topk", "gated", "jumprelu", "none"]
TEXTS = [*WORDS, "x" * 5000, "a\0b", "\x1b[31m", "\udcff", "\n" * 50]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def strange(rng: random.Random) -> Any:
    """A value of any type that JSON has, of an unlikely size."""
    number, text = rng.choice(NUMBERS), rng.choice(TEXTS)
    made = [number, number, rng.choice(FLOATS), text, None, rng.random() < 0.5, [], {}, {text: number}]
    made += [nested(rng.choice([3, 150, 400])), [number] * rng.choice([1, 4, 40])]
    return rng.choice(made)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with a key that it has."""
    found, left = [], [value]
    while left:
        part = left.pop()
        inside = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for key, value in inside:
            found.append((part, key))
            left.append(value)
    return found


def changed(rng: random.Random, value: Any) -> Any:
    """JSON with one to three of its values replaced, removed, renamed, or moved to where another was."""
    for _ in range(rng.randint(1, 3)):
        where = places(value)
        if not where:
            return strange(rng)
        part, key = rng.choice(where)
        kind = rng.randrange(5)
        if kind == 0:
            del part[key]
        elif kind == 1 and isinstance(part, dict):
            part[rng.choice(TEXTS)] = part.pop(key)
        elif kind == 2:
            other, name = rng.choice(where)
            part[key] = json.loads(json.dumps(other[name]))
        elif kind == 3 and type(part[key]) in (int, float):
            part[key] = rng.choice([part[key] + 1, part[key] * 2, -part[key], str(part[key]), [part[key]]])
        else:
            part[key] = strange(rng)
    return value


def wrong_json(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.15:
        depth = rng.choice([100, 2000, 100_000])
        return rng.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b"9" * depth, data + data])
    text = json.dumps(changed(rng, json.loads(data)))
    if rng.random() < 0.1:
        text = text.replace("{", '{"x": 1, "x": 2, ', 1)
    return text.encode("utf-8", "surrogatepass")


def wrong_bytes(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    at, to = sorted(rng.randrange(len(out) + 1) for _ in range(2))
    few = rng.choice([1, 4, 16, 64])
    kind = rng.randrange(8)
    if kind == 0:
        del out[at:]
    elif kind == 1:
        for _ in range(few):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        out[at : at + few] = rng.randbytes(few)
    elif kind == 3:
        out[at : at + few] = rng.choice([b"\0", b"\xff", b"\x7f"]) * few
    elif kind == 4:
        out[at : at + few] = b""
    elif kind == 5:
        out[at:at] = rng.randbytes(few)
    elif kind == 6:
        out[at:at] = out[at:to]
    else:
        out += rng.randbytes(few)
    return bytes(out)


def wrong_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header lies."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = rng.randrange(6)
    if kind == 0:
        return (
            struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, len(data), 2**24, 2**40, 2**63, 2**64 - 1]))
            + data[8:]
        )
    names = [name for name in header if name != "__metadata__"]
    if kind == 1 and names:
        entry = header[rng.choice(names)]
        entry["dtype"] = rng.choice(["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4"])
    elif kind == 2 and names:
        entry = header[rng.choice(names)]
        entry["shape"] = rng.choice(
            [[], [0], [0, 2**61], [2**31, 2**31], [*entry["shape"], 1], entry["shape"][::-1], [1] * 64]
        )
    elif kind == 3 and names:
        entry = header[rng.choice(names)]
        entry["data_offsets"] = [
            entry["data_offsets"][0],
            rng.choice([0, 1, 2**40, 2**63, entry["data_offsets"][1] + 4]),
        ]
    elif kind == 4 and names:
        # values that no arithmetic likes
        begin, end = header[rng.choice(names)]["data_offsets"]
        body = bytearray(rest)
        for at in range(begin, end, rng.choice([4, 8, 64])):
            body[at : at + 4] = rng.choice([b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\x01\0\0\0"])[
                : end - at
            ]
        rest = bytes(body)
    else:
        header = changed(rng, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + rest


def wrong_pickle(rng: random.Random, data: bytes) -> bytes:
    """A program of torch.save's that says other numbers, names or steps."""
    if rng.random() < 0.5:
        return wrong_bytes(rng, data)
    out = bytearray(data)
    numbers = [at for at in range(len(out) - 5) if out[at : at + 1] in (b"J", b"K", b"M")]
    for at in rng.sample(numbers, min(len(numbers), rng.randint(1, 3))):
        width = {b"J": 4, b"K": 1, b"M": 2}[bytes(out[at : at + 1])]
        new = rng.choice([0, 1, 2**7, 2**15, 2**31 - 1, 2**32 - 1]) % 2 ** (8 * width)
        out[at + 1 : at + 1 + width] = new.to_bytes(width, "little")
    return bytes(out)


def wrong_zip(rng: random.Random, data: bytes) -> bytes:
    """An archive with another program, other members, or a directory that lies."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    kind = rng.randrange(7)
    compression = zipfile.ZIP_STORED
    program = next((i for i, (name, _) in enumerate(members) if name.endswith("data.pkl")), 0)
    one = rng.randrange(len(members))
    if kind <= 1:
        name, content = members[program]
        members[program] = name, wrong_pickle(rng, content)
    elif kind == 2:
        compression = zipfile.ZIP_DEFLATED
        members[one] = members[one][0], bytes(rng.choice([0, 1000, 1 << 22]))
    elif kind == 3:
        name, content = members[one]
        members[one] = name, content[: rng.randrange(len(content) + 1)]
    elif kind == 4:
        members[one] = rng.choice(
            [("x", b""), ("x/" * 500, b"x"), ("archive/code/a.py", b""), ("weights/constants.pkl", b"")]
        )
    elif kind == 5:
        members.append(members[one])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    out = bytearray(buffer.getvalue())
    if kind == 6:
        # sizes, places, methods and lengths of names, in the directory and in front of the members
        sign = rng.choice([b"PK\1\2", b"PK\3\4", b"PK\5\6"])
        starts = [at for at in range(len(out) - 30) if out[at : at + 4] == sign]
        if starts:
            at, field = rng.choice(starts), rng.choice([4, 6, 8, 10, 12, 16, 18, 20, 22, 24, 26, 28])
            out[at + field : at + field + 4] = struct.pack("<I", rng.choice([0, 1, 8, 2**16, 2**31, 2**32 - 1, 10**9]))
    return bytes(out)


Damage = Callable[[random.Random, bytes], bytes]
BY_SUFFIX: dict[str, tuple[Damage, ...]] = {
    ".json": (wrong_json, wrong_json, wrong_bytes),
    ".safetensors": (wrong_header, wrong_header, wrong_bytes),
    ".pt": (wrong_zip, wrong_zip, wrong_bytes),
    ".bin": (wrong_zip, wrong_zip, wrong_bytes),
    ".npz": (wrong_zip, wrong_bytes),
}


def damage(rng: random.Random, path: Path) -> None:
    """Make one file wrong, in the ways of its format or of none."""
    data = path.read_bytes()
    ways = BY_SUFFIX.get(path.suffix, (wrong_bytes,))
    if path.suffix == ".pt" and data[:2] != b"PK":
        ways = (wrong_bytes, wrong_pickle)  # the format before archives
    path.write_bytes(rng.choice(ways)(rng, data))
