"""Stand-alone, inside the sandbox: define a model's program, call one function, send its value out as JSON.

Nothing is checked here. The model's code shares this process and may change all of it; the worst that it can do is
to claim a value, which is what returning one does. Expected values are never in this process. How values travel
(`packed`, `unpacked`) is used at the other end, too.
"""

import json
import os
import sys
import types
from typing import Any

_JOB, _VALUE = 3, 4  # file descriptors set up by jail.py


def packed(value):
    """A value as JSON can say it, tuples, sets and keys that are no text included; anything else is a TypeError."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [packed(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[packed(key), packed(item)] for key, item in value.items()]}
    if isinstance(value, (tuple, set, frozenset)):
        return {"tuple" if isinstance(value, tuple) else "set": [packed(item) for item in value]}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return packed(value.item())  # one number of numpy
    raise TypeError(f"a {type(value).__name__} is no plain value")


def unpacked(tree):
    """What `packed` was given; ValueError or TypeError for anything that it never writes."""
    if isinstance(tree, list):
        return [unpacked(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, items),) = tree.items()
    make = {"tuple": tuple, "set": set, "dict": dict}.get(kind)
    if make is None or not isinstance(items, list):
        raise ValueError(f"{kind!r} is no kind of value")
    return make(unpacked(item) for item in items)


def main():
    with os.fdopen(_JOB, "rb") as file:
        job = json.loads(file.read())
    dumps, write, leave, pack = json.dumps, os.write, os._exit, packed
    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.path += job["path"]
    exec(compile(job["code"], "program.py", "exec"), module.__dict__)
    function: Any = module
    for name in job["function"].split("."):
        function = getattr(function() if isinstance(function, type) else function, name)
    value = function(*unpacked(job["arguments"]))
    try:
        message = (job["nonce"] + dumps(pack(value)) + "\n").encode()
    except RecursionError:
        raise TypeError("a value that is nested without end is no plain value") from None
    sys.stdout.flush()
    while message:
        message = message[write(_VALUE, message) :]
    leave(0)


if __name__ == "__main__":
    main()
