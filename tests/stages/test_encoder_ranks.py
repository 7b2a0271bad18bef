"""Encoders on two ranks (DDP over gloo) take the steps of one rank with all images."""

from ..parallel.ranks import launch

SCRIPT = """
import sys, torch
from functools import partial
from lightning.pytorch.strategies import DDPStrategy
from step3vl.losses.contrastive import SigmoidContrast, SoftmaxContrast
from tests.stages.test_encoder_stages import contrastive, crops, distillation, fit, pairs

corpus = sys.argv[1]
sgd = lambda groups: torch.optim.SGD(groups, lr=0.1)
CASES = (
    ("softmax", partial(contrastive, SoftmaxContrast), pairs),
    ("sigmoid", partial(contrastive, SigmoidContrast), pairs),
    ("distillation", partial(distillation, optimizer=sgd), crops),
)
alone = [fit(make, data(corpus, samples=4, num_steps=2), num_steps=2) for _, make, data in CASES]  # before ranks meet
for (name, make, data), one in zip(CASES, alone):
    strategy = DDPStrategy(process_group_backend="gloo")
    two = fit(make, data(corpus, samples=2, num_steps=2), num_steps=2, devices=2, strategy=strategy)
    for (key, p), q in zip(two.state_dict().items(), one.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4, msg=lambda m: f"{name} {key}: {m}")
"""


def test_two_ranks_take_the_steps_of_one(small_corpus, tmp_path):
    launch(SCRIPT, tmp_path, 2, str(small_corpus))
