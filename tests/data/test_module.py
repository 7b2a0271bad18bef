"""Batches of a run: the same for any number of workers, split over ranks without overlap, exact after a restart."""

from __future__ import annotations

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from step3vl.data import Mixture, Processor, Source, TrainData
from step3vl.data.loader import PackedBatches, ResumableLoader, StepLoader
from step3vl.data.plan import SamplePlan
from step3vl.data.shards import write_shards
from step3vl.data.tar_index import index_file
from step3vl.types import Batch, ImageSpec, Message, MultiCrop, Sample

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
TINY = ImageSpec(4, *CLIP, MultiCrop(global_size=64, crop_size=48, max_side=288, min_side=8))
SEQ_LEN = 96


def picture_sample(id: str, answer: str, size: tuple[int, int] = (64, 64)) -> Sample:
    messages = [Message(role="user", content="<image>Read it."), Message(role="assistant", content=answer)]
    image = Image.new("RGB", size, (len(answer), 0, 0))
    return Sample(id=id, domain="documents", subset="digits", level=0, messages=messages, images=[image])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    write_shards((picture_sample(f"read{i}", str(i) * (1 + i % 4)) for i in range(50)), path, "read", 20)
    write_shards((picture_sample(f"big{i}", "1", (250, 250)) for i in range(3)), path, "big", 20)
    return path


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(template="plain").bind(TINY, lambda n: n // 4)


def data(root, processor, **options) -> TrainData:
    settings = {"seq_len": SEQ_LEN, "samples_per_step": 4, "num_steps": 10, "seed": 1} | options
    sources = settings.pop("sources", {"read": Source("read-*.tar", 1.0)})
    module = TrainData(str(root), sources, **settings)
    module.connect(processor)
    return module


class Recorder(LightningModule):
    """Takes steps and writes down what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.validated: list[list[str]] = []

    def training_step(self, batch: Batch, batch_idx: int):
        self.seen.append(batch.sample_ids)
        return self.weight * batch.loss_weights.sum()

    def validation_step(self, batch: Batch, batch_idx: int):
        self.validated.append(batch.sample_ids)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, module: TrainData, max_steps: int, ckpt_path=None, save_at: int | None = None, **options) -> Recorder:
    recorder = Recorder()
    callbacks = []
    if save_at:
        callbacks.append(ModelCheckpoint(folder, filename="at-{step}", every_n_train_steps=save_at, save_top_k=-1))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=bool(save_at),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(recorder, datamodule=module, ckpt_path=ckpt_path)
    return recorder


ROWS = {"samples_per_step": None, "rows_per_step": 2, "mix_by": "tokens"}


@pytest.mark.parametrize("counted", [{}, ROWS], ids=["samples", "rows"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact(root, processor, tmp_path, num_workers, counted):
    options = {"num_workers": num_workers} | counted
    straight = fit(tmp_path, data(root, processor, **options), 10)
    assert len(straight.seen) == 10
    first = fit(tmp_path, data(root, processor, **options), 4, save_at=4)
    second = fit(tmp_path, data(root, processor, **options), 10, ckpt_path=tmp_path / "at-step=4.ckpt")
    assert first.seen + second.seen == straight.seen
    assert len(second.seen) == 6


def test_epochs_go_on_in_the_mixture_and_resume_across_them(root, processor, tmp_path):
    straight = fit(tmp_path, data(root, processor, num_steps=3), 8, save_at=5)
    assert straight.seen == fit(tmp_path, data(root, processor, num_steps=8), 8).seen
    second = fit(tmp_path, data(root, processor, num_steps=3), 8, ckpt_path=tmp_path / "at-step=5.ckpt")
    assert second.seen == straight.seen[5:]


def test_each_sample_once_before_any_repeats(root, processor, tmp_path):
    seen = fit(tmp_path, data(root, processor, samples_per_step=5), 10).seen
    assert sorted(id for ids in seen for id in ids) == sorted(f"read{i}" for i in range(50))


def loader(mixture, processor, samples_per_step, num_steps, num_workers=0, kind=StepLoader, **ranks):
    plan = SamplePlan(mixture, samples_per_step, **ranks)
    return kind(PackedBatches(mixture, processor, SEQ_LEN), plan, num_steps, num_workers)


def test_ranks_split_each_step(root, processor):
    mixture = Mixture(root, {"read": Source("read-*.tar", 1.0)}, seed=1)
    one = loader(mixture, processor, 4, 30)
    ranks = [loader(mixture, processor, 2, 30, rank=rank, num_ranks=2) for rank in (0, 1)]
    for whole, *parts in zip(one, *ranks, strict=True):
        assert sorted(id for batch in parts for id in batch.sample_ids) == sorted(whole.sample_ids)


def test_resume_with_another_number_of_ranks_goes_on_in_samples(root, processor):
    mixture = Mixture(root, {"read": Source("read-*.tar", 1.0)}, seed=1)
    one = loader(mixture, processor, 4, 10, kind=ResumableLoader)
    batches = iter(one)
    seen = [id for _ in range(3) for id in next(batches).sample_ids]
    for rank in (0, 1):
        again = loader(mixture, processor, 4, 10, kind=ResumableLoader, rank=rank, num_ranks=2)
        again.load_state_dict(one.state_dict())
        seen += next(iter(again)).sample_ids
    assert len(seen) == len(set(seen)) == 20
    straight = loader(mixture, processor, 20, 1)
    assert set(seen) == set(next(iter(straight)).sample_ids)


def test_workers_give_the_same_batches(root, processor):
    mixture = Mixture(root, {"read": Source("read-*.tar", 1.0)}, seed=1)
    loaders = [loader(mixture, processor, 6, 5, num_workers=n) for n in (0, 1, 2)]
    for ours, one, two in zip(*loaders):
        for other in (one, two):
            assert other.sample_ids == ours.sample_ids
            for name in ("input_ids", "labels", "position_ids", "loss_weights"):
                assert torch.equal(getattr(other, name), getattr(ours, name))
            assert torch.equal(other.images.tensors[0], ours.images.tensors[0])


def test_samples_that_cannot_be_used_are_named_and_training_goes_on(root, processor, tmp_path):
    sources = {"read": Source("read-*.tar", 1.0), "big": Source("big-*.tar", 1.0)}
    mixture = Mixture(root, sources, seed=1)
    batch = next(iter(loader(mixture, processor, 12, 1)))
    assert batch.skipped and len(batch.skipped) + len(batch.sample_ids) == 12
    assert all(line.startswith("big/big") and "raise seq_len to >= " in line for line in batch.skipped)
    write_shards((picture_sample(f"b{i}", "7") for i in range(3)), tmp_path, "b", 3)
    shard = tmp_path / "b-000000.tar"
    stored = bytearray(shard.read_bytes())
    at = stored.index(b"\x89PNG")
    stored[at : at + 40] = bytes(40)
    shard.write_bytes(bytes(stored))
    index_file(shard).unlink()
    batch = next(iter(loader(Mixture(tmp_path, {"b": Source("b-*.tar", 1.0)}), processor, 3, 1)))
    assert sorted(batch.sample_ids) == ["b1", "b2"]
    assert len(batch.skipped) == 1 and "b0" in batch.skipped[0] and "cannot be decoded" in batch.skipped[0]


def test_validation_is_the_same_every_time(root, processor, tmp_path):
    module = data(root, processor, val_sources={"read": Source("read-*.tar", 1.0)}, val_samples=10)
    recorder = fit(tmp_path, module, 6, val_check_interval=3, num_sanity_val_steps=0)
    assert len(recorder.validated) == 6
    assert recorder.validated[:3] == recorder.validated[3:]
    assert len({id for ids in recorder.validated[:3] for id in ids}) == 10


def test_no_validation_is_fine_and_the_table_is_printed(root, processor, tmp_path, capsys):
    recorder = fit(tmp_path, data(root, processor), 2)
    assert recorder.validated == []
    assert "Mixture: 8 samples, seed 1" in capsys.readouterr().out


def test_refusals(root, processor):
    with pytest.raises(ValueError, match="samples_per_step must be at least 1, got 0"):
        data(root, processor, samples_per_step=0)
    with pytest.raises(ValueError, match="val_samples must be at least 1, got 0"):
        data(root, processor, val_sources={"read": Source("read-*.tar", 1.0)})
    module = TrainData(str(root), {"read": Source("read-*.tar", 1.0)}, SEQ_LEN, 1, samples_per_step=1)
    with pytest.raises(RuntimeError, match="setup"):
        module.train_dataloader()
    module.setup("fit")
    with pytest.raises(RuntimeError, match="connect"):
        module.train_dataloader()
    unbound = loader(Mixture(root, {"read": Source("read-*.tar", 1.0)}), Processor(), 1, 1)
    with pytest.raises(RuntimeError, match="bind"):
        next(iter(unbound))
    for given in ({"samples_per_step": None}, {"rows_per_step": 2}):
        with pytest.raises(ValueError, match=r"give data\.samples_per_step or data\.rows_per_step"):
            data(root, processor, **given)
    with pytest.raises(ValueError, match="max_views_per_row needs rows_per_step"):
        data(root, processor, max_views_per_row=2)


def test_command_line_help_and_types():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TrainData, "data")
    given = {
        "class_path": "step3vl.data.TrainData",
        "init_args": {
            "root": "corpus",
            "sources": {"digits": {"shards": "train/documents-digits-*.tar", "weight": 8}},
            "seq_len": 512,
            "samples_per_step": 4,
            "num_steps": 10,
        },
    }
    built = parser.instantiate_classes(parser.parse_object({"data": given})).data
    assert built.sources["digits"] == Source("train/documents-digits-*.tar", 8.0)
    given["init_args"]["loss_weight"] = "square"
    with pytest.raises(Exception, match="square"):
        parser.parse_object({"data": given})
