"""Composition of a run from YAML: bases, cards, overrides, interpolation. Five rules (docs/config.md) and nothing else.

OmegaConf composes, jsonargparse judges, Lightning runs. `compose` returns plain data plus the comment written beside
each number, so that a printed run still says where its numbers come from.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(str(resources.files("step3vl"))) / "configs"
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
EXTRA_KEYS = ("row", "vars")


class ConfigError(ValueError):
    """One sentence for the person who wrote the file or typed the command."""


class Block(dict):
    """A mapping that remembers the comment beside each key and whether it has a start of its own (a card, a base)."""

    notes: dict[str, str]
    own_start: bool

    def __init__(self, items: dict | None = None, notes: dict[str, str] | None = None, own_start: bool = False):
        super().__init__(items or {})
        self.notes, self.own_start = dict(notes or {}), own_start

    def copy(self) -> Block:
        return Block({key: _copy(value) for key, value in self.items()}, self.notes, self.own_start)


@dataclass
class Composed:
    """A composed run: `config` is what LightningCLI reads; `row` and `vars` were read by us and taken out of it."""

    config: dict[str, Any]
    row: dict[str, Any]
    vars: dict[str, Any]
    notes: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Comment beside a value, by key path, e.g. ("trainer", "max_steps")."""


MAX_VALUES = 100_000
"""Values of one file, with what its anchors repeat."""


def compose(files: Sequence[str | Path], overrides: Sequence[str] = (), scale: str | None = None) -> Composed:
    """Merge `files` in order, then `overrides` ("a.b.c=value"), then resolve `${...}` over the whole.

    Raises ConfigError with one sentence for a missing file or card, a bad override or a bad interpolation.
    """
    search = _search_folders(scale)
    merged = Block()
    for name in files:
        path = _find(str(name), Path.cwd(), [Path.cwd(), *search], "the command line")
        merged = _merge_plain(merged, _load(path, search))
    for text in overrides:
        key, sep, value = text.partition("=")
        if not sep:
            raise ConfigError(f"override {text!r} has no '=': write --{key}=VALUE")
        _assign(merged, key, _parse_value(value, key), Path.cwd(), search, f"--{key}")
    try:
        plain = OmegaConf.to_container(OmegaConf.create(_plain(merged)), resolve=True)
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "the configuration"
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None
    config = cast("dict[str, Any]", plain)
    extra = {key: config.pop(key, None) or {} for key in EXTRA_KEYS}
    notes = {path: note for path, note in _walk_notes(merged, merged) if path[0] not in EXTRA_KEYS}
    return Composed(config, extra["row"], extra["vars"], notes)


def nearest(given: str, accepted: Sequence[str], limit: int = 8) -> str:
    """'did you mean ...' when something is close, else the accepted names."""
    close = difflib.get_close_matches(given, accepted, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    names = sorted(accepted)
    shown = ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
    return f"accepted: {shown or 'none'}"


def scales() -> list[str]:
    """Names accepted by --scale: the folders of `configs/` that hold a whole second set of cards, and `paper`."""
    return ["paper", "tiny"]


# ------------------------------------------------------------------------------------------------ files and cards


def _search_folders(scale: str | None) -> list[Path]:
    if scale is not None and scale not in scales():
        raise ConfigError(f"--scale: no scale {scale!r}; {nearest(scale, scales())}")
    return ([CONFIGS / scale] if scale and scale != "paper" else []) + [CONFIGS, Path.cwd()]


def _find(name: str, here: Path, search: Sequence[Path], where: str) -> Path:
    """Rule 2: './' and '../' are relative to the file, any other path goes through the search folders."""
    folders = [here] if name.startswith(("./", "../")) or Path(name).is_absolute() else search
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    known = sorted({str(p.relative_to(f)) for f in folders for p in (f / name).parent.glob("*.yaml") if f in p.parents})
    known = known or sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))
    raise ConfigError(f"{where}: no file {name!r}; {nearest(name, known)}")


