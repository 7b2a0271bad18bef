"""A small reward model, preferences that it can learn, and runs of a few steps, for tests of the stage."""

import random

import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image

from step3vl.data import Processor, Source
from step3vl.data.preference_data import PreferenceData
from step3vl.data.preferences import Preference
from step3vl.data.shards import write_shards
from step3vl.models import ValueModel
from step3vl.stages import RewardModelStage
from step3vl.types import Message

from .rl_run import sgd, tiny_vlm

WORDS = ("red", "one", "top", "yes", "cat")


def preferences(num, seed=0, with_images=True):
    """Which word stands in the question: the answer that repeats it is better than one with another word."""
    rng = random.Random(seed)
    for k in range(num):
        right, wrong = rng.sample(WORDS, 2)
        images = [Image.new("RGB", (rng.choice((40, 90)), 40), (k % 250, 9, 9))] * (with_images and k % 3 == 0)
        text = "<image>" * len(images) + f"Say {right}."
        yield Preference(
            id=f"p-{seed}-{k:05d}",
            domain="text",
            subset="words",
            level=0,
            messages=[Message(role="user", content=text), Message(role="assistant", content=right)],
            images=images,
            answer=right,
            answer_type="exact",
            rejected=wrong if k % 4 else f"{wrong} " * rng.randint(2, 6),
            margin=0.25 if k % 5 == 0 else None,
        )


def write(folder, num=64, num_val=32):
    write_shards(preferences(num), folder / "train", "pairs", 40)
    write_shards(preferences(num_val, seed=1), folder / "val", "pairs", 40)
    return folder


def build(lr=0.05, optimizer=None, **changes):
    seed_everything(1, verbose=False)
    processor = Processor(template="chat")
    settings = {
        "model": ValueModel(tiny_vlm()),
        "processor": processor,
        "optimizer": optimizer or sgd(lr),
        **changes,
    }
    stage = RewardModelStage(**settings)
    processor.bind(stage.vlm.image_spec, stage.vlm.projector.grid)
    stage.vlm.bind(processor.image_token_id)
    return stage


def data_of(folder, pairs_per_step=8, **changes):
    sources = {"pairs": Source(shards="train/*.tar", weight=1.0)}
    val = {"pairs": Source(shards="val/*.tar", weight=1.0)}
    settings = {"val_sources": val, "val_pairs": 30, "seed": 3, **changes}
    return PreferenceData(str(folder), sources, 256, pairs_per_step, 100, **settings)


def fit(stage, folder, num_steps=3, pairs_per_step=8, share=True, **trainer_args):
    torch.set_num_threads(1)
    data = data_of(folder, pairs_per_step, share_prompts=share)
    data.connect(stage.processor)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    trainer = Trainer(
        **{**quiet, "enable_checkpointing": False, **trainer_args},
        accelerator="cpu",
        max_steps=num_steps,
        max_epochs=-1,
        val_check_interval=num_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, data)
    return stage


def metrics(stage):
    return {name: float(value) for name, value in stage.trainer.callback_metrics.items()}
