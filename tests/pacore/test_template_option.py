"""`--template` of ask, eval, measure and serve: the synthesis prompt is the one that was named."""

import argparse
import json
from pathlib import Path

import pytest

from step3vl import serve
from step3vl.answering import Answering, Preset, add_preset, read_preset
from step3vl.cli import main
from step3vl.config import ConfigError
from step3vl.pacore import SynthesisTemplate, estimated, read_traces
from step3vl.pacore.generator import PaCoReGenerator

SHORT = SynthesisTemplate("short").hash


@pytest.fixture
def model(workplace):
    assert main(["make-tiny", "step3vl", "model"]) == 0
    return "model"


def test_ask_uses_the_named_template(model, capsys):
    words = ["--rounds=[2]", "--scale=tiny", "--max-new-tokens=4", "--trace=t.jsonl"]
    assert main(["pacore", "ask", model, "What?", *words, "--template=short"]) == 0
    assert main(["pacore", "ask", model, "What?", *words]) == 0
    first, second = read_traces("t.jsonl")
    assert first.template == SHORT and "Refs" in first.rounds[1].prompt[0][1]
    assert second.template != SHORT and "Reference Responses:" in second.rounds[1].prompt[0][1]
    capsys.readouterr()
    assert main(["pacore", "ask", model, "What?", *words, "--template=nowhere.jinja"]) == 2
    assert "template nowhere.jinja cannot be read" in capsys.readouterr().err


def test_eval_and_measure_use_the_named_template(model):
    words = ["--suite=stages", "--only=arithmetic", "--data-root=corpus", "--limit=1", "--max-new-tokens=4"]
    words += ["--scale=tiny", "--template=short"]
    assert main(["eval", model, *words, "--mode=pacore", "--rounds=[2]", "--no-blind", "--out=e"]) == 0
    assert json.loads(Path("e/metrics.json").read_text())["provenance"]["template"] == SHORT
    assert main(["pacore", "measure", model, *words, "--rollouts=1,2", "--out=m"]) == 0
    assert {trace.template for trace in read_traces("m/traces/arithmetic.jsonl")} == {SHORT}


def test_serve_coordinates_with_the_named_template(model, monkeypatch):
    made: list[Preset] = []

    class Reached(Exception):
        pass

    def coordinated(self: Answering, preset: Preset, **more: object) -> PaCoReGenerator:
        made.append(preset)
        raise Reached

    monkeypatch.setattr(Answering, "coordinated", coordinated)
    with pytest.raises(Reached):
        serve.run([model, "--pacore=[2]", "--template=short", "--scale=tiny"])
    assert [preset.template for preset in made] == ["short"]


def test_a_template_without_rounds_is_refused():
    parser = argparse.ArgumentParser()
    add_preset(parser, "sere", with_mode=True)
    with pytest.raises(ConfigError, match="--template are PaCoRe's"):
        read_preset(parser.parse_args(["--template=short"]))


def test_a_preset_hands_its_template_on():
    answering = Answering(generator=None, numbers=None, counter=estimated())  # type: ignore[arg-type]
    preset = read_preset_of(["--preset=pacore", "--template=short"])
    assert answering.coordinated(preset).template.hash == SHORT
    assert answering.coordinated(read_preset_of(["--preset=pacore"])).template.hash == SynthesisTemplate().hash


def read_preset_of(words: list[str]) -> Preset:
    parser = argparse.ArgumentParser()
    add_preset(parser, "sere", with_mode=True)
    return read_preset(parser.parse_args(words))
