"""Ways of computing one and the same step, through the real command line: equal losses, gradients and weights.

SGD without clipping, because Adam and clipping would hide a constant factor; the learning rate is high, so that weights
move far more than the tolerance.
"""

from pathlib import Path

import pytest
import torch

from step3vl.ablation.plot import read_curve
from step3vl.cli import main

from .saved import weights

SAVE = "[{class_path: step3vl.callbacks.Checkpoints, init_args: {every_n_steps: 3}}]"
RUN = [
    *("fit", "-c", "experiments/step3vl_10b/1_pretrain_phase1.yaml", "--scale", "tiny"),
    *("--trainer.max_steps=3", "--trainer.precision=32-true", "--trainer.log_every_n_steps=1"),
    *("--trainer.gradient_clip_val=null", "--model.schedule=null", "--data.samples_per_step=8"),
    "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.1}}",
    *("--model.vlm.decoder.zero_init_outputs=false", "--data.val_sources=null", f"--trainer.callbacks={SAVE}"),
]


def trained(name: str, *more: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, and the weights after them."""
    assert main([*RUN, f"--trainer.default_root_dir={name}", *more]) == 0
    return list(read_curve(Path(name))[1]), weights(name)


CHANGES = {
    "separate rows": ["--data.seq_len=200"],
    "accumulated": ["--data.samples_per_step=2", "--trainer.accumulate_grad_batches=4", "--data.num_steps=12"],
    "chunked": ["--model.loss.chunk_size=7"],
    "masked rows": ["--model.loss.class_path=tests.plain_loss.AllRows"],
    "workers": ["--data.num_workers=2"],
    "dense mask": ["--model.vlm.decoder.attention=sdpa"],
}


@pytest.mark.parametrize("weight, changes", [("token", list(CHANGES)), ("sqrt", ["separate rows", "accumulated"])])
def test_one_step_many_ways(workplace, weight, changes):
    plain, ours = trained("plain", f"--data.loss_weight={weight}")
    assert plain[-1] < plain[0] - 0.05 and len(plain) == 3
    for change in changes:
        other, theirs = trained(change, f"--data.loss_weight={weight}", *CHANGES[change])
        assert other == pytest.approx(plain, abs=1e-5), change
        for name, value in ours.items():
            where = f"{change}: {name}: "
            torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, where=where: where + m)


def test_the_comparison_can_fail(workplace):
    plain, ours = trained("plain")
    other, theirs = trained("other", "--data.loss_weight=sample")
    assert other != pytest.approx(plain, abs=1e-3)
    assert any((theirs[name] - value).abs().max() > 1e-3 for name, value in ours.items())