def _load(path: Path, search: Sequence[Path]) -> Block:
    if path in _loading:
        raise ConfigError(f"{path}: the file is its own base, through {' -> '.join(p.name for p in _loading)}")
    _loading.append(path)
    try:
        return _load_new(path, search)
    finally:
        _loading.pop()


_loading: list[Path] = []
"""Files that are being read, each because the one before it names it."""


def _load_new(path: Path, search: Sequence[Path]) -> Block:
    try:
        lines = path.read_text(encoding="utf-8")
        node = yaml.compose(lines, Loader=_Loader)
        _check_size(node, str(path))
        data = _construct(node, lines.splitlines(), path) if node is not None else Block()
    except RecursionError:
        raise ConfigError(f"{path}: values are nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{at}: not YAML ({getattr(error, 'problem', error)})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(data, Block):
        raise ConfigError(f"{path}: the file must hold a mapping, it holds a {type(data).__name__}")
    block = _expand(data, path.parent, search, str(path))
    block.own_start = True
    return block


def _expand(node: Any, here: Path, search: Sequence[Path], where: str) -> Any:
    """Rules 1, 2 and 4: cards become their content, `base:` is started from, `override:` is applied last."""
    if isinstance(node, str) and node.endswith(".yaml"):
        return _load(_find(node, here, search, where), search)
    if isinstance(node, list):
        return [_expand(item, here, search, where) for item in node]
    if not isinstance(node, Block):
        return node
    node = Block(node, node.notes)
    bases, override = node.pop("base", None), node.pop("override", None)
    out = Block()
    for name in [bases] if isinstance(bases, str) else bases or []:
        if not isinstance(name, str) or not name.endswith(".yaml"):
            raise ConfigError(f"{where}: base: takes a .yaml path or a list of them, got {name!r}")
        out = _merge_plain(out, _load(_find(name, here, search, where), search))
    own = Block({k: _expand(v, here, search, f"{where}: {k}") for k, v in node.items()}, node.notes)
    out = _merge_plain(out, own)
    if override is not None and not isinstance(override, Block):
        raise ConfigError(f"{where}: override: takes a mapping of dotted keys, got {override!r}")
    for key, value in (override or {}).items():
        _assign(
            out, key, value, here, search, f"{where}: override {key}", (override.notes if override else {}).get(key)
        )
    out.own_start = bool(bases)
    return out


# ------------------------------------------------------------------------------------------------ merging


def _merge(old: Any, new: Any) -> Any:
    """Rule 3: what has its own start replaces; a plain mapping merges."""
    if isinstance(old, Block) and isinstance(new, Block) and not new.own_start:
        return _merge_plain(old, new)
    return _copy(new)


def _merge_plain(old: Block, new: Block) -> Block:
    """`new` over `old`, key by key; a changed class drops the arguments of the old one."""
    out = old.copy()
    if "class_path" in new and out.get("class_path") not in (None, new["class_path"]):
        for key in ("init_args", "dict_kwargs"):
            out.pop(key, None)
    for key, value in new.items():
        _put(out, key, _merge(out.get(key), value), new.notes.get(key))
    return out


def _put(block: Block, key: str, value: Any, note: str | None) -> None:
    block[key] = value
    block.notes.pop(key, None)
    if note:
        block.notes[key] = note


def _assign(
    root: Block, dotted: str, value: Any, here: Path, search: Sequence[Path], where: str, note: str | None = None
) -> None:
    """Rule 4: set a dotted key; inside a class, `init_args` is implied."""
    *parents, last = dotted.split(".")
    node: Any = root
    for depth, part in enumerate(parents):
        node = _step(node, part, ".".join(parents[:depth]) or "the run", where)
        node[part] = _named(root, node.get(part))
        if node[part] is None:
            node[part] = Block()
        node = node[part]
    node = _step(node, last, ".".join(parents) or "the run", where)
    value = _expand(value, here, search, where)
    if last == "class_path" and node.get("class_path") not in (None, value):
        for key in ("init_args", "dict_kwargs"):
            node.pop(key, None)
    _put(node, last, _merge(node.get(last), value), note or "set by override")


def _named(root: Block, value: Any) -> Any:
    """A mapping (or nothing) that `${a.b}` names, so that a key below it can be set; any other value as it is."""
    match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if match is None:
        return value
    found: Any = root
    for part in match[1].split("."):
        if not isinstance(found, Block) or part not in found:
            return value
        found = found[part]
    return _copy(found) if found is None or isinstance(found, Block) else value


def _step(node: Any, part: str, path: str, where: str) -> Block:
    """The mapping that holds `part`: the node itself, or its `init_args` when the node is a class."""
    if not isinstance(node, Block):
        raise ConfigError(f"{where}: {path} is {node!r}, which has no key {part!r}")
    if "class_path" in node and part not in CLASS_KEYS:
        inner = node.setdefault("init_args", Block())
        if not isinstance(inner, Block):
            raise ConfigError(f"{where}: {path}.init_args is {inner!r}, it must be a mapping")
        return inner
    return node


# ------------------------------------------------------------------------------------------------ YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number, as YAML 1.2 and OmegaConf do."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_value(text: str, key: str) -> Any:
    try:
        node = yaml.compose(text, Loader=_Loader)
        _check_size(node, f"--{key}")
        return None if node is None else _construct(node, [], Path(f"--{key}"))
    except RecursionError:
        raise ConfigError(f"--{key}: values are nested too deep") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key}: {text[:80]!r} is not a YAML value ({getattr(error, 'problem', error)})") from None


