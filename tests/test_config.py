"""The five composition rules, their errors, and the comments that travel with the numbers."""

import pytest

from step3vl.config import ConfigError, compose


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)

    write(
        card="class_path: a.A\ninit_args: {width: 32, lr: 3e-4}\n",
        other="class_path: a.B\ninit_args:\n  depth: 2  # report: two layers\n",
        base="vars: {n: 3}\nmodel:\n  class_path: m.M\n  init_args:\n    part: card.yaml\n    steps: ${vars.n}\n"
        "trainer: {max_steps: 5, devices: 1}\nlist: [1, 2]\n",
        row="base: ./base.yaml\nrow: {label: R}\noverride:\n  model.part: other.yaml\n"
        "  trainer.max_steps: 7  # seven\n",
    )
    return write


def part(composed):
    return composed.config["model"]["init_args"]["part"]


def test_base_and_card(files):
    composed = compose(["base.yaml"])
    assert part(composed) == {"class_path": "a.A", "init_args": {"width": 32, "lr": 3e-4}}
    assert composed.config["model"]["init_args"]["steps"] == 3
    assert "vars" not in composed.config and composed.vars == {"n": 3}


def test_a_card_replaces_what_it_inherits(files):
    composed = compose(["row.yaml"])
    assert part(composed) == {"class_path": "a.B", "init_args": {"depth": 2}}  # no width, no lr of the old class
    assert composed.config["trainer"] == {"max_steps": 7, "devices": 1}
    assert composed.row == {"label": "R"}


def test_a_mapping_merges_unless_it_changes_the_class(files):
    files(same="base: ./base.yaml\nmodel: {init_args: {part: {init_args: {lr: 1.0}}}}\n")
    assert part(compose(["same.yaml"]))["init_args"] == {"width": 32, "lr": 1.0}
    files(swap="base: ./base.yaml\nmodel: {init_args: {part: {class_path: a.C, init_args: {z: 1}}}}\n")
    assert part(compose(["swap.yaml"])) == {"class_path": "a.C", "init_args": {"z": 1}}


@pytest.mark.parametrize("key", ["model.part", "model.init_args.part"])
def test_command_line_swap_keeps_no_argument(files, key):
    assert part(compose(["base.yaml"], [f"{key}=other.yaml"])) == {"class_path": "a.B", "init_args": {"depth": 2}}
    assert part(compose(["base.yaml"], [f"{key}.class_path=a.C", f"{key}.size=4"])) == {
        "class_path": "a.C",
        "init_args": {"size": 4},
    }


def test_base_at_any_depth_replaces(files):
    files(deep="base: ./base.yaml\nmodel: {init_args: {part: {base: other.yaml, init_args: {extra: 1}}}}\n")
    assert part(compose(["deep.yaml"])) == {"class_path": "a.B", "init_args": {"depth": 2, "extra": 1}}


def test_several_bases_later_wins(files):
    files(more="trainer: {devices: 4}\nlist: [9]\n", two="base: [./base.yaml, ./more.yaml]\n")
    config = compose(["two.yaml"]).config
    assert config["trainer"] == {"max_steps": 5, "devices": 4} and config["list"] == [9]


def test_interpolation_sees_rows_and_the_command_line(files):
    files(late="base: ./base.yaml\nvars: {n: 4}\n")
    assert compose(["late.yaml"]).config["model"]["init_args"]["steps"] == 4
    assert compose(["late.yaml"], ["vars.n=9"]).config["model"]["init_args"]["steps"] == 9
    assert compose(["base.yaml"], ["x=${trainer.max_steps}", "trainer.max_steps=8"]).config["x"] == 8


def test_a_key_below_an_interpolated_mapping_is_set_in_a_copy(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "vars: {starts: {a: {x: 1, y: 2}, none: null}}\nmodel: {from: '${vars.starts.a}', to: '${vars.starts.none}'}\n"
    )
    found = compose([file], ["model.from.x=5", "model.to.z=7"])
    assert found.config["model"] == {"from": {"x": 5, "y": 2}, "to": {"z": 7}}
    assert found.vars["starts"] == {"a": {"x": 1, "y": 2}, "none": None}
    with pytest.raises(ConfigError, match="which has no key 'x'"):
        compose([file], ["model.from.x.x=5"])


def test_scale_is_a_search_path():
    full = compose(["vision/pe_lang_g14.yaml"]).config
    tiny = compose(["vision/pe_lang_g14.yaml"], scale="tiny").config
    assert full["class_path"] == tiny["class_path"]
    assert full["init_args"]["hidden_size"] == 1536 and tiny["init_args"]["hidden_size"] < 256


def test_comments_travel_with_their_values(files):
    notes = compose(["row.yaml"]).notes
    assert notes[("trainer", "max_steps")] == "seven"
    assert notes[("model", "init_args", "part", "init_args", "depth")] == "report: two layers"
    assert ("trainer", "devices") not in notes
    files(noted="vars: {n: 3}\na: ${vars.m}\n", more="base: ./noted.yaml\nvars:\n  m: 4  # why four\n")
    assert compose(["more.yaml"]).notes[("a",)] == "why four"
    assert compose(["row.yaml"], ["trainer.max_steps=3"]).notes[("trainer", "max_steps")] == "set by override"


@pytest.mark.parametrize(
    "names, overrides, scale, words",
    [
        (["bas.yaml"], [], None, ["bas.yaml", "base.yaml"]),
        (["base.yaml"], ["model.part=othr.yaml"], None, ["--model.part", "othr.yaml", "other.yaml"]),
        (["base.yaml"], ["trainer.max_steps.x=1"], None, ["trainer.max_steps", "5", "'x'"]),
        (["base.yaml"], ["trainer.max_steps"], None, ["'='"]),
        (["base.yaml"], ["x=${vars.m}"], None, ["vars.m"]),
        (["base.yaml"], ["x=[1"], None, ["--x", "[1"]),
        (["base.yaml"], [], "tinny", ["--scale", "tinny", "tiny"]),
        (["broken.yaml"], [], None, ["broken.yaml", "line 3"]),
        (["twice.yaml"], [], None, ["twice.yaml", "line 2", "'a'"]),
        (["text.yaml"], [], None, ["text.yaml", "mapping"]),
    ],
)
def test_mistakes_are_one_sentence(files, names, overrides, scale, words):
    files(broken="a: 1\nb: [\n", twice="a: 1\na: 2\n", text="hello\n")
    with pytest.raises(ConfigError) as caught:
        compose(names, overrides, scale)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
