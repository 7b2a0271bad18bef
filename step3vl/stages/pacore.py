"""Learning to synthesise: reinforcement learning on prompts that show messages of earlier answers (PaCoRe training).

STEP3-VL trains it for 500 iterations of 64 prompts x 16 responses (report, training recipe); the reward is that of
the problem itself, on what a response says after its thoughts (arXiv 2601.05593, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from step3vl.evaluation import Benchmark, HeldOut
from step3vl.pacore.measures import RIGHT, cross_checks
from step3vl.pacore.pool import PooledMessage
from step3vl.pacore.pool_data import Synthesis
from step3vl.rl.rollout import Rollout

from .rl import RLStage

QUARTERS = ("below_25", "below_50", "below_75", "below_100")


class PaCoReStage(RLStage):
    """RLStage on synthesis prompts (`step3vl.pacore.pool_data.PoolData`), with measures of the synthesis.

    Logged every iteration besides what RLStage logs, over all ranks. Right and wrong are judged by the benchmarks'
    scorers, as the messages in the pool were, and not by the rubric, whose rewards may be shaped.

    synthesis/score: of a response. synthesis/messages: of a message in its prompt, mean over prompts.
    synthesis/gain: the first less the second; above 0, synthesis is worth more than one more answer.
    synthesis/voted: of the commonest message; synthesis below it is worth less than counting.
    synthesis/emergent: share of right responses where every message is wrong; no vote can do that. It should rise.
    synthesis/kept: share of right responses where every message is right; below 1, synthesis spoils answers.
    synthesis/cross_checks: words a response that refer to messages ("reference", "ref 3").
    synthesis/num_messages, synthesis/num_dropped: messages in a prompt, and those that did not fit.
    prompts/none_right, below_25, below_50, below_75, below_100, all_right: share of prompts by the share of their
        messages that are right. All in the last one: nothing is left to learn; widen the band or make new pools.

    All arguments are those of RLStage.
    """

    scorer: Benchmark = HeldOut("")
    """Judges responses; of another kind, the pool's messages must have been judged by it too."""

    def watch(self, dropped: dict[str, int]) -> None:
        super().watch(dropped)
        groups = [(group, group[0].sample) for group in self.groups if group]
        judged = [r for group, _ in groups for r in group if r.score.outcome not in ("error", "unjudged")]
        scores = dict(
            zip(map(id, judged), self.scorer.scores([(r.case, r.completion.text) for r in judged]), strict=True)
        )
        for group, sample in groups:
            if not isinstance(sample, Synthesis):
                raise ValueError(f"{group[0].case.id} shows no messages: this stage needs data of the class PoolData")
            own = [scores[id(rollout)] for rollout in group if id(rollout) in scores]
            self._watch_group(group, sample, own)

    def _watch_group(self, group: Sequence[Rollout], sample: Synthesis, scores: Sequence[float]) -> None:
        tally, num = self.tally, len(scores)
        words = sum(cross_checks(rollout.completion.text) for rollout in group)
        tally.mean("synthesis/cross_checks", float(words), len(group))
        tally.mean("synthesis/num_messages", float(len(sample.shown)))
        tally.mean("synthesis/num_dropped", float(sample.num_dropped))
        tally.mean("synthesis/score", sum(scores), num)
        shown = [message.score for message in sample.shown]
        known = [score for score in shown if score is not None]
        if not known or len(known) < len(shown):
            return
        mean = sum(known) / len(known)
        tally.mean("synthesis/messages", mean)
        tally.mean("synthesis/gain", sum(scores) - mean * num, num)
        tally.mean("synthesis/voted", self.voted(group[0], sample.shown))
        num_right = sum(score >= RIGHT for score in known)
        if num_right in (0, len(known)):
            name = "synthesis/kept" if num_right else "synthesis/emergent"
            tally.mean(name, float(sum(score >= RIGHT for score in scores)), num)
        own = bucket(num_right, len(known))
        for name in ("none_right", *QUARTERS, "all_right"):
            tally.mean(f"prompts/{name}", float(name == own))

    def voted(self, rollout: Rollout, shown: Sequence[PooledMessage]) -> float:
        """Score of the commonest message; of equally common ones, the first."""
        votes = [self.scorer.vote(rollout.case, message.text) for message in shown]
        best = Counter(votes).most_common(1)[0][0]
        return shown[votes.index(best)].score or 0.0


def bucket(num_right: int, num: int) -> str:
    """Which share of prompts one counts to, by the share of its messages that are right."""
    if num_right == 0:
        return "none_right"
    return "all_right" if num_right == num else QUARTERS[4 * num_right // num]