def _check_size(root: yaml.Node | None, where: str) -> None:
    """Raises ConfigError when anchors repeat one another beyond MAX_VALUES, or one is inside of itself."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0  # being counted
            children = node.value if isinstance(node.value, list) else []
            flat = [child for item in children for child in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(size(child) for child in flat)
        elif sizes[id(node)] == 0:
            raise ConfigError(f"{where}: an anchor is used inside of itself")
        return sizes[id(node)]

    if root is not None and size(root) > MAX_VALUES:
        raise ConfigError(f"{where}: it stands for {size(root):,} values; at most {MAX_VALUES:,} are read")


def _construct(node: yaml.Node, lines: list[str], path: Path) -> Any:
    """A YAML node as plain data; mappings become Blocks that keep the comment at the end of each key's line."""
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, lines, path) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return _Loader("").construct_object(node)
    block = Block()
    for key_node, value_node in node.value:
        key = key_node.value
        if key in block:
            raise ConfigError(f"{path}, line {key_node.start_mark.line + 1}: key {key!r} is given twice")
        single = value_node.start_mark.line == value_node.end_mark.line and not isinstance(value_node, yaml.MappingNode)
        end = value_node.end_mark if single or getattr(value_node, "flow_style", False) else key_node.end_mark
        rest = lines[end.line][end.column :] if end.line < len(lines) else ""
        comment = re.match(r"^[\s:]*#\s*(.*)$", rest)
        _put(block, key, _construct(value_node, lines, path), comment.group(1).strip() if comment else None)
    return block


def _copy(value: Any) -> Any:
    if isinstance(value, Block):
        return value.copy()
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _walk_notes(node: Any, root: Block, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """Every (key path, comment); a value that is just `${a.b}` without a comment takes the comment of a.b."""
    if not isinstance(node, Block):
        return []
    found = []
    for key, value in node.items():
        reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        note = node.notes.get(key) or (_note_at(root, reference[1].split(".")) if reference else None)
        if note:
            found.append(((*path, key), note))
        found += _walk_notes(value, root, (*path, key))
    return found


def _note_at(root: Block, keys: list[str]) -> str | None:
    node: Any = root
    for key in keys[:-1]:
        node = node.get(key) if isinstance(node, Block) else None
    if not isinstance(node, Block):
        return None
    reference = re.fullmatch(r"\$\{([\w.]+)\}", str(node.get(keys[-1])))
    return node.notes.get(keys[-1]) or (_note_at(root, reference[1].split(".")) if reference else None)
