"""Exact normalisation: accumulation, packing and the number of ranks change nothing; resume continues the same run."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from step3vl.config import compose
from step3vl.data import Processor, Source, TrainData
from step3vl.models import ConvProjector, Qwen3Decoder, VisionLanguageModel
from step3vl.models.vision import PELang
from step3vl.optim import MuonAdamW, ParamGroup
from step3vl.stages import PretrainStage
from step3vl.types import IGNORE_INDEX, MultiCrop

SOURCES = {
    "digits": Source(shards="train/documents-digits-*.tar", weight=2.0),
    "text": Source(shards="train/text-*.tar", weight=1.0),
}


def tiny_vlm():
    layout = MultiCrop(global_size=64, crop_size=48, max_side=256, min_side=8)
    encoder = PELang(hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, patch_size=8, grid_size=8, layout=layout)
    sizes = dict(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
    return VisionLanguageModel(encoder, ConvProjector, Qwen3Decoder(**sizes, vocab_size=1024, init_std=0.1))


def run(corpus, samples, accumulate=1, num_steps=3, loss_weight="token", seq_len=512, optimizer=None, **trainer_args):
    """Train a few steps; returns the stage. SGD without clipping, because both would hide a constant factor."""
    seed_everything(1, verbose=False)
    vlm, processor = tiny_vlm(), Processor(template="plain")
    stage = PretrainStage(vlm, processor, optimizer or (lambda groups: torch.optim.SGD(groups, lr=0.05)))
    data = TrainData(str(corpus), SOURCES, seq_len, num_steps * accumulate, samples, loss_weight=loss_weight)
    processor.bind(vlm.image_spec, vlm.projector.grid)
    vlm.bind(processor.image_token_id)
    data.connect(processor)
    ckpt = trainer_args.pop("ckpt_path", None)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = Trainer(
        **{**quiet, **trainer_args},
        accelerator="cpu",
        devices=1,
        max_steps=num_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, data, ckpt_path=ckpt)
    return stage


def assert_same(a, b, tolerance):
    for (name, p), q in zip(a.vlm.named_parameters(), b.vlm.parameters()):
        torch.testing.assert_close(p, q, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss_weight", ["token", "sample", "sqrt"])
def test_accumulated_equals_full_batch(small_corpus, loss_weight):
    full = run(small_corpus, samples=8, loss_weight=loss_weight)
    parts = run(small_corpus, samples=2, accumulate=4, loss_weight=loss_weight)
    before = run(small_corpus, samples=8, loss_weight=loss_weight, num_steps=1)
    assert_same(full, parts, 1e-5)
    with pytest.raises(AssertionError):  # the comparison can fail: other steps give other weights
        assert_same(full, before, 1e-5)


def test_packing_changes_nothing(small_corpus):
    assert_same(run(small_corpus, samples=8, seq_len=1024), run(small_corpus, samples=8, seq_len=160), 1e-5)


def test_loss_weights_differ(small_corpus):
    with pytest.raises(AssertionError):
        assert_same(run(small_corpus, samples=8), run(small_corpus, samples=8, loss_weight="sample"), 1e-5)


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if "loss" in trainer.callback_metrics:  # logged at optimizer steps
            self.values.append(float(trainer.callback_metrics["loss"]))


def test_logged_loss_is_the_weighted_mean(small_corpus):
    losses = Losses()
    stage = run(small_corpus, samples=4, accumulate=2, num_steps=1, callbacks=[losses])
    seed_everything(1, verbose=False)
    fresh, processor = tiny_vlm(), stage.processor
    fresh.bind(processor.image_token_id)
    data = TrainData(str(small_corpus), SOURCES, 512, 1, 8)
    data.connect(processor)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    logits = fresh.decoder.lm_head(fresh(batch)).flatten(0, 1)
    mean = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE_INDEX)
    assert losses.values[-1] == pytest.approx(float(mean), abs=1e-5)


def test_frozen_parts_stay_and_groups_take_their_rate(small_corpus):
    vlm = tiny_vlm()
    groups = [ParamGroup(pattern=r"^decoder", lr=1e-4)]
    stage = PretrainStage(vlm, Processor(), lambda g: torch.optim.SGD(g, lr=1.0), None, groups, ["^vision_encoder"])
    optimizer = stage.configure_optimizers()
    names = {n for g in optimizer.param_groups for n in g["param_names"]}
    assert not any(n.startswith("vision_encoder") for n in names)
    assert {g["lr"] for g in optimizer.param_groups if any(n.startswith("decoder") for n in g["param_names"])} == {1e-4}


def test_a_batch_without_labels_is_refused(small_corpus, tmp_path):
    with pytest.raises(ValueError, match="no token of the batch carries a label"):
        run(small_corpus, samples=2, seq_len=8, default_root_dir=tmp_path)


def test_resumed_equals_uninterrupted(small_corpus, tmp_path):
    make = partial(MuonAdamW, lr=1e-2)
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    straight = run(small_corpus, samples=4, num_steps=4, optimizer=make, callbacks=[keep], enable_checkpointing=True)
    resumed = run(small_corpus, samples=4, num_steps=4, optimizer=make, ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert_same(straight, resumed, 0.0)


def test_a_checkpoint_holds_nothing_but_tensors_and_plain_data(small_corpus, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    run(small_corpus, samples=2, num_steps=1, callbacks=[keep], enable_checkpointing=True)
    loaded = torch.load(Path(tmp_path) / "last.ckpt", weights_only=True)
    assert "vlm.decoder.lm_head.weight" in loaded["state_dict"]


def test_the_paper_model_has_the_published_size():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--vlm", type=VisionLanguageModel)
    config = compose(["vlm/step3vl_10b.yaml"]).config
    with torch.device("meta"):
        vlm = parser.instantiate_classes(parser.parse_object({"vlm": config})).vlm

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(vlm.vision_encoder) == 1_743_503_104
    assert count(vlm.projector) == 212_345_856 + 25_165_824
    assert count(vlm.decoder) == 8_190_735_360
    assert count(vlm) == 10_171_750_144
