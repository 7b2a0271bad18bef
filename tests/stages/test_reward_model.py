"""The reward model's stage: its loss, its packing, its ranks, its restarts; and what it learns, as a reward."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from step3vl.data.preference_batch import collate_pairs, encode_pair
from step3vl.evaluation import Case
from step3vl.losses.preference import BradleyTerry
from step3vl.models import ValueModel
from step3vl.rewards import Answered, RewardModel
from step3vl.stages import RewardModelStage
from step3vl.stages.reward_model import has_value_head
from step3vl.types import IGNORE_INDEX, Batch, Completion, Prompt

from .reward_run import build, data_of, fit, metrics, preferences, write
from .rl_run import distance, sgd, tiny_vlm, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def stage():
    return build()


def encoded(stage, num=10):
    return [encode_pair(stage.processor, pair, 256) for pair in preferences(num)]


# ------------------------------------------------------------------------------------------------ batches


def test_a_score_is_read_at_the_token_that_ends_an_answer(stage):
    pairs = encoded(stage)
    for share in (False, True):
        batch = collate_pairs(pairs, 256, share=share)
        assert (batch.input_ids.flatten()[batch.ends] == stage.processor.turn_end_id).all()
        assert (batch.labels.flatten() != IGNORE_INDEX).sum() == 2 * len(pairs) == batch.ends.numel()
        for (chosen, rejected), made in zip(batch.ends.tolist(), preferences(10)):
            for end, text in ((chosen, made.chosen), (rejected, made.rejected)):
                own = stage.processor.tokenizer.text(text)
                assert batch.input_ids.flatten()[end - len(own) : end].tolist() == own
        assert batch.margins.tolist() == [0.25 if k % 5 == 0 else 0.0 for k in range(10)]


def test_images_of_a_pair_are_held_once(stage):
    pairs = encoded(stage)
    num_views = sum(len(pair.chosen.views) for pair in pairs)
    apart, shared = (collate_pairs(pairs, 256, share=share) for share in (False, True))
    assert num_views and sum(len(tensor) for tensor in apart.images.tensors) == num_views
    assert len(apart.images) == 2 * num_views
    assert sum(len(tensor) for tensor in shared.images.tensors) == num_views
    assert shared.branches is not None and apart.branches is None
    assert sum(shared.num_tokens) < sum(apart.num_tokens)
    moved = shared.to("cpu")
    assert type(moved) is type(shared) and torch.equal(moved.ends, shared.ends)


@pytest.mark.parametrize("share, seq_len", [(False, 256), (True, 256), (True, 64), (False, 40)])
def test_packed_scores_are_those_of_each_answer_alone(stage, share, seq_len):
    pairs = encoded(stage)
    with torch.no_grad():
        together = stage.scorer(
            collate_pairs(pairs, seq_len, share=share), collate_pairs(pairs, seq_len, share=share).ends
        )
        alone = torch.cat(
            [stage.scorer(batch := collate_pairs([pair], 256, share=False), batch.ends) for pair in pairs]
        )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert alone.std() > 1e-3


def test_shared_prompts_give_the_same_gradient(stage):
    pairs, found = encoded(stage), []
    for share in (False, True):
        stage.zero_grad()
        stage.losses(collate_pairs(pairs, 256, share=share))["loss"].value.backward()
        found.append({name: p.grad.clone() for name, p in stage.vlm.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-5, rtol=1e-3)


def test_the_loss_is_the_formula(stage):
    stage.loss = BradleyTerry(center_coef=0.1)
    batch = collate_pairs(encoded(stage), 256)
    found = stage.losses(batch)["loss"]
    values = stage.scorer(batch).flatten()  # at every position, through the head as it is
    c, r = values[batch.ends[:, 0]], values[batch.ends[:, 1]]
    wanted = -F.logsigmoid(c - r - batch.margins) + 0.1 * (c + r) ** 2
    torch.testing.assert_close(found.value, wanted.sum())
    assert float(found.weight) == 10


# ------------------------------------------------------------------------------------------------ runs


def test_what_is_logged_is_of_all_pairs(folder):
    stage = fit(build(lr=1e-9), folder, 2)
    found = metrics(stage)
    loader = data_of(folder)
    loader.connect(stage.processor)
    loader.setup("validate")
    with torch.no_grad():
        scores = torch.cat([torch.stack(stage.scores(batch)) for batch in loader.val_dataloader()], 1)
        margins = torch.cat([batch.margins for batch in loader.val_dataloader()])
    chosen, rejected = scores
    assert len(chosen) == 30  # val_pairs, and no whole number of batches
    assert found["val_accuracy"] == pytest.approx(float((chosen > rejected).float().mean()), abs=1e-6)
    assert found["val_margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
    assert found["val_score"] == pytest.approx(float(scores.mean()), abs=1e-5)
    assert found["val_loss"] == pytest.approx(float(-F.logsigmoid(chosen - rejected - margins).mean()), abs=1e-5)
    assert {"loss", "accuracy", "margin", "score", "lr"} <= found.keys()


def test_shared_and_separate_prompts_train_alike(folder):
    one, two = (fit(build(), folder, 3, share=share) for share in (True, False))
    for name, tensor in weights(one.vlm).items():
        torch.testing.assert_close(tensor, weights(two.vlm)[name], atol=1e-5, rtol=1e-4)


def ranks(tmp_path, folder, kind, num_ranks):
    out = tmp_path / f"{kind}.pt"
    words = [sys.executable, "-m", "tests.stages.reward_ranks", str(folder), kind, str(num_ranks), str(out)]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_ranks_train_as_one(tmp_path, folder, kind):
    two = ranks(tmp_path, folder, kind, 2)
    stage = fit(build(), folder, 2)
    for name, tensor in weights(stage.vlm).items():
        torch.testing.assert_close(two["weights"][name], tensor, atol=1e-5, rtol=1e-4)
    for name, value in metrics(stage).items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"pairs_per_step": 0}, r"data.pairs_per_step must be at least 1, got 0"),
        ({"val_pairs": 0}, r"data.val_pairs must be at least 1, got 0"),
        ({"max_skipped_share": 2}, r"data.max_skipped_share must lie in 0..1, got 2"),
    ],
)
def test_wrong_data_settings_are_refused(folder, changes, said):
    with pytest.raises(ValueError, match=said):
        data_of(folder, **changes)


def test_what_is_no_pair_is_named_or_refused(folder, small_corpus, stage):
    from step3vl.data import Source

    data = data_of(folder, pairs_per_step=4)
    data.root, data.sources = str(small_corpus), {"sums": Source(shards="train/text-sums-*.tar", weight=1.0)}
    data.connect(stage.processor)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert len(batch.skipped) == 4 and all("is no preference" in reason for reason in batch.skipped)
    assert batch.ends.shape == (0, 2)
    loss = stage.losses(batch)["loss"]
    loss.value.backward()  # a rank that met bad pairs alone takes its step all the same
    assert float(loss.value) == 0.0 == float(loss.weight)
    long = next(iter(preferences(1)))
    long.rejected = "no " * 400
    with pytest.raises(ValueError, match=r"conversation with an answer has \d+ tokens and at most 256 fit a row"):
        encode_pair(stage.processor, long, 256)
    plain = Batch(
        input_ids=batch.input_ids,
        labels=batch.labels,
        loss_weights=batch.loss_weights,
        position_ids=batch.position_ids,
    )
    with pytest.raises(ValueError, match=r"learns from pairs of answers; data must be of the class .*PreferenceData"):
        stage.losses(plain)
    with pytest.raises(ValueError, match="a reward model answers nothing"):
        stage.test_step([], 0)
    from step3vl.data import Processor

    with pytest.raises(ValueError, match="template is 'plain'"):
        RewardModelStage(ValueModel(tiny_vlm()), Processor(template="plain"), sgd(0.1)).setup("fit")


# ------------------------------------------------------------------------------------------------ as a reward


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A reward model that has learnt the rule, and a folder with its weights."""
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("trained")
    write(place, num=800)
    stage = build(optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3))
    fit(stage, place, 120, pairs_per_step=16)
    save_file(
        {name: tensor.contiguous() for name, tensor in stage.vlm.state_dict().items()}, place / "model.safetensors"
    )
    return stage, place


