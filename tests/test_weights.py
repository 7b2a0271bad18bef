"""Sources, layouts and loading: what is read, what is refused before anything is allocated, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from step3vl.models import ConvProjector, DeepStack, Qwen3Decoder, VisionLanguageModel
from step3vl.models.vision import PELang
from step3vl.saving import Writer
from step3vl.types import MultiCrop
from step3vl.weights import (
    Entry,
    check,
    detect,
    layout_named,
    load_into,
    load_parts,
    open_source,
    save_sharded,
    unfinished,
)
from step3vl.weights.source import INDEX

LAYOUT = MultiCrop(global_size=64, crop_size=48, max_side=256, min_side=8)


def tiny_vlm(seed=0, tie=False, num_layers=2):
    torch.manual_seed(seed)
    encoder = PELang(hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, patch_size=8, grid_size=8, layout=LAYOUT)
    sizes = dict(hidden_size=32, intermediate_size=48, num_layers=num_layers, num_heads=2, num_kv_heads=1, head_dim=16)
    return VisionLanguageModel(encoder, ConvProjector, Qwen3Decoder(**sizes, vocab_size=128, tie_embeddings=tie))


def entries(tensors):
    return {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def saved(folder, tensors, max_shard_bytes=20_000):
    """A folder with several shards of these tensors."""
    with unfinished(folder) as part:
        save_sharded(entries(tensors), tensors.__getitem__, part, max_shard_bytes)
    return folder


def released(vlm):
    """A model's tensors under the released names."""
    layout = layout_named("step3vl")
    return {layout.to_theirs(name): tensor for name, tensor in vlm.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# ------------------------------------------------------------------------------------------------ writing and reading


def test_shards_are_read_back_bitwise_by_us_and_by_safetensors(tmp_path):
    tensors = {
        "half": torch.randn(7, dtype=torch.bfloat16),
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "whole": torch.arange(6).view(2, 3),
        "flag": torch.tensor(True),
        "empty": torch.empty(0, 4),
        "big": torch.randn(50, 40),
    }
    saved(tmp_path / "out", tensors, max_shard_bytes=300)
    source = open_source(tmp_path / "out")
    assert source.keys() == entries(tensors)
    same({name: source.read(name) for name in tensors}, tensors)
    theirs = {k: v for file in sorted((tmp_path / "out").glob("*.safetensors")) for k, v in load_file(file).items()}
    same({name: theirs[name] for name in tensors}, tensors)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) >= 2
    assert torch.equal(source.read("big", rows=(10, 13)), tensors["big"][10:13])


def test_every_kind_of_source_gives_the_same_tensors(tmp_path):
    vlm = tiny_vlm()
    tensors = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    save_file(tensors, tmp_path / "one.safetensors")
    torch.save(tensors, tmp_path / "plain.pt")
    torch.save({"state_dict": tensors}, tmp_path / "nested.bin")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    stage = {"state_dict": {f"vlm.{k}": v for k, v in tensors.items()} | {"loss.scale": torch.ones(1)}, "epoch": 1}
    Writer().save(stage, tmp_path / "run/checkpoints/step-00000003")
    (tmp_path / "folder").mkdir()
    save_file(tensors, tmp_path / "folder" / "model.safetensors")
    saved(tmp_path / "shards", tensors)
    for name in ("one.safetensors", "plain.pt", "nested.bin", "old.pth", "run", "folder", "shards"):
        source = open_source(tmp_path / name)
        same({key: source.read(key) for key, _ in source.keys().items()}, tensors)


def test_an_interrupted_export_leaves_nothing_that_looks_whole(tmp_path):
    tensors = tiny_vlm().state_dict()

    def read(name):
        if name.startswith("decoder.lm_head"):
            raise KeyboardInterrupt
        return tensors[name]

    with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / "out") as part:
        save_sharded(entries(tensors), read, part)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "UNFINISHED").touch()  # as a killed process leaves it
    saved(tmp_path / "out", tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "UNFINISHED").exists()
    with pytest.raises(ValueError, match="already exists"):
        saved(tmp_path / "out", tensors)
    (tmp_path / "mine.part").mkdir()
    with pytest.raises(ValueError, match="in the way"):
        saved(tmp_path / "mine", tensors)


