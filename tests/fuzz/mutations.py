"""Mutations of good files: of their bytes, and of the values in them. All are drawn from a seeded ``random.Random``."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
from typing import Any

import onnx
import torch
import yaml

_DEEP: Any = json.loads("[" * 300 + "]" * 300)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**12, 10**400, 1.5, 1e300, float("nan"), float("inf")),
    *(
        "",
        "x",
        "abc",
        "../../etc/passwd",
        "/etc/passwd",
        "a\0b",
        "\x1b[2J",
        "line\nforged",
        "x" * 300,
        "http://127.0.0.1:9/x",
    ),
    *([], {}, [[]], [1, 2], ["a"], {"a": 1}, _DEEP),
)
TENSORS = (
    lambda tensor: torch.tensor(float("nan")),
    lambda tensor: torch.full_like(tensor, -3),
    lambda tensor: torch.full(tensor.shape, float("inf")),
    lambda tensor: tensor.to(torch.complex64),
    lambda tensor: tensor.to(torch.int32),
    lambda tensor: tensor.double(),
    lambda tensor: tensor[..., :0] if tensor.dim() else tensor,
    lambda tensor: torch.zeros(1).expand(10**9),
    lambda tensor: torch.ones(3, 5),
    lambda tensor: tensor.sum(),
    lambda tensor: tensor.to_sparse() if tensor.dim() else tensor,
)
BOMBS = (
    "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else 'x'] * 9)}]\n" for n in range(10)),
    "mode: &m {evaluate: *m}\n",
    "mode: " + "[" * 20_000,
    "mode: {evaluate: {lr: 2001-99-99}}",
    "mode: {evaluate: {lr: !!python/object/apply:os.system [true]}}",
    "a: " + "x" * 2**21,
)


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    """One change: shortened, overwritten, cut, inserted into, or with single bits or a length turned."""
    data = bytearray(content)
    start = chance.randrange(len(data) + 1)
    if chance.random() < 0.5:  # headers lie at the ends
        start = chance.choice([start % 400, len(data) - start % 400]) % (len(data) + 1)
    end = min(len(data), start + chance.choice([1, 2, 8, 64, 1000]))
    kind = chance.randrange(6)
    if kind == 0:
        return bytes(data[:start])
    if kind == 1:
        data[start:end] = chance.choice([b"\0", b"\xff", b"\x7f"]) * (end - start)
    elif kind == 2:
        del data[start:end]
    elif kind == 3:
        data[start:start] = chance.randbytes(end - start)
    elif kind == 4:
        for _ in range(8):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    else:
        data[start : start + 8] = struct.pack("<Q", chance.choice([0, 2**31, 2**62, 2**64 - 1]))
    return bytes(data)


def mutated_values(values: Any, chance: random.Random) -> Any:
    """A copy in which one to three entries are replaced, removed, renamed or doubled."""
    values = copy.deepcopy(values)
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(list(_places(values)) or [(None, None)])
        if holder is None:
            return chance.choice(VALUES)
        kind = chance.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.choice(["x", "\x1b[2J", 3, ""])] = holder.pop(key)
        elif kind == 1:
            holder.append(holder[key])
        elif isinstance(holder[key], torch.Tensor) and kind < 5:
            holder[key] = chance.choice(TENSORS)(holder[key])
        else:
            holder[key] = copy.deepcopy(chance.choice(VALUES))
    return values


def _places(values: Any) -> Any:
    """The (container, key) of every value; outer ones several times, as they are few."""
    level, repeat = [values], 64
    while level:
        inner = []
        for holder in level:
            keys = holder.keys() if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
            for key in keys:
                yield from [(holder, key)] * repeat
                inner.append(holder[key])
        level, repeat = inner[:3000], max(1, repeat // 8)


def mutated_recipe(values: Any, chance: random.Random) -> bytes:
    """YAML text."""
    if chance.random() < 0.05:
        return chance.choice(BOMBS).encode()
    text = yaml.safe_dump(mutated_values(values, chance), allow_unicode=False).encode()
    return mutated_bytes(text, chance) if chance.random() < 0.4 else text


def mutated_onnx(model: onnx.ModelProto, chance: random.Random) -> bytes:
    """A model of which one to three fields anywhere are set to hostile values, removed or doubled."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for _ in range(chance.randint(1, 3)):
        message: Any = changed
        while True:
            fields = [field for field, _ in message.ListFields()]
            if not fields:
                break
            field = chance.choice(fields)
            value = getattr(message, field.name)
            many = not isinstance(value, (int, float, str, bytes)) and not hasattr(value, "ListFields")
            if field.message_type and chance.random() < 0.85:
                message = value[chance.randrange(len(value))] if many else value
                continue
            _change(message, field.name, value, many, chance)
            break
    content = changed.SerializeToString()
    return mutated_bytes(content, chance) if chance.random() < 0.3 else content


def _change(message: Any, name: str, value: Any, many: bool, chance: random.Random) -> None:
    if many:
        kind = chance.randrange(3)
        if kind == 0:
            message.ClearField(name)
        elif kind == 1:
            del value[chance.randrange(len(value))]
        elif hasattr(value[0], "CopyFrom"):
            value.add().CopyFrom(chance.choice(value))
        elif isinstance(value[0], int):
            value[chance.randrange(len(value))] = chance.choice([-1, 0, 2**20, 2**40, 2**62])
    elif isinstance(value, bool | int):
        with contextlib.suppress(ValueError):  # of an enumeration
            setattr(message, name, chance.choice([0, 1, 2, 7, 100]))
    elif isinstance(value, str):
        setattr(
            message, name, chance.choice(["", "x", "\x1b[2J", "[" * 9999, "{}", '{"image_size": -1}', "Add", "nowhere"])
        )
    elif isinstance(value, bytes):
        setattr(message, name, value[: len(value) // 2])
    else:
        message.ClearField(name)
