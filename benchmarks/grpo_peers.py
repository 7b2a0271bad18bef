"""Our stage and TRL's trainer around one Qwen3, each with an iteration of GRPO to run; see bench_grpo.py."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from grpo_task import ADAMW, BY_PROMPT, NO_CLIPPING, SIZES, WHOLE, Case, Clock, Tokens, gradients, share_of_even
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from step3vl.data import PromptData, Source
from step3vl.data.malloc import keep_freed_memory
from step3vl.data.shards import write_shards
from step3vl.losses.policy import GRPO
from step3vl.models import ConvProjector, Qwen3Decoder, VisionLanguageModel
from step3vl.models.vision import PELang
from step3vl.rewards import Answered, Rubric, Weighted
from step3vl.rl import GroupRelative
from step3vl.stages import RLStage
from step3vl.types import Message, Sample, Sampling

os.environ["HF_HUB_OFFLINE"] = "1"

PACK_TOKENS = 2048
"""Of a row of ours."""


class Even:
    name, bounds = "even", (0.0, 1.0)

    def __call__(self, rollouts: Sequence[Answered]) -> list[float | None]:
        return [share_of_even(rollout.completion.token_ids) for rollout in rollouts]


class Ours:
    """Our stage under Lightning; `run` is one iteration."""

    def __init__(self, case: Case, texts: Sequence[str], decoder: nn.Module, folder: Path):
        self.case, self.folder, self.clock = case, folder, Clock()
        vlm = VisionLanguageModel(PELang(32, 1, 2, 64, patch_size=4, grid_size=8), ConvProjector, decoder)
        tokens, clock = Tokens(), self.clock
        self.decoder, self.gradients = decoder, {}

        class Stage(RLStage):
            def sampler(self, batch_size: int = 64) -> Any:
                sampler = super().sampler(batch_size)
                sampler.generate = clock.generating(sampler.generate)
                return sampler

        self.stage = Stage(
            vlm,
            tokens,
            lambda groups: torch.optim.AdamW(groups, **ADAMW),
            rubric=Rubric({"otherwise": {"even": Weighted(reward=Even())}}, truncated="score"),
            rollout=Sampling(max_new_tokens=case.num_new, temperature=1.0),
            group_size=case.group_size,
            advantage=GroupRelative(),  # advantage/group.yaml
            objective=GRPO(),  # objective/grpo.yaml
            pack_tokens=PACK_TOKENS,
            max_grad_norm=NO_CLIPPING,
        )
        samples = [
            Sample(
                id=f"prompt-{k}",
                domain="text",
                subset="numbers",
                level=0,
                messages=[Message(role="user", content=text), Message(role="assistant", content="0")],
                answer="0",
                answer_type="exact",
            )
            for k, text in enumerate(texts)
        ]
        write_shards(samples, folder, "numbers", len(samples))
        sources = {"all": Source(shards="numbers-*.tar", weight=1.0)}
        self.data = PromptData(str(folder), sources, case.num_prompts, 1, case.num_given)
        self.data.connect(tokens)
        self.data.mixture = self.data.make_mixture()

    def run(self) -> dict[str, float]:
        clock, owner = self.clock, self

        class Watch(Callback):
            def on_train_epoch_start(self, *args: Any) -> None:
                clock.start()

            def on_before_optimizer_step(self, *args: Any) -> None:
                start_s = time.process_time()
                owner.gradients = gradients(owner.decoder)
                clock.start_s += time.process_time() - start_s  # the copy is the benchmark's

            def on_train_epoch_end(self, *args: Any) -> None:
                clock.stop()

        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(self.folder),
            callbacks=[Watch()],
        )
        trainer.fit(self.stage, self.data)
        assert trainer.global_step == 1
        num_tokens = sum(len(rollout.ids) for group in self.stage.groups for rollout in group)
        assert num_tokens == self.case.num_prompts * self.case.group_size * self.case.num_new
        return clock.parts()


class Theirs:
    """TRL's trainer; `run` is one iteration, of all responses in one batch or of a batch for each prompt."""

    def __init__(self, case: Case, texts: Sequence[str], model: nn.Module, folder: Path, num_batches: int):
        import datasets
        from transformers import PreTrainedTokenizerFast
        from trl import GRPOConfig

        self.case, self.model, self.clock = case, model, Clock()
        self.data = datasets.Dataset.from_dict({"prompt": list(texts)})
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokens().tokenizer, eos_token="<end>", pad_token="<end>", padding_side="left"
        )
        self.config = GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=case.num_prompts * case.group_size // num_batches,
            gradient_accumulation_steps=num_batches,
            num_generations=case.group_size,
            max_completion_length=case.num_new,
            temperature=1.0,
            loss_type="grpo",
            beta=0.0,
            num_iterations=1,
            scale_rewards="group",
            shuffle_dataset=False,
            num_train_epochs=1,
            learning_rate=ADAMW["lr"],
            adam_beta1=ADAMW["betas"][0],
            adam_beta2=ADAMW["betas"][1],
            weight_decay=0.0,
            lr_scheduler_type="constant",
            max_grad_norm=NO_CLIPPING,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            use_vllm=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
        )
        self.answers: dict[str, list[list[int]]] = {}
        self.rewards: dict[str, list[float]] = {}
        self.gradients: dict[str, Tensor] = {}

    def run(self) -> dict[str, float]:
        from transformers import TrainerCallback
        from trl import GRPOTrainer

        clock, owner = self.clock, self

        class Watch(TrainerCallback):
            def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.start()

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                start_s = time.process_time()
                owner.gradients = gradients(owner.model)
                clock.start_s += time.process_time() - start_s

            def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
                clock.stop()

        def even(prompts: list[str], completion_ids: list[list[int]], **rest: Any) -> list[float]:
            found = [share_of_even(ids) for ids in completion_ids]
            owner.answers, owner.rewards = {}, {}
            for prompt, ids, value in zip(prompts, completion_ids, found):
                owner.answers.setdefault(prompt, []).append(ids)
                owner.rewards.setdefault(prompt, []).append(value)
            return found

        self.model.__dict__.pop("forward", None)  # a trainer wraps it
        trainer = GRPOTrainer(self.model, even, self.config, self.data, None, self.tokenizer, callbacks=[Watch()])
        trainer._generate = clock.generating(trainer._generate)
        trainer.train()
        assert trainer.state.global_step == 1
        lengths = {len(ids) for group in self.answers.values() for ids in group}
        assert len(self.answers) == self.case.num_prompts and lengths == {self.case.num_new}
        return clock.parts()


def peers(case: Case, folder: Path) -> tuple[Ours, dict[str, Theirs]]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(1)
    keep_freed_memory()  # for all variants
    torch.manual_seed(0)
    decoder = Qwen3Decoder(**SIZES, init_std=0.1)
    config = Qwen3Config(
        vocab_size=SIZES["vocab_size"],
        hidden_size=SIZES["hidden_size"],
        intermediate_size=SIZES["intermediate_size"],
        num_hidden_layers=SIZES["num_layers"],
        num_attention_heads=SIZES["num_heads"],
        num_key_value_heads=SIZES["num_kv_heads"],
        head_dim=SIZES["head_dim"],
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    missing, unexpected = model.load_state_dict(decoder.state_dict(), strict=False)
    assert not missing and not unexpected
    rows = torch.randint(0, SIZES["vocab_size"], (case.num_prompts, case.num_given)).tolist()
    texts = [" ".join(map(str, row)) for row in rows]
    theirs = {
        name: Theirs(case, texts, model, folder / "trl", num)
        for name, num in ((WHOLE, 1), (BY_PROMPT, case.num_prompts))
    }
    return Ours(case, texts, decoder, folder / "ours"), theirs
