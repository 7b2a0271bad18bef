"""Stand-alone, inside the sandbox: define a model's program, call one function, send its value out as JSON.

Nothing is checked here. The model's code shares this process and may change all of it; the worst that it can do is
to claim a value, which is what returning one does. Expected values are never in this process.
"""

import json
import os
import sys
import types
from typing import Any

_JOB, _VALUE = 3, 4  # file descriptors set up by jail.py


def plain(value):
    """Sets as lists; whatever else JSON cannot say is an error of the program."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    raise TypeError(f"returned a {type(value).__name__}, which JSON cannot say")


def main():
    with os.fdopen(_JOB, "rb") as file:
        job = json.loads(file.read())
    dumps, write, leave = json.dumps, os.write, os._exit
    module = types.ModuleType("program")
    sys.modules["program"] = module
    exec(compile(job["code"], "program.py", "exec"), module.__dict__)
    function: Any = module
    for name in job["function"].split("."):
        function = getattr(function() if isinstance(function, type) else function, name)
    message = (job["nonce"] + dumps(function(*job["arguments"]), default=plain) + "\n").encode()
    sys.stdout.flush()
    while message:
        message = message[write(_VALUE, message) :]
    leave(0)


if __name__ == "__main__":
    main()
