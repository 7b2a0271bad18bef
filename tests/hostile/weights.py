"""Checkpoints: pickles that want to run, headers that lie, names that climb."""

import json
import os
import pickle
import struct

import torch

from step3vl.saving import Writer, read_checkpoint
from step3vl.weights import open_source
from step3vl.weights.manifest import digest, write_manifest
from step3vl.weights.runs import choose


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("../../owned",))


def pickled(name, value):
    def case(folder):
        torch.save(value, folder / name)
        return lambda: use(folder / name)

    return case


def use(path):
    source = open_source(path)
    for name, _ in source.keys().items():
        source.read(name)


def safetensors(header, data=b"", length=None, name="model.safetensors"):
    def case(folder):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return lambda: use(folder / name)

    return case


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def own(change):
    """A checkpoint of ours with something done to it."""

    def case(folder):
        Writer().save({"state_dict": {"vlm.a": torch.ones(3)}, "global_step": 1}, folder / "step-00000001")
        change(folder / "step-00000001")
        return lambda: (read_checkpoint(choose(folder / "step-00000001")), use(folder / "step-00000001"))

    return case


def sealed(folder, **files):
    """Put files into a checkpoint and give it a manifest that agrees with them."""
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    names = [path for path in folder.iterdir() if path.name != "manifest.json"]
    write_manifest(folder, {path.name: digest(path) for path in names}, {})


def evil_state(folder):
    torch.save(Evil(), folder / "state.pt")
    sealed(folder)


def climbing_manifest(folder):
    (folder.parent / "outside").write_bytes(b"x")
    write_manifest(folder, {"../outside": digest(folder.parent / "outside")}, {})


CASES = {
    "pickle that runs": pickled("a.pt", Evil()),
    "pickle that runs in a state dict": pickled("a.pth", {"w": torch.ones(1), "evil": Evil()}),
    "pickle in a ckpt": pickled("a.ckpt", {"state_dict": {"w": torch.ones(1)}, "hparams": Evil()}),
    "bare pickle": lambda folder: (
        (folder / "a.bin").write_bytes(pickle.dumps(Evil())) and (lambda: use(folder / "a.bin"))
    ),
    "a state dict of no tensors": pickled("a.pt", {"a": 1}),
    "a list": pickled("a.pt", [1, 2]),
    "header of 2**60 bytes": safetensors({}, length=2**60),
    "header that is no JSON": safetensors(b"{hello"),
    "header that is a list": safetensors([1]),
    "header 20,000 deep": safetensors(b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
    "tensor of 10**12 numbers": safetensors({"a": entry([10**12], [0, 4 * 10**12])}),
    "tensor beyond the file": safetensors({"a": entry([4], [0, 16])}, b"1234"),
    "negative offsets": safetensors({"a": entry([1], [-4, 0])}, b"1234"),
    "negative shape": safetensors({"a": entry([-1], [0, 4])}, b"1234"),
    "shape of words": safetensors({"a": entry(["x"], [0, 4])}, b"1234"),
    "a dtype that is not": safetensors({"a": entry([1], [0, 4], "F99")}, b"1234"),
    "tensors that overlap": safetensors({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, b"1234"),
    "metadata that is a number": safetensors({"__metadata__": 5, "a": entry([1], [0, 4])}, b"1234"),
    "a name of a megabyte": safetensors({"a" * 10**6: entry([1], [0, 4])}, b"1234"),
    "an index that climbs": lambda folder: (
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../../etc/passwd"}}))
        and (lambda: use(folder))
    ),
    "an index that is a number": lambda folder: (
        (folder / "model.safetensors.index.json").write_text("5") and (lambda: use(folder))
    ),
    "our state that runs": own(evil_state),
    "our manifest that climbs": own(climbing_manifest),
    "our manifest as a list": own(lambda folder: (folder / "manifest.json").write_text("[]")),
    "our manifest of 20,000 levels": own(lambda folder: (folder / "manifest.json").write_text("[" * 20_000)),
    "our pieces with rows that lie": own(lambda folder: sealed(folder, tensors_00000__safetensors=b"x")),
    "our folder that is empty": own(lambda folder: [path.unlink() for path in folder.iterdir()]),
}
