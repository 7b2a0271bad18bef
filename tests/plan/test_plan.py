"""A plan's figures against what is known, what is counted, and what a real step takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from step3vl.cli import main
from step3vl.config import ConfigError, compose
from step3vl.data.mixture import Mixture, Source
from step3vl.data.processor import Processor
from step3vl.plan.activations import measure
from step3vl.plan.command import bound_processor, mean_sample, read_mix
from step3vl.plan.memory import RECOMPUTED, local, shard_numel, sharding
from step3vl.plan.parts import build_optimizer, optimizer_state
from step3vl.plan.plan import make_plan, prepare
from step3vl.plan.report import scaled
from step3vl.plan.workload import Mean, measured_mean, typical_mean, typical_size, workload
from step3vl.types import Grids, Size

RUN = "experiments/step3vl_10b/1_pretrain_phase1.yaml"
SFT = "experiments/step3vl_10b/3_sft_stage1.yaml"
TEXT = Mean(100, 50, 0, 0, 1e9)


@pytest.fixture(autouse=True)
def here(workplace):
    return workplace


def tiny(*overrides, file=RUN):
    return compose([file], overrides, "tiny").config


def real(config):
    """The model of a composed run with weights."""
    vlm = prepare(config)
    vlm.to_empty(device="cpu")
    vlm.init_weights()
    for buffer in vlm.buffers():
        assert buffer.isfinite().all()
    return vlm


def planned(config, sample=TEXT, **more):
    vlm = prepare(config)
    return make_plan(config, vlm, sample, (), **more)


# ------------------------------------------------------------------------------------------------ known and counted


def test_parameters_are_those_of_the_full_model():
    vlm = prepare(compose([RUN]).config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in vlm.named_children()}
    assert sum(parts.values()) == 10_171_750_144 and parts["decoder"] == 8_190_735_360
    assert all(p.is_meta for p in vlm.parameters())


@pytest.mark.parametrize("optimizer", ["optimizer/adamw.yaml", "optimizer/muon.yaml"])
def test_state_is_what_a_real_step_leaves(optimizer):
    config = tiny(f"model.optimizer={optimizer}", "model.freeze=[vision_encoder]")
    plan = planned(config)
    vlm = real(config)
    trained = [p for p in vlm.parameters() if p.requires_grad]
    assert plan.trained == sum(p.numel() for p in trained) < sum(plan.parameters.values())
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    real_optimizer = build_optimizer(vlm, config["model"]["init_args"])
    real_optimizer.step()
    tensors = [v for s in real_optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim]
    assert plan.memory.parameters == sum(p.nbytes for p in vlm.parameters())
    assert plan.memory.gradients == sum(p.grad.nbytes for p in trained)
    assert plan.memory.optimizer == sum(t.nbytes for t in tensors) > 0
    assert plan.checkpoint == plan.memory.parameters + plan.memory.optimizer
    assert plan.weights == 2 * sum(p.numel() for p in vlm.parameters())


def test_activations_are_what_a_real_forward_keeps():
    """A whole model with more layers, tokens and views than the trial, in fp32 and under autocast."""
    config = tiny()
    card = config["model"]["init_args"]["vlm"]
    vlm = real(config)
    spec = vlm.image_spec
    sides = [spec.layout.crop_pixels] * 3 + [spec.layout.global_pixels] * 2
    num_patches = sum((side // spec.patch_size) ** 2 + vlm.vision_encoder.num_prefix for side in sides)
    views = Grids.stack([torch.zeros(3, side, side) for side in sides])
    for precision, num in (("32-true", 400), ("bf16-mixed", 32)):  # 16 bits on a CPU keep attention weights too
        found = measure(card, precision)
        embeds = torch.zeros(1, num, vlm.decoder.hidden_size, requires_grad=True)
        kept = counted(vlm, lambda e=embeds, n=num: vlm.decoder(e, torch.arange(n)[None]), precision)
        assert found.decoder.bytes(num, False) == pytest.approx(kept, rel=0.02)
        assert found.decoder.bytes(num, True) < kept
        assert found.decoder.input_of_a_block == 4 * vlm.decoder.hidden_size
        assert found.vision_encoder.input_of_a_block == 4 * vlm.vision_encoder.hidden_size
        assert (found.decoder.a_block > 0) == (precision == "bf16-mixed"), "copies that autocast makes of weights"
        if precision == "32-true":
            kept = counted(vlm, lambda: vlm.vision_encoder(views), precision)
            assert found.vision_encoder.bytes(num_patches, False) == pytest.approx(kept, rel=0.05)


def counted(vlm, run, precision):
    own = {p.untyped_storage().data_ptr() for p in vlm.parameters()}
    seen = {}

    def pack(tensor):
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())

    with (
        saved_tensors_hooks(pack, lambda nothing: nothing),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        run()
    return sum(t.untyped_storage().nbytes() for address, t in seen.items() if address not in own)


STEP = """
import json, re, resource, sys
import torch
from step3vl.config import compose
from step3vl.losses.token import CrossEntropy
from step3vl.plan.parts import build_optimizer
from step3vl.plan.plan import prepare
from step3vl.types import Batch

