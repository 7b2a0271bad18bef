"""Ways in which a shard gets damaged, each at a place that a seed chooses; offsets are those of the sound shard."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

from step3vl.data.tar_index import BLOCK, ShardIndex

HEADER, JSON, IMAGE = "a bit in a header", "a bit in a json", "a bit in an image"
KINDS = (
    "cut inside a payload",
    "cut between the members of a sample",
    "cut between samples",
    HEADER,
    JSON,
    IMAGE,
    "zeroed blocks",
    "garbage",
    "empty",
    "missing",
    "a member left out",
)


def damage(kind: str, path: Path, index: ShardIndex, seed: int) -> None:
    """Damage the shard in place; `index` says where things lie, and every sample of it has an image and a json."""
    rng = random.Random(f"{kind} {seed}")
    data = bytearray(path.read_bytes())
    i = rng.randrange(1, len(index))
    members = list(index.samples[i][1].items())
    name, (start, size) = rng.choice(members)
    match kind:
        case "cut inside a payload":
            data = data[: rng.randrange(start + 1, start + size)]
        case "cut between the members of a sample":
            data = data[: members[1][1][0] - BLOCK]
        case "cut between samples":
            data = data[: members[0][1][0] - BLOCK]
        case "a bit in a header":
            data[start - BLOCK + rng.randrange(345)] ^= 1 << rng.randrange(8)
        case "a bit in a json" | "a bit in an image":
            name, (start, size) = next(m for m in members if (m[0] == "json") == (kind == JSON))
            data[start + rng.randrange(size)] ^= 1 << rng.randrange(8)
        case "zeroed blocks":
            num = rng.randrange(1, 9)
            start = rng.randrange(len(data) // BLOCK - num) * BLOCK
            data[start : start + num * BLOCK] = bytes(num * BLOCK)
        case "garbage":
            size = len(data) if rng.random() < 0.5 else rng.randrange(1, 2 * len(data))
            data = bytearray(rng.randbytes(size))
        case "empty":
            data = bytearray()
        case "missing":
            path.unlink()
            return
        case "a member left out":
            path.write_bytes(_without(f"{index.samples[i][0]}.{name}", path))
            return
        case _:
            raise ValueError(f"no kind of damage {kind!r}; there are {', '.join(KINDS)}")
    path.write_bytes(data)


def _without(name: str, path: Path) -> bytes:
    """The tar without one member; every other member keeps its bytes."""
    buffer = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new:
        members = old.getmembers()
        assert name in {member.name for member in members}
        for member in members:
            if member.name != name:
                new.addfile(member, old.extractfile(member))
    return buffer.getvalue()