def answered(pair, text, **more):
    case = Case.from_sample(pair)
    completion = Completion(**{"text": text, "token_ids": [], "truncated": False, **more})
    return Answered(prompt=Prompt(messages=pair.conversation, images=pair.images), completion=completion, case=case)


def both(num=120, seed=2):
    return [answered(pair, text) for pair in preferences(num, seed) for text in (pair.chosen, pair.rejected)]


def reward(place, **changes):
    from step3vl.data import Processor

    torch.manual_seed(7)
    model = ValueModel(tiny_vlm())
    return RewardModel(model, Processor(template="chat"), str(place), **{"max_tokens": 256, "device": "cpu", **changes})


def test_it_prefers_the_right_answers_of_pairs_it_never_saw(trained):
    _, place = trained
    values = torch.tensor(reward(place)(both())).view(-1, 2)
    right = (values[:, 0] > values[:, 1]).double()
    share, error = float(right.mean()), float(right.std() / len(right) ** 0.5)
    assert share - 1.96 * error > 0.5, f"{share:.3f} +- {error:.3f}"
    assert torch.allclose(values.sum(1), torch.ones(len(values)))  # probabilities of a group of two
    narrow = torch.tensor(reward(place, max_tokens=64).scores(both(20)))  # other rows, the same scores
    torch.testing.assert_close(narrow, torch.tensor(reward(place).scores(both(20))), atol=1e-4, rtol=1e-4)


