"""Which key of a run is wrong, in one sentence: what was given, and what is accepted.

jsonargparse finds every mistake but reports it with the whole type tree; this walks to the innermost key at fault.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import importlib
import inspect
import io
import types
import typing
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from step3vl.config import ConfigError, nearest


def import_class(class_path: str, where: str) -> Any:
    """Import a class by its path; ConfigError with the nearest names when module or class does not exist."""
    module_name, _, name = class_path.rpartition(".")
    if not module_name:
        raise ConfigError(f"{where}: class_path {class_path!r} is not an import path like step3vl.models.vision.PELang")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{where}: no module {error.name!r} for class {class_path!r}") from None
    if not hasattr(module, name):
        names = [n for n in getattr(module, "__all__", dir(module)) if n[:1].isupper()]
        raise ConfigError(f"{where}: {module_name} has no class {name!r}; {nearest(name, names)}")
    return getattr(module, name)


def check_keys(given: dict, cls: Any, path: str) -> None:
    """Every key is an argument of `cls`; classes that take **kwargs are left to judge by themselves."""
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in given:
        if key not in parameters:
            raise ConfigError(f"{path}: {cls.__name__} has no argument {key!r}; {nearest(key, list(parameters))}")


def check_classes(node: Any, path: str) -> None:
    """Every class_path below `node` exists, and every init_args key is one of its arguments."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            check_classes(item, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    if isinstance(node.get("class_path"), str):
        check_keys(node.get("init_args") or {}, import_class(node["class_path"], path), path)
    for key, value in node.items():
        check_classes(value, path if key == "init_args" else f"{path}.{key}")


def check_types(value: Any, hint: Any, path: str) -> None:
    """Raise ConfigError for the innermost value below `value` that does not fit its type hint."""
    options = [o for o in _options(hint) if o is not type(None)]
    if value is None:
        if len(options) == len(_options(hint)) and hint is not typing.Any:
            raise ConfigError(f"{path}: expected {_name(hint)}, got null")
        return
    for option in options:
        origin, args = typing.get_origin(option), typing.get_args(option)
        if isinstance(value, dict) and origin in (dict, collections.abc.Mapping):
            for key, item in value.items():
                check_types(item, args[1], f"{path}.{key}")
        elif isinstance(value, list) and origin in (list, collections.abc.Sequence):
            for i, item in enumerate(value):
                check_types(item, args[0], f"{path}[{i}]")
        elif isinstance(value, dict) and dataclasses.is_dataclass(option) and "class_path" not in value:
            check_keys(value, option, path)
            check_arguments(value, option, path)
        elif isinstance(value, dict) and isinstance(value.get("class_path"), str):
            _check_class(value, option, path)
        elif isinstance(value, dict) and isinstance(option, type) and option.__module__ != "builtins":
            raise ConfigError(f"{path}: a {option.__name__} needs class_path, got {value!r}; is the name misspelt?")
        else:
            continue
        return
    if not isinstance(value, dict) and not _fits(value, hint):
        raise ConfigError(f"{path}: expected {_name(hint)}, got {value!r}")


def check_arguments(given: dict, cls: Any, path: str) -> None:
    """Each given argument fits the signature of `cls`, and none that is needed is missing."""
    hints = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else _init(cls))
    for key, value in given.items():
        if key in hints:
            check_types(value, hints[key], f"{path}.{key}")
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is parameter.empty and name not in given and parameter.kind not in (2, 4):
            raise ConfigError(f"{path}: {cls.__name__} needs {name!r}, which is not given")


def _check_class(value: dict, option: Any, path: str) -> None:
    cls = import_class(value["class_path"], path)
    given = value.get("init_args") or {}
    if isinstance(option, type):
        if isinstance(cls, type) and not getattr(option, "_is_protocol", False) and not issubclass(cls, option):
            raise ConfigError(f"{path}: {value['class_path']} is not a {option.__name__}")
        check_arguments(given, cls, path)
        return
    returned = typing.get_args(option)[-1] if typing.get_args(option) else None  # Callable[..., X]: a class of X
    if isinstance(returned, type) and isinstance(cls, type) and not issubclass(cls, returned):
        raise ConfigError(f"{path}: {value['class_path']} is not a {returned.__name__}")
    hints = typing.get_type_hints(_init(cls)) if isinstance(cls, type) else {}
    for key, item in given.items():
        if key in hints:
            check_types(item, hints[key], f"{path}.{key}")


def _fits(value: Any, hint: Any) -> bool:
    parser = ArgumentParser(exit_on_error=False)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parser.add_argument("--value", type=hint)
            parser.parse_object({"value": value})
    except ArgumentError:
        return False
    except Exception:  # a hint that jsonargparse cannot check on its own is not this walk's to judge
        return True
    return True


def _init(cls: Any) -> Any:
    return inspect.getattr_static(cls, "__init__")


def _options(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _name(hint: Any) -> str:
    names = []
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            names.append(" | ".join(repr(a) for a in typing.get_args(option)))
        else:
            names.append("null" if option is type(None) else str(getattr(option, "__name__", option)))
    return " or ".join(names)
