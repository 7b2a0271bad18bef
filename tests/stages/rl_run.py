"""A small policy, a scripted generator and runs of a few iterations, for tests of reinforcement learning."""

import random
from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer, seed_everything

from step3vl.data import Processor, PromptData, Source
from step3vl.losses.policy import PPOClip
from step3vl.losses.value import ClippedValue
from step3vl.models import ConvProjector, Qwen3Decoder, ValueModel, VisionLanguageModel
from step3vl.models.vision import PELang
from step3vl.rewards import EditSimilarity, Exact, Rubric, Weighted
from step3vl.rl import GAE
from step3vl.stages import Critic, RLStage
from step3vl.types import Completion, MultiCrop, Prompt, Sampling

SOURCES = {
    "digits": Source(shards="train/documents-digits-*.tar", weight=2.0),
    "sums": Source(shards="train/text-sums-*.tar", weight=1.0),
}
SIZES = dict(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)


def tiny_vlm(init_std: float = 0.1) -> VisionLanguageModel:
    layout = MultiCrop(global_size=64, crop_size=48, max_side=256, min_side=8)
    encoder = PELang(hidden_size=16, num_layers=1, num_heads=2, mlp_size=32, patch_size=8, grid_size=8, layout=layout)
    return VisionLanguageModel(encoder, ConvProjector, Qwen3Decoder(**SIZES, vocab_size=1024, init_std=init_std))


class Scripted:
    """Says what a seeded list of texts says, the same for a prompt whoever asks and on whichever rank."""

    def __init__(self, processor: Processor, texts: Sequence[str] = ("1", "12", "471", "yes", "60")):
        self.processor, self.texts, self.num_asked = processor, texts, 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        self.num_asked += len(prompts)
        return [[self.say(prompt, k, sampling) for k in range(n)] for prompt in prompts]

    def say(self, prompt: Prompt, k: int, sampling: Sampling) -> Completion:
        text = random.Random(f"{prompt.messages[-1].content}/{k}").choice(self.texts)
        ids = [*self.processor.tokenizer.text(text), self.processor.turn_end_id]
        rest = ids[len(prompt.begun_ids) :]
        told = rest[: sampling.max_new_tokens]
        is_cut = len(told) < len(rest)
        return Completion(
            text=text, token_ids=told, truncated=is_cut, num_tokens=len(told), logprobs=[-1.0] * len(told)
        )


def rubric(truncated="zero") -> Rubric:
    def lines():
        return {
            "exact": Weighted(reward=Exact(), weight=0.5),
            "similarity": Weighted(reward=EditSimilarity(), weight=0.5),
        }

    return Rubric({"otherwise": lines()}, truncated=truncated)


def sgd(lr: float):
    return lambda groups: torch.optim.SGD(groups, lr=lr)


def critic(lr: float = 0.05, **changes) -> Critic:
    return Critic(model=ValueModel(tiny_vlm()), optimizer=sgd(lr), loss=ClippedValue(), **changes)


def build(scripted: bool = True, **changes) -> RLStage:
    """SGD without clipping, because others would hide a constant factor."""
    seed_everything(1, verbose=False)
    processor = Processor(template="chat")
    settings = dict(
        vlm=tiny_vlm(),
        processor=processor,
        optimizer=sgd(0.5),
        rubric=rubric(),
        rollout=Sampling(max_new_tokens=6, temperature=1.0),
        group_size=4,
        advantage=GAE(),
        objective=PPOClip(),
        pack_tokens=512,
        max_grad_norm=1e9,
    )
    if "critic" not in changes:
        changes["critic"] = critic(max_grad_norm=1e9)
    if scripted:
        settings["generator"] = Scripted(processor)
    stage = RLStage(**{**settings, **changes})
    processor.bind(stage.vlm.image_spec, stage.vlm.projector.grid)
    stage.vlm.bind(processor.image_token_id)
    return stage


def fit(stage: RLStage, corpus, num_steps: int = 2, prompts: int = 6, sources=None, **trainer_args) -> RLStage:
    data = PromptData(str(corpus), sources or SOURCES, prompts, 100, 256)
    data.connect(stage.processor)
    ckpt = trainer_args.pop("ckpt_path", None)
    quiet = dict(
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, devices=1
    )
    trainer = Trainer(
        **{**quiet, **trainer_args},
        accelerator="cpu",
        max_steps=num_steps,
        max_epochs=-1,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, data, ckpt_path=ckpt)
    return stage


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)