# ------------------------------------------------------------------------------------------------ refusals


def sentence(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


def test_fifty_shards_with_one_missing_are_refused_before_anything_is_allocated(tmp_path, monkeypatch):
    tensors = {f"decoder.model.layers.{i}.weight": torch.full((64,), float(i)) for i in range(50)}
    saved(tmp_path / "many", tensors, max_shard_bytes=256)
    (tmp_path / "many" / "model-00031-of-00050.safetensors").unlink()
    monkeypatch.setattr("step3vl.weights.source.read_header", None)  # not even a header is read
    sentence(lambda: open_source(tmp_path / "many"), "50 shards", "model-00031-of-00050.safetensors")


def test_damaged_shards_are_named(tmp_path):
    tensors = tiny_vlm().state_dict()
    saved(tmp_path / "out", tensors)
    file = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    sentence(lambda: open_source(tmp_path / "out"), file.name, "cut short")
    file.write_bytes(whole[:20])
    sentence(lambda: open_source(tmp_path / "out"), file.name, "cut short")
    file.write_bytes(whole + b"1234")
    sentence(lambda: open_source(tmp_path / "out"), file.name, "header does not know")
    file.write_bytes(whole.replace(b'"F32"', b'"F64"', 1))
    sentence(lambda: open_source(tmp_path / "out"), file.name, "bytes")
    file.write_bytes(whole)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    index["weight_map"]["decoder.extra"] = file.name
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    sentence(lambda: open_source(tmp_path / "out"), file.name, "decoder.extra")
    index["weight_map"]["decoder.extra"] = "../elsewhere.safetensors"
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    sentence(lambda: open_source(tmp_path / "out"), "elsewhere", "not a file beside it")


class Runs:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_what_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "b": Runs()}, "code.pt")
    sentence(lambda: open_source("code.pt"), "code.pt", "could run code", "safetensors")
    assert not Path("ran").exists()
    torch.save({"a": torch.ones(1)}, "renamed.safetensors")
    sentence(lambda: open_source("renamed.safetensors"), "pickle, not safetensors", ".pt")
    Path("text.pt").write_text("hello")
    sentence(lambda: open_source("text.pt"), "text.pt", "not a PyTorch checkpoint")
    Path("text.safetensors").write_text("hello, this is a text")
    sentence(lambda: open_source("text.safetensors"), "not a safetensors file")
    Path("cut.pt").write_bytes(Path("code.pt").read_bytes()[:200])
    sentence(lambda: open_source("cut.pt"), "cut.pt")
    Path("empty").mkdir()
    sentence(lambda: open_source("empty"), "empty holds no checkpoint")
    sentence(lambda: open_source("nowhere"), "no checkpoint at nowhere")
    sentence(lambda: open_source("notes.md"), "no checkpoint at notes.md")
    Path("sharded").mkdir()
    Path("sharded/.metadata").touch()
    sentence(lambda: open_source("sharded"), "distributed checkpoint of torch", "consolidate_checkpoint")


# ------------------------------------------------------------------------------------------------ loading


def test_released_names_load_and_come_back(tmp_path):
    vlm = tiny_vlm(seed=1)
    theirs = released(vlm)
    assert {"vision_model.vit_downsampler1.weight", "vit_large_projector.weight", "lm_head.weight"} <= theirs.keys()
    source = open_source(saved(tmp_path / "out", theirs))
    fresh = tiny_vlm(seed=2)
    report = load_into(fresh, source)
    assert report.layout.name == "step3vl" and len(report.loaded) == len(theirs)
    same(released(fresh), theirs)
    remapped = {
        (name if name.startswith("lm_head") else "model." + name).replace(
            "model.model.", "model.language_model."
        ): tensor
        for name, tensor in theirs.items()
    }
    assert "model.vision_model.conv1.weight" in remapped and "model.language_model.norm.weight" in remapped
    fresh = tiny_vlm(seed=3)
    report = load_into(fresh, open_source(saved(tmp_path / "remapped", remapped)))
    assert report.layout.name == "step3vl_transformers"
    same(released(fresh), theirs)