def peak():  # not ru_maxrss, which remembers the process that forked this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

config = compose([sys.argv[1]], sys.argv[2].split(), "tiny").config
a = torch.randn(512, 512).requires_grad_()
with torch.autocast("cpu", torch.bfloat16):
    (a @ a).sum().backward()  # libraries are loaded
vlm = prepare(config)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
vlm.to_empty(device="cpu")
vlm.init_weights()
optimizer = build_optimizer(vlm, config["model"]["init_args"])
num = int(sys.argv[3])
ids = torch.randint(0, vlm.decoder.vocab_size, (1, num))
for _ in range(2):
    batch = Batch(input_ids=ids, labels=ids, loss_weights=torch.ones(1, num), position_ids=torch.arange(num)[None])
    with torch.autocast("cpu", torch.bfloat16):
        loss = CrossEntropy()(vlm(batch), vlm.decoder.lm_head, batch)
    loss.value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
print(json.dumps(peak() - before))
"""


def test_the_peak_is_that_of_a_real_step():
    """Resident memory of two steps of a small model, text only: the plan is right to 15 %."""
    wide = ["hidden_size=384", "intermediate_size=1536", "num_layers=6", "num_heads=6", "head_dim=64"]
    overrides = [f"model.vlm.decoder.{text}" for text in [*wide, "vocab_size=4096"]]
    overrides += ["model.optimizer=optimizer/adamw.yaml", "data.samples_per_step=1", "data.seq_len=400"]
    config = tiny(*overrides, "trainer.precision=bf16-mixed")
    plan = planned(config, Mean(400, 400, 0, 0, 1e9))
    done = subprocess.run(
        [sys.executable, "-c", STEP, RUN, " ".join(overrides), "400"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
    )
    measured = json.loads(done.stdout)
    assert plan.memory.peak("none") == pytest.approx(measured, rel=0.15), (plan.memory, measured)


# ------------------------------------------------------------------------------------------------ sharding


def strategy(name="step3vl.parallel.ShardedStrategy", **arguments):
    return {"class_path": name, "init_args": arguments}


@pytest.mark.parametrize(
    "trainer, precision, found",
    [
        ({"devices": 1}, "32-true", (1, 1, torch.float32, False)),
        ({"devices": 8, "num_nodes": 4, "strategy": "ddp"}, "bf16-mixed", (32, 1, torch.float32, True)),
        (
            {"devices": 8, "strategy": strategy("lightning.DDPStrategy", gradient_as_bucket_view=True)},
            "bf16-true",
            (8, 1, torch.bfloat16, False),
        ),
        (
            {"devices": 8, "num_nodes": 4, "strategy": strategy(data_parallel_size=32, gather_dtype="bfloat16")},
            "bf16-mixed",
            (32, 32, torch.bfloat16, False),
        ),
        (
            {"devices": 8, "num_nodes": 4, "strategy": strategy(data_parallel_size=8, replicate_size=4)},
            "bf16-mixed",
            (32, 8, torch.float32, False),
        ),
        ({"devices": 8, "strategy": "fsdp"}, "bf16-true", (8, 8, torch.bfloat16, False)),
    ],
)
def test_strategies(trainer, precision, found):
    cut = sharding(trainer, precision)
    assert (cut.num_ranks, cut.num_shards, cut.computes_in, cut.has_buckets) == found


def test_shards_are_those_of_fsdp2():
    """Rank 0 of seven pretended ranks holds what the plan says, where axes do not divide evenly."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from step3vl.parallel import shard

    vlm = prepare(tiny())
    expected = local(list(vlm.parameters()), 7, 4)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=7)
    try:
        mesh = init_device_mesh("cpu", (7,))
        shard(vlm, [*vlm.vision_encoder.blocks(), *vlm.decoder.blocks()], mesh)
        held = sum(p.to_local().numel() * 4 for p in vlm.parameters())
    finally:
        torch.distributed.destroy_process_group()
    assert expected == held
    assert shard_numel(torch.nn.Parameter(torch.zeros(5, 3)), 4) == 6