def test_scales_and_what_cannot_be_judged(trained):
    stage, place = trained
    pair = next(iter(preferences(1, seed=2)))
    rollouts = [
        answered(pair, pair.chosen),
        answered(pair, " "),
        answered(pair, "no " * 400),
        answered(pair, pair.rejected),
        answered(pair, "", error="the server is gone"),
        answered(next(iter(preferences(1, seed=5))), "alone"),
    ]
    exact = reward(place, scale="score", most=1e6)(rollouts)
    assert [value is None for value in exact] == [False, True, True, False, True, False]
    batch = collate_pairs([encode_pair(stage.processor, pair, 256)], 256)
    stage.cpu()
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor([exact[0], exact[3]]), torch.cat(stage.scores(batch)))
    counted = reward(place, scale="sigmoid")
    assert counted(rollouts)[0] == pytest.approx(float(torch.tensor(exact[0]).sigmoid()), abs=1e-5)
    assert counted.counts == {"scored": 3, "empty": 1, "unreadable": 1} and counted.bounds == (0.0, 1.0)
    low = min(abs(exact[0]), abs(exact[3])) / 2
    assert all(abs(value) <= low for value in reward(place, scale="score", most=low)(rollouts) if value is not None)
    group = reward(place)(rollouts)
    assert group[5] is None  # nothing to compare it with
    assert group[0] == pytest.approx(float(torch.tensor(exact[0] - exact[3]).sigmoid()), abs=1e-5)
    half = reward(place, scale="score", most=1e6, dtype="bf16")(rollouts)
    assert half[0] == pytest.approx(exact[0], abs=0.1 * max(1.0, abs(exact[0])))


