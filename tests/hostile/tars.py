"""Shards: what a tar may hold, and how it may lie."""

import gzip
import io
import os
import pickle
import tarfile

from step3vl.data.shards import ShardReader, find_shards

ROW = b'{"id": "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("../../owned",))


def made(*members, mode="w", name="s.tar"):
    """A case: a tar of (name, bytes or TarInfo) members, read sample by sample."""

    def case(folder):
        with tarfile.open(folder / name, mode, format=tarfile.PAX_FORMAT) as tar:
            for member, data in members:
                info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
                info.size = len(data) if info.isreg() else 0
                tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
        return lambda: read(folder / name)

    return case


def raw(data, name="s.tar"):
    def case(folder):
        (folder / name).write_bytes(data)
        return lambda: read(folder / name)

    return case


def read(path):
    reader, num_read = ShardReader(path, strict=False), 0
    for i in range(len(reader)):
        try:
            reader.read(i)
            num_read += 1
        except ValueError:
            continue
    if not num_read:
        raise ValueError("no sample of it can be used")


def link(kind, target):
    info = tarfile.TarInfo("a.json")
    info.type, info.linkname = kind, target
    return info


def header(size=b"00000000000\0", name=b"a.json", kind=b"0"):
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124:136], block[156:157] = b"0000644\0", size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


EVIL = pickle.dumps(Evil())
CASES = {
    "pickle member": made(("a.json", ROW), ("a.pkl", EVIL)),
    "pyd member": made(("a.json", ROW), ("a.pyd", EVIL)),
    "pth member": made(("a.json", ROW), ("a.pth", EVIL)),
    "npy of objects": made(("a.json", ROW), ("a.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'shape': ()}" + EVIL)),
    "a key that climbs": made(("../../owned.json", ROW)),
    "an absolute key": made(("/tmp/owned.json", ROW)),
    "a key of dots": made(("...json", ROW), ("..", b"x")),
    "symbolic link": made((link(tarfile.SYMTYPE, "/etc/passwd"), b"")),
    "hard link": made(("b.json", ROW), (link(tarfile.LNKTYPE, "b.json"), b"")),
    "device": made((link(tarfile.CHRTYPE, ""), b"")),
    "fifo": made((link(tarfile.FIFOTYPE, ""), b"")),
    "twice": made(("a.json", ROW), ("a.json", ROW)),
    "a name with a line end": made(("a\nb.json", ROW)),
    "a name of 60,000 letters": made(("a" * 60_000 + ".json", ROW)),
    "json of 70 MB": made(("a.json", b" " * 70_000_000 + ROW)),
    "json nested 100,000 deep": made(("a.json", b"[" * 100_000)),
    "20,000 members": made(*((f"{i}.json", ROW) for i in range(20_000))),
    "gzip that holds 1 GB": lambda folder: raw(gzip.compress(bytes(2**20) * 64))(folder),
    "size that is negative": raw(header(b"\xff" * 12) + bytes(2048)),
    "size of 8 GB": raw(header(b"77777777777\0") + bytes(2048)),
    "size in letters": raw(header(b"hello world\0") + bytes(2048)),
    "long name that never ends": raw(header(b"77777777777\0", kind=b"L") + bytes(2048)),
    "pax header of itself": raw(header(b"00000000020\0", kind=b"x") + b"20 path=../../owned\n" + bytes(2048)),
    "zeros": raw(bytes(10_000)),
    "noise": raw(bytes(range(256)) * 100),
    "one byte": raw(b"x"),
    "a pipe as a name": lambda folder: lambda: find_shards("pipe:touch ../../owned |"),
    "a pattern that climbs": lambda folder: lambda: find_shards(str(folder / "../../../nowhere/*.tar")),
    "a folder as a shard": lambda folder: lambda: read(folder),
}
