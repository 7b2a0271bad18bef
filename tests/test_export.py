"""Runs out and in: export in the released layout, verification, init_from, the verbs and what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from step3vl.checkpoints import describe, export_model, make_tiny, open_model, verify
from step3vl.checkpoints.released import exact_ratio
from step3vl.cli import main
from step3vl.config import compose
from step3vl.saving import Writer
from step3vl.weights import open_source
from tests.saved import weights

ROW = "ablations/table4_vision_encoder/random.yaml"
RUN = Path("runs/tiny/ablations/table4_vision_encoder/random")
STILL = ["--model.optimizer.lr=1e-12", "--model.optimizer.adamw_lr=1e-12"]
SHORT = ["--scale", "tiny", "--trainer.max_steps=1", "--data.samples_per_step=4", "--model.sampling.max_new_tokens=3"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "step3vl"
    make_tiny("step3vl", out, seed=5)
    return out


def error(capsys, *args):
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


def test_a_run_is_exported_verified_and_trained_from(workplace, capsys):
    assert main(["fit", "-c", ROW, *SHORT]) == 0
    provenance = {"commit": "abc123", "seed": 0, "device": "CPU"}
    score = {"score": 0.5, "low": 0.4, "high": 0.6, "blind": 0.1, "majority": 0.2, "num_cases": 8}
    (RUN / "metrics.json").write_text(json.dumps({"scores": {"reading": score}, "provenance": provenance}))
    capsys.readouterr()
    assert main(["export", str(RUN), "out", "--verify"]) == 0
    assert "98 tensors bitwise" in capsys.readouterr().out

    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    names = set(index["weight_map"])
    assert {"vision_model.vit_downsampler2.bias", "model.layers.3.self_attn.q_norm.weight", "lm_head.weight"} <= names
    tensors = {k: v for file in Path("out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    checkpoint = weights(RUN)
    trained = checkpoint["vlm.projector.vit_large_projector.weight"]
    assert torch.equal(tensors["vit_large_projector.weight"], trained.bfloat16())

    card = Path("out/README.md").read_text()
    assert "abc123" in card and "| reading | 0.500 | 0.400..0.600 |" in card and "samples_per_step: 4" in card
    assert "global_size 64 (engines: 728)" in card and "samples." in card
    ids = json.loads(Path("out/generation_config.json").read_text())["eos_token_id"]
    assert ids == sorted(describe_processor(RUN).stop_ids)

    again = ["fit", "-c", ROW, *SHORT, *STILL]
    for source in ("out", str(RUN), "imported"):
        if source == "imported":
            assert main(["import", "out", source]) == 0
            again += [f"--model.vlm={source}/vlm.yaml"]
        shutil.rmtree("second", ignore_errors=True)
        assert main([*again, f"--model.init_from={source}", "--trainer.default_root_dir=second"]) == 0
        given = weights("second")
        for name, tensor in checkpoint.items():
            expected = tensor if source == str(RUN) else tensor.bfloat16().float()
            torch.testing.assert_close(given[name], expected, atol=1e-6, rtol=0)


def describe_processor(folder):
    return open_model(folder)[1]


def test_a_resumed_run_is_not_started_anew(workplace, tiny, capsys):
    assert main(["fit", "-c", ROW, *SHORT]) == 0
    before = weights(RUN)
    capsys.readouterr()
    assert (
        main(["fit", "-c", ROW, *SHORT, "--trainer.max_steps=2", f"--model.init_from={tiny}", "--ckpt_path=last"]) == 0
    )
    assert "init_from" not in capsys.readouterr().out
    after = weights(RUN)
    largest = max((after[name] - tensor).abs().max() for name, tensor in before.items())
    assert 0 < largest < 2e-2  # one more step; the tiny checkpoint is far away


def test_a_folder_is_scored_without_training(workplace, tiny, capsys):
    assert main(["import", str(tiny), "ours"]) == 0
    names = list(compose([ROW], scale="tiny").config["suite"])
    few = [f"--suite.{name}.num_cases=1" for name in names]
    vlm = ["--model.vlm=ours/vlm.yaml", "--model.processor=ours/processor.yaml", "--model.init_from=ours"]
    assert main(["test", "-c", ROW, *SHORT, *few, *vlm]) == 0
    assert "init_from ours: 98 tensors (ours)" in capsys.readouterr().out
    assert len(json.loads((RUN / "metrics.json").read_text())["scores"]) == len(names) > 3


def test_parts_are_loaded_by_name_and_mistakes_are_sentences(workplace, tiny, capsys):
    make_tiny("pe", "pe")
    assert main(["import", str(tiny), "ours"]) == 0
    run = ["fit", "-c", ROW, *SHORT]
    assert main([*run, f"--model.init_from.decoder={tiny}", "--model.init_from.vision_encoder=ours"]) == 0
    out = capsys.readouterr().out
    assert f"init_from {tiny}: " in out and "init_from ours: " in out
    message = error(capsys, *run, "--model.init_from=pe")
    assert "pe/PE-Lang-tiny.pt" in message and "missing" in message
    message = error(capsys, *run, "--model.init_from.vision_encoder=pe")
    assert "there" in message and "use the card of this checkpoint" in message
    assert "nowhere" in error(capsys, *run, "--model.init_from=nowhere")
    assert "'towr'" in error(capsys, *run, f"--model.init_from={tiny}", "--model.init_ignore=[towr]")


def test_export_refuses_what_the_layout_has_no_place_for(workplace, tiny, capsys):
    dinov3 = other_run(workplace, "vision_encoder", "vision/dinov3_vitl16.yaml")
    assert "DINOv3" in error(capsys, "export", dinov3, "out")
    deepstack = other_run(workplace, "deepstack", "deepstack/pool_mlp.yaml")
    assert "deepstack is on: the released STEP3-VL layout has no place" in error(capsys, "export", deepstack, "out")
    assert open_model(deepstack)[0].deepstack is not None  # refused, but a run like any other
    assert "already exists" in error(capsys, "export", tiny, tiny)
    assert "no folder nowhere" in error(capsys, "export", "nowhere", "out")
    Path("empty").mkdir()
    assert "no config.yaml" in error(capsys, "export", "empty", "out")
    assert "qwen3" in error(capsys, "make-tiny", "qwen", "out")
    assert not Path("out").exists() and not Path("out.part").exists()


def other_run(folder, part, given):
    """A run folder as fit leaves it, with another card for one part."""
    from step3vl.checkpoints.model import build
    from step3vl.models import VisionLanguageModel

    run = folder / part
    card = compose(["vlm/step3vl_10b.yaml"], scale="tiny").config
    card["init_args"][part] = compose([given], scale="tiny").config
    state = {f"vlm.{k}": v for k, v in build(card, VisionLanguageModel).state_dict().items()}
    Writer().save({"state_dict": state}, run / "checkpoints" / "step-00000001")
    processor = {"class_path": "step3vl.data.Processor", "init_args": {"template": "plain"}}
    config = {"model": {"class_path": "x", "init_args": {"vlm": card, "processor": processor}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def test_verify_finds_a_changed_bit_and_a_wrong_config(tiny, tmp_path):
    out = tmp_path / "out"
    export_model(tiny, out)
    assert verify(tiny, out).num_tensors == 98
    config = json.loads((out / "config.json").read_text())
    changed = config | {"vision_config": config["vision_config"] | {"hidden_act": "gelu"}}
    (out / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="logits differ"):
        verify(tiny, out)
    (out / "config.json").write_text(json.dumps(config))
    file = sorted(out.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        verify(tiny, out)


def test_float32_keeps_every_bit(tiny, tmp_path):
    folder = tmp_path / "float"
    export_model(tiny, folder, dtype="fp32")
    assert {entry.dtype for entry in open_source(folder).keys().values()} == {torch.float32}
    assert describe(folder).vlm == describe(tiny).vlm
    with pytest.raises(ValueError, match="bf16"):
        export_model(tiny, tmp_path / "other", dtype="int4")


def test_config_json_holds_what_engines_read(tiny):
    config = json.loads((tiny / "config.json").read_text())
    assert config["architectures"] == ["StepVLForConditionalGeneration"] and config["model_type"] == "step_robotics"
    read_by_engines = "width layers heads image_size patch_size mlp_ratio ls_init_value hidden_act output_dim"
    flags = "use_abs_posemb use_cls_token use_rope2d use_ln_pre use_ln_post"
    assert set(f"{read_by_engines} {flags}".split()) <= config["vision_config"].keys()
    assert config["text_config"]["architectures"] == ["Qwen3ForCausalLM"]
    assert {"projector_bias", "image_token_id", "understand_projector_stride"} <= config.keys()
    assert int(1536 * exact_ratio(8960, 1536)) == 8960
    assert all(int(width * exact_ratio(mlp, width)) == mlp for width in range(3, 200, 7) for mlp in range(5, 999, 31))


def test_tiny_checkpoints_are_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_tiny("pe", tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "PE-Lang-tiny.pt").read_bytes() for name in "abc")
    assert a == b and a != c