def test_parts_come_from_their_own_places(tmp_path):
    one, two, model = tiny_vlm(1), tiny_vlm(2), tiny_vlm(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tower = {name.removeprefix("vision_encoder."): t for name, t in one.state_dict().items() if "encoder" in name}
    torch.save(tower, tmp_path / "pe.pt")
    saved(tmp_path / "whole", released(two))
    load_parts(model, {"vision_encoder": str(tmp_path / "pe.pt"), "decoder": str(tmp_path / "whole")})
    after = model.state_dict()
    for name, tensor in after.items():
        origin = {"vision_encoder": one.state_dict(), "projector": before, "decoder": two.state_dict()}[
            name.split(".")[0]
        ]
        assert torch.equal(tensor, origin[name]), name
    sentence(lambda: load_parts(model, {"tower": str(tmp_path / "pe.pt")}), "'tower'", "vision_encoder")
    sentence(lambda: load_parts(model, {"decoder": str(tmp_path / "pe.pt")}), "pe checkpoint, which has no decoder")
    sentence(lambda: load_parts(model, str(tmp_path / "pe.pt")), "missing", "init_from: {vision_encoder: PATH}")


def test_every_difference_is_an_error_unless_it_is_named(tmp_path):
    theirs = released(tiny_vlm(1))
    theirs["model.layers.0.mlp.extra.weight"] = torch.ones(2)
    theirs["model.norm.weight"] = torch.ones(31)
    del theirs["vision_model.ln_pre.bias"]
    source = open_source(saved(tmp_path / "odd", theirs))
    model = tiny_vlm(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    words = ["1 key is missing (vision_encoder.ln_pre.bias)", "1 key is unexpected (model.layers.0.mlp.extra.weight)"]
    sentence(
        lambda: load_into(model, source), *words, "decoder.model.norm.weight: [31] there, [32] here", "init_ignore"
    )
    same(model.state_dict(), before)
    names = ["ln_pre.bias", r"\.extra\.", "norm.weight$"]
    sentence(lambda: load_into(model, source, names[:2]), "[31] there")
    sentence(lambda: load_into(model, source, [*names, "typo"]), "'typo' matches no difference")
    sentence(lambda: load_into(model, source, ["("]), "'('", "not a regular expression")
    report = load_into(model, source, names)
    assert report.missing == ["vision_encoder.ln_pre.bias"] and report.misshaped == ["decoder.model.norm.weight"]
    after = model.state_dict()
    assert torch.equal(after["decoder.model.norm.weight"], before["decoder.model.norm.weight"])
    assert torch.equal(after["decoder.lm_head.weight"], theirs["lm_head.weight"])


def test_deepstack_starts_fresh_on_a_model_that_had_none(tmp_path):
    """The released model has no DeepStack: it is named in `ignore`, and the rest is loaded."""
    plain, model = tiny_vlm(1), tiny_vlm(2)
    model.deepstack = DeepStack(model.vision_encoder.hidden_size, 32, taps=[0], inject_after=[0])
    before = {name: tensor.clone() for name, tensor in model.deepstack.state_dict().items()}
    source = open_source(saved(tmp_path / "whole", released(plain)))
    text = sentence(lambda: load_into(model, source), "6 keys are missing", "init_ignore: ['deepstack.mergers']")
    assert "init_from: {" not in text
    report = load_into(model, source, ["^deepstack"])
    assert len(report.missing) == len(before) == 6
    same(model.deepstack.state_dict(), before)
    assert torch.equal(model.decoder.lm_head.weight, plain.decoder.lm_head.weight)
    again = tiny_vlm(3)
    again.deepstack = DeepStack(model.vision_encoder.hidden_size, 32, taps=[0], inject_after=[0])
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    assert load_into(again, open_source(tmp_path / "ours.pt")).layout.name == "ours"
    same(again.state_dict(), model.state_dict())
    torch.save(released(plain), tmp_path / "part.pt")
    sentence(lambda: load_parts(again, {"deepstack": str(tmp_path / "part.pt")}), "which has no deepstack")


def test_many_differences_are_counted(tmp_path):
    source = open_source(saved(tmp_path / "small", released(tiny_vlm(num_layers=1))))
    text = sentence(lambda: load_into(tiny_vlm(num_layers=2), source), "11 keys are missing", "and 6 more")
    assert text.count("decoder.model.layers.1.") == 5


def test_tied_embeddings(tmp_path):
    tied = released(tiny_vlm(1, tie=True))
    del tied["lm_head.weight"]
    source = open_source(saved(tmp_path / "tied", tied))
    model = tiny_vlm(2, tie=True)
    load_into(model, source)
    assert torch.equal(model.decoder.lm_head.weight, tied["model.embed_tokens.weight"])
    sentence(lambda: load_into(tiny_vlm(2), source), "decoder.lm_head.weight", "tie_embeddings: true")
    untied = open_source(saved(tmp_path / "untied", released(tiny_vlm(1))))
    sentence(lambda: load_into(model, untied), "lm_head.weight", "tie_embeddings: false")


def test_numbers_are_cast_to_the_models_format(tmp_path):
    theirs = {name: tensor.bfloat16() for name, tensor in released(tiny_vlm(1)).items()}
    model = tiny_vlm(2)
    load_into(model, open_source(saved(tmp_path / "half", theirs)))
    same({k: v.bfloat16() for k, v in released(model).items()}, theirs)
    assert model.decoder.lm_head.weight.dtype == torch.float32


def test_unknown_names_list_the_layouts():
    llama = {"model.embed_tokens.weight": Entry((8, 4), torch.float32), "model.norm.weight": Entry((4,), torch.float32)}
    sentence(lambda: detect(llama, "x"), "no known layout", "model.embed_tokens.weight", "qwen3", "siglip2")
    sentence(lambda: layout_named("lama"), "'lama'", "qwen3_vl")


def test_a_meta_model_is_not_filled_in_silence(tmp_path):
    source = open_source(saved(tmp_path / "out", released(tiny_vlm())))
    with torch.device("meta"):
        model = tiny_vlm()
    check(model.state_dict(keep_vars=True), source, accepted=_nothing())
    sentence(lambda: load_into(model, source), "meta device")


def _nothing():
    from step3vl.weights import Accepted

    return Accepted(())


SHARDED = """
import sys, torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch import nn
from step3vl.weights import open_source, load_into
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.ModuleDict({"lm_head": nn.Linear(4, 5, bias=False)})
dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
model = Model()
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
source = open_source(sys.argv[1])
read, rows = source.read, []
source.read = lambda name, only=None: (rows.append(only), read(name, only))[1]
load_into(model, source)
print(rows, model.decoder["lm_head"].weight.to_local().flatten().tolist())
"""


def test_a_shard_reads_only_its_own_rows(tmp_path):
    whole = torch.arange(20.0).view(5, 4)
    saved(tmp_path / "out", {"decoder.lm_head.weight": whole})
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"[(3, 5)] {whole[3:].flatten().tolist()}", done.stderr[-2000:]


MEMORY = """
import sys, torch
from pathlib import Path
from step3vl.weights import Entry, open_source, save_sharded, unfinished
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
source = open_source(sys.argv[1])
before = peak()
entries = {name: Entry(e.shape, torch.bfloat16) for name, e in source.keys().items()}
with unfinished(sys.argv[2]) as part:
    save_sharded(entries, lambda name: source.read(name).bfloat16(), part, 64_000_000)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's record of peak memory")
def test_conversion_stays_below_twice_the_largest_shard(tmp_path):
    shard = 48_000_000
    tensor = torch.ones(shard // 3 // 4)
    tensors = {f"decoder.model.layers.{i}.weight": tensor for i in range(15)}  # 240 MB in 5 shards of 48 MB
    saved(tmp_path / "large", tensors, max_shard_bytes=shard)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) == 5
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large"), str(tmp_path / "half")]
    steady = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # else glibc keeps freed blocks below 32 MB for later
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=steady)
    assert int(done.stdout) < 2 * shard
    assert torch.equal(open_source(tmp_path / "half").read("decoder.model.layers.7.weight"), tensor.bfloat16())
