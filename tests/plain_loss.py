"""The textbook loss, as a part to swap in: every row through the output layer, all logits at once, masked after."""

import torch.nn.functional as F

from step3vl.losses import CrossEntropy
from step3vl.types import IGNORE_INDEX, WeightedSum


class AllRows(CrossEntropy):
    """Drops nothing and chunks nothing."""

    def __call__(self, hidden, lm_head, batch):
        logits = lm_head(hidden).float().flatten(0, 1)  # [B*T,V]
        labels, weights = batch.labels.flatten(), batch.loss_weights.flatten()
        nll = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        return WeightedSum((nll * weights).sum(), weights[labels != IGNORE_INDEX].sum())
