"""Configuration files: YAML that would build objects, bombs, cycles, and classes that are no parts."""

from step3vl.cli import main
from step3vl.config import compose


def of(text):
    """A case: the file is composed, and OmegaConf resolves it."""

    def case(folder):
        (folder / "run.yaml").write_text(text)
        return lambda: compose(["run.yaml"])

    return case


def run(text, *more):
    """A case: `fit -c run.yaml`, so that classes are looked up; anything but status 0 or 2 comes out."""

    def case(folder):
        (folder / "run.yaml").write_text(text)

        def command():
            if main(["fit", "-c", "run.yaml", "--print_config", *more]) == 2:
                raise ValueError("refused")

        return command

    return case


def stage(**parts):
    lines = [f"{key}: {value}" for key, value in parts.items()]
    return "\n".join(lines) + "\n"


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{','.join(['*' + chr(97 + k)] * 9)}]\n" for k in range(8)
)
SYSTEM = "{class_path: os.system, init_args: {command: 'touch ../../owned'}}"
POPEN = "{class_path: subprocess.Popen, init_args: {args: ['touch', '../../owned']}}"
CASES = {
    "python object": of("model: !!python/object/apply:os.system ['touch ../../owned']\n"),
    "python module": of("model: !!python/module:os\n"),
    "python name": of("model: !!python/name:os.system\n"),
    "a billion laughs": of(LAUGHS),
    "an anchor in itself": of("a: &a [*a]\n"),
    "10,000 levels": of("a: " + "[" * 10_000 + "]" * 10_000 + "\n"),
    "os.system as model": run(stage(model=SYSTEM, data=SYSTEM)),
    "Popen as model": run(stage(model=POPEN, data=POPEN)),
    "eval as model": run(stage(model="{class_path: builtins.eval, init_args: {source: 'open(1)'}}", data=SYSTEM)),
    "os.system as optimizer": run(
        f"base: experiments/step3vl_10b/1_pretrain_phase1.yaml\noverride:\n  model.optimizer: {SYSTEM}\n"
    ),
    "a module with side effects": run(stage(model="{class_path: antigravity.Stage}", data=SYSTEM)),
    "a base that is itself": of("base: run.yaml\n"),
    "a base that climbs": of("base: ../../../../etc/passwd\n"),
    "a base that is a device": of("base: /dev/null\n"),
    "an interpolation of itself": of("a: ${a}\n"),
    "interpolations in a ring": of("a: ${b}\nb: ${a}\n"),
    "an interpolation of a billion": of(
        "a: 0123456789\n"
        + "".join(
            f"x{k}: ${{{'a' if not k else f'x{k - 1}'}}}${{{'a' if not k else f'x{k - 1}'}}}\n" for k in range(12)
        )
    ),
    "a resolver that runs": of("a: ${oc.decode:'!!python/object/apply:os.system [ls]'}\n"),
    "a resolver that is not": of("a: ${system:ls}\n"),
    "tabs": of("a:\n\tb: 1\n"),
    "no mapping": of("- 1\n- 2\n"),
    "nothing": of(""),
    "bytes": of("\x00\x01".replace("\x00", "")),
    "a key of a megabyte": of("x" * 10**6 + ": 1\n"),
    "a number of 4,000 digits": of("seed_everything: " + "9" * 4000 + "\n"),
    "two documents": of("a: 1\n---\nb: 2\n"),
    "merge keys": of("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a\n"),
    "an override of dunders": run(stage(model="{}", data="{}"), "--model.__class__.__init__=1"),
}