def test_sharding_and_recomputation_lower_the_peak():
    sample = Mean(100, 50, 4, 1, 1e9)
    one = planned(tiny("trainer.devices=1"), sample)
    cut = "trainer.strategy={class_path: step3vl.parallel.ShardedStrategy, init_args: {data_parallel_size: 4}}"
    four = planned(tiny("trainer.devices=4", cut), sample)
    assert four.memory.state < one.memory.state / 3 and four.memory.gathered > 0 and four.memory.root > 0
    assert one.memory.gathered == one.memory.root == 0
    peaks = four.memory.activations
    assert peaks["none"] > max(peaks["vision"], peaks["decoder"]) > min(peaks["vision"], peaks["decoder"])
    assert min(peaks.values()) == peaks["blocks"]
    assert set(peaks) == set(RECOMPUTED)
    text = planned(tiny(), TEXT).memory.activations
    assert text["vision"] == text["none"] > text["decoder"] == text["blocks"], "text has no use for the tower"


# ------------------------------------------------------------------------------------------------ work


def test_flops_are_the_models_own():
    config = tiny("model.freeze=[vision_encoder]")
    vlm = prepare(config)
    data = config["data"]["init_args"]
    sample, words = typical_mean(data, vlm, {"text": 0.5, "image": 0.3, "page": 0.2}, text_tokens=40)
    flops = real(config).flops().sample
    sizes = {kind: typical_size(kind, vlm, 40) for kind in ("text", "image", "page")}
    assert sizes["text"] == Size(40, 20, 0, 0) and sizes["page"].num_crops > sizes["image"].num_crops > 0
    expected = 0.5 * flops(sizes["text"]) + 0.3 * flops(sizes["image"]) + 0.2 * flops(sizes["page"])
    assert sample.flops == pytest.approx(expected) and sample.num_global_views == pytest.approx(0.5)
    assert any("page has" in text for text in words)
    work = workload(config, 4, sample, ())
    assert work.flops_per_step == pytest.approx(4 * data["samples_per_step"] * expected)
    plan = make_plan(config, vlm, sample, (), gpu="H100", mfu=0.5)
    assert plan.seconds_per_step == pytest.approx(data["samples_per_step"] * expected / (989e12 * 0.5))
    assert plan.days == pytest.approx(config["trainer"]["max_steps"] * plan.seconds_per_step / 86400)


def test_typical_visual_tokens_are_the_processors():
    """An image of the typical size, laid out by the real processor, has as many crops and visual tokens."""
    config = compose([RUN]).config
    vlm = prepare(config)
    size = typical_size("image", vlm, 100)
    processor = Processor().bind(vlm.image_spec, vlm.projector.grid)
    from step3vl.plan.workload import image_size
    from step3vl.types import Message

    messages = [Message(role="user", content="<image>x"), Message(role="assistant", content="y")]
    text = [Message(role="user", content="x"), Message(role="assistant", content="y")]
    found = processor.measure(messages, [image_size("image", vlm)], "a")
    bare = processor.measure(text, [], "b")
    assert (size.num_crops, size.num_global_views) == (found.num_crops, found.num_global_views) == (4, 1)
    assert size.num_tokens - 100 == found.num_tokens - bare.num_tokens


def test_shares_of_tokens_and_rows():
    config = tiny(file=SFT)
    vlm, data = prepare(config), config["data"]["init_args"]
    sample, words = typical_mean(data, vlm)
    image = typical_size("image", vlm, 2048).num_tokens
    share = 0.1 / image / (0.1 / image + 0.9 / 2048)
    assert sample.num_global_views == pytest.approx(share) and words[0].startswith("10% of tokens")
    work = workload({**config, "trainer": {"accumulate_grad_batches": 3}}, 2, sample, ())
    assert work.tokens_per_step == 6 * data["rows_per_step"] * data["seq_len"] and work.is_counted_in_rows
    assert work.samples_per_step == pytest.approx(work.tokens_per_step / sample.num_tokens)
    assert typical_mean(data, vlm, images=0.25)[0].num_global_views == pytest.approx(0.25)