def test_it_is_built_without_memory_and_refuses_what_does_not_fit(trained, tmp_path):
    from step3vl.data import Processor

    _, place = trained
    with torch.device("meta"):
        bare = ValueModel(tiny_vlm())
    found = RewardModel(bare, Processor(template="chat"), str(place), scale="score", max_tokens=256, device="cpu")
    assert found(both(4)) == pytest.approx(reward(place, scale="score")(both(4)), abs=1e-5)
    with torch.device("meta"):
        none = RewardModel(ValueModel(tiny_vlm()), Processor(template="chat"), None, device="cpu")
    with pytest.raises(ValueError, match="init_from is null, and the model has no weights"):
        none(both(1))
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tiny_vlm().state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight: \[1024, 32\] there, \[1, 32\] here"):
        reward(tmp_path)(both(1))
    for changes, said in (
        ({"scale": "rank"}, "scale is 'rank'; accepted are group, sigmoid, score"),
        ({"dtype": "fp8"}, "dtype of fp32, bf16"),
        ({"max_tokens": 1}, "max_tokens >= 2"),
        ({"most": 0.0}, "most is 0.0; accepted is a number above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            reward(place, **changes)


def test_a_language_model_lends_its_body_and_a_reward_model_its_head_too(trained, folder, tmp_path):
    from safetensors.torch import save_file

    stage, place = trained
    torch.manual_seed(3)
    body = tiny_vlm()
    save_file({k: v.contiguous() for k, v in body.state_dict().items()}, tmp_path / "model.safetensors")
    assert has_value_head(str(place)) and not has_value_head(str(tmp_path)) and not has_value_head("nowhere")
    started = fit(build(lr=0.0, init_from=str(tmp_path)), folder, 1)
    kept = weights(started.vlm)
    head = kept.pop("decoder.lm_head.weight")
    assert head.shape == (1, 32) and distance(kept, weights(body)) == 0.0
    again = fit(build(lr=0.0, init_from=str(place)), folder, 1)
    assert distance(weights(again.vlm), weights(stage.vlm)) == 0.0


# ------------------------------------------------------------------------------------------------ the command line

FILE = "experiments/step3vl_10b/_reward_model.yaml"
SAVES = "--trainer.callbacks=[{class_path: step3vl.callbacks.Checkpoints, init_args: {every_n_steps: 1, keep_last: 9}}]"
SUMS = "{class_path: step3vl.evaluation.HeldOut, init_args: {shards: corpus/test/text-sums-*.tar, num_cases: 2}}"
SHORT = ["--model.init_from=null", "--model.schedule=null", "--data.pairs_per_step=4", "--data.num_steps=9"]
SHORT += ["--data.val_pairs=6", "--trainer.precision=32-true", "--trainer.log_every_n_steps=1", "--scale=tiny", SAVES]


def saved(run):
    from step3vl.weights.pieces import Pieces
    from step3vl.weights.runs import saved_steps

    source = Pieces(saved_steps(Path(run) / "checkpoints")[0])
    return {name: source.read(name) for name in list(source.keys())}


def test_the_experiment_runs_restarts_is_validated_and_rewards_rlhf(workplace, capsys):
    """One command each: pairs, a run in one piece and in two, its accuracy, and RLHF with it by one override."""
    from step3vl.cli import main

    for split in ("train", "val"):
        assert main(["data", "prefer", f"corpus/{split}/documents-digits-*.tar", f"preferences/{split}"]) == 0

    def run(verb, folder, *more):
        return main([verb, "-c", FILE, *SHORT, f"--trainer.default_root_dir={folder}", *more])

    half = "--trainer.val_check_interval=2"
    assert run("fit", "whole", "--trainer.max_steps=4", half) == 0
    assert run("fit", "parts", "--trainer.max_steps=2", half) == 0
    assert run("fit", "parts", "--trainer.max_steps=4", half, "--ckpt_path=last") == 0
    one, two = saved("whole"), saved("parts")
    assert one.keys() == two.keys() and any(name.startswith("optimizer/") for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    capsys.readouterr()
    assert run("validate", "whole", "--ckpt_path=last") == 0
    out = capsys.readouterr().out
    assert all(f"val_{name} " in out for name in ("loss", "accuracy", "margin"))
    assert run("test", "whole", "--ckpt_path=last", f"--suite.sums={SUMS}") != 0
    assert "a reward model answers nothing; step3vl validate measures it" in capsys.readouterr().err

    place = "answers.otherwise.preference.reward"
    words = ["fit", "-c", "experiments/step3vl_10b/6_rlhf.yaml", "--scale=tiny", "--trainer.max_steps=1"]
    words += ["--model.rubric=rubric/reward_model.yaml", f"--model.rubric.{place}.init_from=whole"]
    words += ["--model.init_from=null", "--model.critic=null", "--model.advantage=advantage/group.yaml"]
    words += ["--model.group_size=2", "--data.prompts_per_step=2", "--model.filters=[]", "--suite=null"]
    words += ["--data.sources.instructions.shards=train/text-sums-*.tar", "--model.rollout.max_new_tokens=4"]
    assert main(words) == 0, capsys.readouterr().err
    import csv

    (file,) = Path("runs/tiny/experiments/step3vl_10b/6_rlhf/csv").glob("version_*/metrics.csv")
    (row,) = [row for row in csv.DictReader(file.open()) if row.get("reward")]
    assert "reward/preference" in row or float(row["truncated"]) == 1.0


@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_the_experiment_prints_at_both_scales(scale, workplace, capsys):
    from step3vl.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", FILE, "--scale", scale, "--print_config"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "RewardModelStage" in out and "4_sft_stage2" in out
    if scale == "paper":
        assert out.count("not given in the report; ours") >= 8
