"""A student that sees parts predicts what its teacher, its own moving average, says of wholes: how DINOv3 begins.

Three terms (DINOv2, DINOv3): crops of an image agree (DINO), masked patches are guessed (iBOT), images keep apart
(KoLeo). Each is a sum over images with a mean inside of an image, so that all have one weight: the number of images.

Shapes: n images, G global and L local crops of each, K prototypes, D width, m masked patches of all global crops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from step3vl.types import WeightedSum

from .gather import gather_rows, num_ranks, sum_over_ranks


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """Teacher's logits [n,K] -> probabilities [n,K] in which every prototype has, over all ranks, an equal share.

    Rows sum to 1. So no prototype takes all images, which is how self-distillation fails.
    """
    scaled = logits.float() / temperature
    largest = scaled.max() if scaled.numel() else scaled.new_tensor(-torch.inf)
    if num_ranks() > 1:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    shares = (scaled - largest).exp()  # [n,K]
    num_rows = sum_over_ranks(shares.new_tensor(float(len(shares))))
    shares = shares / sum_over_ranks(shares.sum())
    for _ in range(num_iterations):
        shares = shares / (sum_over_ranks(shares.sum(0)) * shares.shape[1]).clamp_min(1e-30)
        shares = shares / (shares.sum(1, keepdim=True) * num_rows).clamp_min(1e-30)
    return shares * num_rows


def cross_view(student: Tensor, teacher: Tensor, temperature: float, num_same: int = 0) -> WeightedSum:
    """DINO: cross-entropy between the teacher's view of each global crop and the student's of every other crop.

    Args:
        student: [S,n,K] logits; the first `num_same` crops are the teacher's, in its order.
        teacher: [G,n,K] probabilities.
        temperature: the student's.
        num_same: a crop is not compared with itself.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    losses = -torch.einsum("gnk,snk->gsn", teacher.float(), log_student)  # [G,S,n]
    pairs = torch.ones(losses.shape[:2], device=losses.device)  # [G,S]
    pairs[torch.arange(num_same), torch.arange(num_same)] = 0.0
    return WeightedSum((losses * pairs[..., None]).sum() / pairs.sum(), losses.new_tensor(float(student.shape[1])))


def masked_patches(student: Tensor, teacher: Tensor, masked: Tensor, temperature: float) -> WeightedSum:
    """iBOT: cross-entropy at masked patches, the mean over a crop's, then the mean over an image's global crops.

    Args:
        student: [m,K] logits of the student at masked patches, in reading order.
        teacher: [m,K] probabilities of the teacher, which saw these patches.
        masked: [G,n,P] bool, True at masked patches; a crop may have none and then adds nothing.
        temperature: the student's.
    """
    losses = -(teacher.float() * F.log_softmax(student.float() / temperature, dim=-1)).sum(-1)  # [m]
    per_crop = masked.sum(-1, keepdim=True).clamp_min(1)  # [G,n,1]
    weights = (1.0 / per_crop).expand(masked.shape)[masked]  # [m]
    num_crops, num_images = masked.shape[:2]
    return WeightedSum((losses * weights).sum() / num_crops, losses.new_tensor(float(num_images)))


def keep_apart(features: Tensor, eps: float = 1e-8) -> WeightedSum:
    """KoLeo: minus the logarithm of the distance of unit features [n,D] to their nearest neighbour among all ranks'."""
    own = F.normalize(features.float(), dim=-1, eps=eps)  # [n,D]
    everyone, first = gather_rows(own)
    if len(everyone) < 2:
        return WeightedSum(own.sum() * 0.0, own.new_tensor(float(len(own))))
    with torch.no_grad():
        likeness = own @ everyone.T  # [n,N]
        likeness[torch.arange(len(own)), torch.arange(first, first + len(own))] = -torch.inf
        nearest = likeness.argmax(dim=1)
    distances = (own - everyone[nearest] + eps).norm(dim=-1)  # [n]; eps: of equal ones the gradient exists
    return WeightedSum(-(distances + eps).log().sum(), own.new_tensor(float(len(own))))


class SelfDistillation:
    """The three terms with their temperatures and weights; DINOv3's values by default.

    Args:
        student_temperature: the student's logits are divided by it.
        teacher_temperature: the teacher's, after the warm-up.
        warmup_teacher_temperature: the teacher's at the first step.
        warmup_steps: optimizer steps over which it rises.
        ibot_weight: factor of the masked patches' term.
        koleo_weight: factor of the term that keeps images apart.
        num_sinkhorn: iterations of the centring.
    """

    def __init__(
        self,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        warmup_steps: int = 0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        num_sinkhorn: int = 3,
    ) -> None:
        given = (student_temperature, teacher_temperature, warmup_teacher_temperature)
        if min(given) <= 0:
            raise ValueError(f"temperatures of student and teacher must be above 0, got {given}")
        if min(ibot_weight, koleo_weight) < 0 or num_sinkhorn < 1:
            raise ValueError(
                f"ibot_weight and koleo_weight must be at least 0 and num_sinkhorn at least 1, got {ibot_weight}, "
                f"{koleo_weight} and {num_sinkhorn}"
            )
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.warmup_teacher_temperature, self.warmup_steps = warmup_teacher_temperature, warmup_steps
        self.ibot_weight, self.koleo_weight, self.num_sinkhorn = ibot_weight, koleo_weight, num_sinkhorn

    def temperature(self, step: int) -> float:
        """The teacher's temperature at an optimizer step."""
        done = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return self.warmup_teacher_temperature + done * (self.teacher_temperature - self.warmup_teacher_temperature)

    def centred(self, logits: Tensor, step: int) -> Tensor:
        """The teacher's logits [...,K] as centred probabilities [...,K]; all leading axes are rows."""
        rows = sinkhorn_knopp(logits.flatten(0, -2), self.temperature(step), self.num_sinkhorn)
        return rows.view(logits.shape)