def test_measured_shards_are_used(here):
    config = tiny()
    vlm, data = prepare(config), config["data"]["init_args"]
    sample, words = mean_sample(config, vlm, None, None, None)
    assert "are not measured yet" in words[0]
    processor = bound_processor(config, vlm)
    mixture = Mixture(data["root"], {n: Source(**s) for n, s in data["sources"].items()})
    mixture.measure(processor, data["seq_len"])
    sample, words = mean_sample(config, vlm, None, None, None)
    assert words == ("samples as measured in corpus, mixed by the weights of data.sources",)
    sizes = [mixture.size(mixture.sample_draw(j)) for j in range(3000)]
    assert sample.num_tokens == pytest.approx(np.mean([s.num_tokens for s in sizes]), rel=0.05)
    assert sample.flops == pytest.approx(np.mean([vlm.flops().sample(s) for s in sizes]), rel=0.05)
    assert "given" in mean_sample(config, vlm, {"text": 1.0}, None, None)[1][0]
    short = {**data, "seq_len": 1}
    assert "no sample of the source digits fits" in measured_mean(short, processor, vlm)


def test_the_largest_micro_batch_is_the_last_that_fits(monkeypatch):
    from step3vl.plan import plan as module

    config = tiny()
    sample = Mean(4096, 100, 0, 0, 1e9)  # a row each
    whole = planned(config, sample)
    row = whole.memory.activations["none"] // 32
    monkeypatch.setitem(module.GPU_BYTES, "H100", (whole.memory.fixed + 10.5 * row) / module.USABLE)
    plan = planned(config, sample)
    assert plan.largest["none"] == 10 and not plan.fits("none") and plan.unit == "samples"
    assert plan.largest["decoder"] > 10 and whole.largest["none"] == 32


# ------------------------------------------------------------------------------------------------ command line


def test_plan_prints_tables_and_json(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ["plan", RUN, "--scale", "tiny", "--images", "0.5", "--gpu", "H200", "--mfu", "0.3"]
    assert main([*words, "--model.recompute=blocks"]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("blocks (this run)", "1 x H200 at MFU 0.3", "checkpoint", "50% of samples"))
    assert main([*words, "--json", "--trainer.max_steps=7"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["run"]["max_steps"] == 7 and facts["parameters"]["all"] == 2_045_984
    assert facts["memory"]["peak"]["none"] > facts["memory"]["peak"]["blocks"]
    assert facts["run"]["tokens"] == pytest.approx(7 * facts["step"]["tokens"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["--gpu", "H800x"], "no data sheet of 'H800x'"),
        (["--mfu", "1.5"], "--mfu is a share between 0 and 1, got 1.5"),
        (["--images", "2"], "--images is a share of samples between 0 and 1, got 2.0"),
        (["--mix", "txt=1"], "no kind of sample 'txt'; did you mean text?"),
        (["--mix", "text"], "write KIND=SHARE"),
        (["--mix", "text=0"], "all shares are 0"),
        (["--mix", "text=-1"], "must not be below 0"),
        (["--trainer.max_steps=-1"], "a plan needs a number of steps"),
        (["--model.optimizer.lrr=1"], "'lrr'"),
        (["wrong"], "unknown argument 'wrong'"),
    ],
)
def test_mistakes_are_one_sentence(capsys, words, said):
    assert main(["plan", RUN, "--scale", "tiny", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error


def test_an_encoder_without_depth_is_named():
    card = tiny()["model"]["init_args"]["vlm"]
    del card["init_args"]["vision_encoder"]["init_args"]["num_layers"]
    with pytest.raises(ValueError, match="PELang has no argument num_layers"):
        measure(card, "32-true")


def test_an_encoder_without_blocks_keeps_nothing():
    """The control of noise in Table 4."""
    card = compose(["ablations/table4_vision_encoder/noise.yaml"], scale="tiny").config["model"]["init_args"]["vlm"]
    kept = measure(card, "32-true")
    assert kept.vision_encoder.bytes(1000, recomputes=False) == 0 < kept.decoder.bytes(1000, recomputes=False)


def test_a_stage_without_a_model_of_both_is_named(capsys):
    assert main(["plan", "experiments/encoders/siglip2/1_sigmoid.yaml"]) == 2
    assert "plan: ContrastiveStage trains no vision-language model" in capsys.readouterr().err


def test_small_things():
    assert [scaled(v) for v in (0, 999, 1000, 999_600, 10_171_750_144)] == ["0", "999", "1 k", "1 M", "10.2 G"]
    assert read_mix("text=0.5, image=0.5") == {"text": 0.5, "image": 0.5} and read_mix(None) is None
    with pytest.raises(ConfigError):
        read_mix("text=much")
    vlm = prepare(tiny())
    assert sum(optimizer_state(vlm, torch.optim.SGD(vlm.parameters(), lr=0.1)).values()) == 0
    assert Path(RUN).exists()
