"""The update of an iteration: values and log-probabilities, advantages, then steps of the critic and of the policy.

What is averaged over is counted over all mini-batches and ranks before the first backward, so that neither packing nor
the number of ranks changes a step (STEP3-VL: PPO with a critic, one policy step an iteration).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from step3vl.data.shuffle import mix
from step3vl.losses.logprob import token_logprobs
from step3vl.losses.policy import PolicyObjective
from step3vl.losses.policy_aggregate import Totals
from step3vl.losses.policy_statistics import policy_statistics
from step3vl.losses.policy_tokens import PolicyTokens
from step3vl.losses.value import explained_variance, value_sums
from step3vl.models import ValueModel, VisionLanguageModel
from step3vl.rl.estimators import Estimator, Scored
from step3vl.rl.rollout import Pack, Rollout, packs
from step3vl.types import IGNORE_INDEX

from .base import Stage
from .critic import Critic
from .guard import Guard
from .tally import Tally, gather


class PolicyUpdate(Stage):
    """A stage that learns from scored rollouts. `RLStage` collects them and gives the parts that are named here."""

    advantage: Estimator
    objective: PolicyObjective
    critic: ValueModel | None
    critic_training: Critic | None
    critic_guard: Guard
    reference: VisionLanguageModel | None
    temperature: float
    """At which rollouts were drawn."""
    pack_tokens: int
    num_minibatches: int
    num_epochs: int
    max_grad_norm: float
    share_prompts: bool
    seed: int
    iteration: int
    tally: Tally

    def learn(self, rollouts: list[Rollout]) -> None:
        """Values and log-probabilities of the models as they are, advantages, then steps of critic and policy."""
        is_on_policy = self.num_minibatches == 1 and self.num_epochs == 1
        training = self.critic_training
        parts = self.parts(rollouts, self.num_minibatches)
        everything = [pack for part in parts for pack in part]
        if self.critic is not None:
            self.fill("values", everything, lambda pack: self.critic_values(pack))
        if not is_on_policy:
            self.fill("old_logp", everything, lambda pack: self.logprobs(self.vlm, pack)[0])
        if self.reference is not None:
            self.fill("ref_logp", everything, lambda pack: self.logprobs(self.reference, pack)[0])
        self.estimate(rollouts)
        if training is not None:
            self.train_critic(self.parts(rollouts, training.num_minibatches), training)
        if training is None or self.iteration >= training.warmup_iterations:
            for _ in range(self.num_epochs):
                for part in parts:
                    self.train_policy(part)

    def parts(self, rollouts: Sequence[Rollout], num_parts: int) -> list[list[Pack]]:
        """Mini-batches of whole groups, in an order of this iteration, as packs; ranks have equally many of each."""
        groups: dict[int, list[Rollout]] = {}
        for rollout in rollouts:
            groups.setdefault(rollout.group, []).append(rollout)
        numbers = sorted(groups)
        if num_parts > 1:
            random.Random(mix(self.seed, self.iteration, num_parts)).shuffle(numbers)
        dealt = [[r for k in numbers[i::num_parts] for r in groups[k]] for i in range(num_parts)]
        pad_id = self.processor.pad_id
        made = [packs(part, self.pack_tokens, pad_id, share=self.share_prompts) for part in dealt]
        most = [max(counts) for counts in zip(*gather([len(part) for part in made]))]
        return [
            part if len(part) == num else [*part, *packs([], self.pack_tokens, pad_id, num - len(part))]
            for part, num in zip(made, most)
        ]

    def fill(self, name: str, parts: Sequence[Pack], compute: Callable[[Pack], Tensor]) -> None:
        """Compute a field of all rollouts, without gradients."""
        with torch.no_grad():
            for pack in parts:
                pack.scatter(name, compute(pack.to(self.device)))
        torch.clear_autocast_cache()

    def estimate(self, rollouts: Sequence[Rollout]) -> None:
        """Advantages, and returns for the critic, of all rollouts."""
        lengths = torch.tensor([len(rollout.ids) for rollout in rollouts], dtype=torch.long)
        numbers = {group: k for k, group in enumerate(dict.fromkeys(rollout.group for rollout in rollouts))}
        scored = Scored(
            rewards=torch.tensor([[cast(float, rollout.score.total)] for rollout in rollouts]).reshape(-1, 1),
            group=torch.tensor([numbers[rollout.group] for rollout in rollouts], dtype=torch.long),
            num_groups=len(numbers),
            sequence=torch.arange(len(rollouts)).repeat_interleave(lengths),
            values=Pack(cast(Any, None), list(rollouts)).gather("values") if self.critic is not None else None,
        )
        found = self.advantage(scored, self.add_up)
        everything = Pack(cast(Any, None), list(rollouts))
        everything.scatter("advantages", found.advantages)
        if found.returns is not None:
            everything.scatter("returns", found.returns)
            if scored.values is not None:
                sums = self.add_up(value_sums(scored.values, found.returns))
                self.tally.mean("explained_variance", explained_variance(sums))

    # -------------------------------------------------------------------------------------------- steps

    def train_policy(self, part: Sequence[Pack]) -> None:
        """One optimizer step of the policy on one mini-batch."""
        totals, num_views = self.totals(part)
        if not totals.num_tokens:
            return
        optimizer, loss = self.both_optimizers()[0], torch.zeros((), device=self.device)
        for pack in part:
            pack = pack.to(self.device)
            logp, entropy = self.logprobs(self.vlm, pack)
            sequence = pack.sequence.to(self.device)
            told = pack.gather("engine_logp")
            has_old = bool(pack.rollouts) and pack.rollouts[0].old_logp is not None
            tokens = PolicyTokens(
                logp=logp,
                advantages=pack.gather("advantages").to(self.device),
                sequence=sequence,
                num_sequences=len(pack.rollouts),
                old_logp=pack.gather("old_logp").to(self.device) if has_old else None,
                engine_logp=None if told.isnan().all() and self.objective.correction is None else told.to(self.device),
                ref_logp=pack.gather("ref_logp").to(self.device) if self.reference is not None else None,
            )
            value = self.objective(tokens, totals).value
            self.manual_backward(value * self.trainer.world_size)
            loss = loss + value.detach()
            self.tally.mean("entropy", entropy.sum(), len(entropy))
            if pack.rollouts:
                found = policy_statistics(tokens, self.objective)
                self.tally.means_of(found.means)
                for name, largest in found.maxima.items():
                    self.tally.maximum(name, largest)
        self.step_ids = [rollout.case.id for pack in part for rollout in pack.rollouts]
        self.take_step(optimizer, self.vlm, self.guard, loss, num_views, self.max_grad_norm, "")

    def train_critic(self, parts: Sequence[Sequence[Pack]], training: Critic) -> None:
        """One optimizer step of the critic on each mini-batch."""
        assert self.critic is not None
        optimizer = self.both_optimizers()[1]
        for part in parts:
            totals, num_views = self.totals(part)
            if not totals.num_tokens:
                continue
            loss = torch.zeros((), device=self.device)
            for pack in part:
                pack = pack.to(self.device)
                values = self.critic_values(pack)
                old, returns = pack.gather("values").to(self.device), pack.gather("returns").to(self.device)
                value = training.loss(values, old, returns, totals).value + 0.0 * values.sum()
                self.manual_backward(value * self.trainer.world_size)
                loss = loss + value.detach()
            self.take_step(
                optimizer, self.critic.vlm, self.critic_guard, loss, num_views, training.max_grad_norm, "critic_"
            )

    def take_step(
        self,
        optimizer: Any,
        vlm: VisionLanguageModel,
        guard: Guard,
        loss: Tensor,
        num_views: int,
        max_norm: float,
        prefix: str,
    ) -> None:
        """Clip, ask the guard, step, and move the schedule."""
        raw = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if vlm.num_encoder_passes is not None and num_views == 0:  # blank views alone: as if it had not been run
            for parameter in vlm.image_parameters():
                parameter.grad = None
        norm = float(self.gradient_norms(raw)["grad_norm"])
        total = float(self.add_up(loss.double()))
        reason = guard.judge(total, norm)
        grads = [p.grad for group in raw.param_groups for p in group["params"] if p.grad is not None]
        if reason is not None:
            if self.trainer.is_global_zero:
                who = "critic" if prefix else "policy"
                print(f"iteration {self.iteration}, step of the {who} refused: {reason}; weights stay as they were")
            for group in raw.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            guard.check()
        elif norm > max_norm:
            torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        torch.clear_autocast_cache()  # it holds weights from before the step
        for schedule in self.trainer.lr_scheduler_configs:
            if schedule.scheduler.optimizer is raw:
                schedule.scheduler.step()  # type: ignore[call-arg]
        self.tally.mean(f"{prefix}grad_norm", norm)
        self.tally.mean("value_loss" if prefix else "loss", total)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Nothing: the loss is divided by the whole step's weight already."""

    def both_optimizers(self) -> list[Any]:
        """The policy's, whose steps count as steps of the run, and the critic's, whose do not."""
        own = self.optimizers()
        raw = self.optimizers(use_pl_optimizer=False)
        return [own] if not isinstance(own, list) else [own[0], cast(list, raw)[1]]

    # -------------------------------------------------------------------------------------------- forwards

    def logprobs(self, vlm: VisionLanguageModel | None, pack: Pack) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [N] of the response tokens of a pack."""
        assert vlm is not None
        batch = pack.batch
        keep = (batch.labels != IGNORE_INDEX).flatten().nonzero().squeeze(-1)  # [N]
        rows = vlm(batch).flatten(0, 1).index_select(0, keep)  # [N,D]
        labels = batch.labels.flatten()[keep]
        return token_logprobs(rows, vlm.decoder.lm_head, labels, self.temperature, vlm.image_token_id)

    def critic_values(self, pack: Pack) -> Tensor:
        """Values [N] of the states before each response token of a pack."""
        assert self.critic is not None
        return self.critic(pack.batch)[pack.batch.labels != IGNORE_INDEX]

    # -------------------------------------------------------------------------------------------- ranks

    def add_up(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            x = x.to(self.device)
            torch.distributed.all_reduce(x)
        return x.cpu()

    def totals(self, part: Sequence[Pack]) -> tuple[Totals, int]:
        """What a step averages over, and its number of views, over all ranks."""
        rollouts = [rollout for pack in part for rollout in pack.rollouts]
        num_views = sum(len(pack.batch.images) for pack in part if pack.batch.images is not None)
        num_tokens = sum(len(rollout.ids) for rollout in rollouts)
        sums = self.add_up(torch.tensor([num_tokens, len(rollouts), num_views], dtype=torch.float64)).tolist()
        return Totals(sums[0], sums[1]), int(sums[2])
