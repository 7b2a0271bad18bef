"""Runs each hostile case in a process of its own, forked from one that has imported everything.

`python -m tests.hostile.nursery FAMILY FOLDER` prints a JSON line a case: its end, CPU seconds, memory above the start.
"""

import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

WALL_S = 20


def outcome(run) -> str:
    """fine, refused (a ValueError of one sentence), or what else came out."""
    try:
        run()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        return "refused" if text and text.count("\n") <= 1 else f"refused in {text.count(chr(10)) + 1} lines"
    except MemoryError:
        return "out of memory"
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} {traceback.format_exc()[-400:]}"
    return "fine"


def memory_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def child(case, folder: Path, pipe: int) -> None:
    os.chdir(folder)
    signal.alarm(WALL_S)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
    run = case(folder)  # what builds the hostile file is not measured
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory_kb("VmRSS"), time.process_time()  # a busy machine slows the clock, not the work
    end = outcome(run)
    found = {"end": end, "seconds": time.process_time() - start, "mb": (memory_kb("VmHWM") - before) / 1024}
    os.write(pipe, json.dumps(found).encode())
    os._exit(0)


def main(family: str, base: Path) -> None:
    module = importlib.import_module(f"tests.hostile.{family}")
    for name, case in module.CASES.items():
        folder = base / "cases" / name
        folder.mkdir(parents=True)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(case, folder, write)
        os.close(write)
        told = b""
        while part := os.read(read, 65536):
            told += part
        os.close(read)
        _, status = os.waitpid(pid, 0)
        row = json.loads(told) if told else {"end": f"killed, status {status}", "seconds": WALL_S, "mb": 0.0}
        outside = sorted(str(path.relative_to(base)) for path in base.iterdir() if path.name != "cases")
        print(json.dumps({"name": name, **row, "outside": outside}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
