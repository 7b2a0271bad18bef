"""Encoders by themselves: normalisation, teacher, resuming, and that the encoder alone comes out of a run."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from step3vl.callbacks import Checkpoints, Upbringing
from step3vl.data import CropData, CropRecipe, PairData, Processor, Source, TrainData
from step3vl.losses.contrastive import SigmoidContrast, SoftmaxContrast
from step3vl.models import ConvProjector, Qwen3Decoder, VisionLanguageModel
from step3vl.models.pooling import AttentionPool
from step3vl.models.prototypes import PrototypeHead
from step3vl.models.text_tower import TextTower
from step3vl.models.vision import DINOv3, PELang
from step3vl.optim import MuonAdamW
from step3vl.stages import ContrastiveStage, SelfDistillationStage
from step3vl.types import MultiCrop
from step3vl.weights import load_parts

LAYOUT = MultiCrop(global_size=64, crop_size=48, max_side=256, min_side=8)
SOURCES = {"digits": Source("train/documents-digits-level0-*.tar", 1.0)}
RECIPE = CropRecipe(global_size=32, local_size=16, num_local=2)


def pe():
    return PELang(16, 2, 2, 32, patch_size=8, grid_size=8, layout=LAYOUT)


def dino():
    return DINOv3(16, 2, 2, 32, patch_size=8, num_registers=1, layout=LAYOUT)


def contrastive(loss=SoftmaxContrast, encoder=None, **more):
    pool = partial(AttentionPool, num_heads=2)
    text = TextTower(16, 1, 2, 1024, 64, 8)
    make = more.pop("optimizer", lambda groups: torch.optim.SGD(groups, lr=0.1))
    return ContrastiveStage(encoder or pe(), pool, text, Processor(), make, loss(), **more)


def distillation(encoder=None, **more):
    head = partial(PrototypeHead, hidden_size=16, bottleneck_size=8, num_prototypes=12)
    make = more.pop("optimizer", partial(MuonAdamW, lr=1e-2))
    return SelfDistillationStage(encoder or dino(), head, make, momentum=0.9, **more)


def pairs(corpus, samples=4, num_steps=3, **more):
    return PairData(str(corpus), SOURCES, samples, num_steps, 64, **more)


def crops(corpus, samples=4, num_steps=4):
    return CropData(str(corpus), SOURCES, samples, num_steps, RECIPE)


def fit(make, data, num_steps=3, accumulate=1, ckpt_path=None, callbacks=(), devices=1, **trainer):
    seed_everything(1, verbose=False)
    stage = make()
    stage.connect(data)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        max_steps=num_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **trainer,
    )
    trainer.fit(stage, data, ckpt_path=ckpt_path)
    return stage


def same(a, b, tolerance=0.0):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("max_tokens", "cut"), [(64, 0.0), (2, 1.0)])
def test_captions_that_lose_their_end_are_logged(small_corpus, max_tokens, cut):
    stage = fit(contrastive, PairData(str(small_corpus), SOURCES, 4, 1, max_tokens), num_steps=1)
    assert stage.trainer.logged_metrics["cut"] == cut


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss", [SoftmaxContrast, SigmoidContrast])
def test_the_step_is_that_of_the_mean_over_images(small_corpus, loss, accumulate):
    data = pairs(small_corpus, num_steps=accumulate)
    stage = fit(partial(contrastive, loss), data, num_steps=1, accumulate=accumulate)
    seed_everything(1, verbose=False)
    plain, data = contrastive(loss), pairs(small_corpus, num_steps=accumulate)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    plain.connect(data)
    data.setup("fit")
    for batch in data.train_dataloader():
        (plain.losses(batch)["loss"].value / (4 * accumulate)).backward()
    with torch.no_grad():
        for p in plain.parameters():
            p -= 0.1 * p.grad
    same(stage, plain, 1e-5)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in stage.named_parameters()}
    assert moved["vision_encoder.conv1.weight"] > 1e-5 and moved["loss.log_scale"] > 0, moved


def test_teacher_is_the_moving_average_and_is_kept(small_corpus):
    stage = fit(distillation, crops(small_corpus), num_steps=1)
    seed_everything(1, verbose=False)
    start = distillation()
    moved = 0.0
    for before, (teacher, student) in zip(start.vision_encoder.parameters(), stage.pairs()):
        torch.testing.assert_close(teacher, 0.9 * before + 0.1 * student, rtol=1e-4, atol=1e-6)
        moved = max(moved, float((student - before).abs().max()))
    assert moved > 1e-3
    assert not any(p.requires_grad for p in stage.vision_encoder.parameters())
    assert stage.student.model.embeddings.mask_token.requires_grad


def test_resumed_equals_uninterrupted(small_corpus, tmp_path):
    for name, make, data in (("d", distillation, crops), ("c", contrastive, partial(pairs, num_steps=4))):
        keep = [Checkpoints(every_n_steps=2, keep_last=9), Upbringing()]
        whole = fit(make, data(small_corpus), num_steps=4, callbacks=keep, default_root_dir=tmp_path / name)
        count = Upbringing()
        again = fit(
            make,
            data(small_corpus),
            num_steps=4,
            callbacks=[Checkpoints(every_n_steps=9), count],
            default_root_dir=tmp_path / f"{name}2",
            ckpt_path=str(tmp_path / name / "checkpoints" / "step-00000002"),
        )
        same(whole, again)
        assert count.facts() == keep[1].facts() and count.num_images_seen == 16 and count.flops_seen > 0


def test_a_refused_step_moves_neither_student_nor_teacher(small_corpus):
    def broken():
        stage = distillation()
        with torch.no_grad():
            stage.student_heads["image"].prototype_embedding[0, 0] = float("nan")
        return stage

    seed_everything(1, verbose=False)
    before = broken()
    after = fit(broken, crops(small_corpus), num_steps=2)
    for p, q in zip(before.vision_encoder.parameters(), after.vision_encoder.parameters()):
        assert torch.equal(p, q)
    assert after.guard.num_refused == 2


def test_the_encoder_alone_goes_into_a_model(small_corpus, tmp_path):
    for name, make, data, encoder in (
        ("c", contrastive, pairs(small_corpus), pe()),
        ("d", distillation, crops(small_corpus), dino()),
    ):
        stage = fit(make, data, callbacks=[Checkpoints(every_n_steps=3)], default_root_dir=tmp_path / name)
        decoder = Qwen3Decoder(32, 48, 1, 2, 1, 16, 1024)
        vlm = VisionLanguageModel(encoder, ConvProjector, decoder)
        kept = {name: p.clone() for name, p in vlm.named_parameters() if not name.startswith("vision_encoder")}
        (report,) = load_parts(vlm, {"vision_encoder": str(tmp_path / name)})
        assert len(report.loaded) == len(stage.vision_encoder.state_dict())
        same(vlm.vision_encoder, stage.vision_encoder)
        assert all(torch.equal(vlm.get_parameter(name), p) for name, p in kept.items())
        with pytest.raises(ValueError, match=r"which has no decoder|missing"):
            load_parts(vlm, {"decoder": str(tmp_path / name)})
        stage = make(encoder=encoder, init_from={"vision_encoder": str(tmp_path / name)})  # and back, student and all
        fit(lambda stage=stage: stage, data, num_steps=1)


def test_bad_parts_are_refused(small_corpus):
    with pytest.raises(ValueError, match=r"is {vision_encoder: PATH} or null"):
        contrastive(init_from={"decoder": "x"})
    with pytest.raises(ValueError, match="which PELang does not have"):
        distillation(pe())
    with pytest.raises(ValueError, match=r"momentum must lie in 0..1"):
        head = partial(PrototypeHead, hidden_size=4, bottleneck_size=4, num_prototypes=4)
        SelfDistillationStage(dino(), head, torch.optim.SGD, momentum=1.0)
    with pytest.raises(ValueError, match="learns from images, but data is TrainData"):
        contrastive().connect(TrainData(str(small_corpus), SOURCES, 64, 1, 2))
    with pytest.raises(ValueError, match="the tokenizer has 1024 tokens, text_tower only 40"):
        pool = partial(AttentionPool, num_heads=2)
        ContrastiveStage(pe(), pool, TextTower(16, 1, 2, 40, 64, 8), Processor(), None, SoftmaxContrast())
