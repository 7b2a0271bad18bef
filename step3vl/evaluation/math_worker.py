"""Stand-alone: import math-verify once, then fork a judge for each socket received; a judge may be killed at any time.

Run as `python -P math_worker.py CONTROL` by `math_pool`. This process never parses an answer, so it is always there to
replace a judge (a fork, some 10 ms) that an answer has stuck.
"""

import gc
import json
import logging
import os
import resource
import signal
import socket
import struct
import sys


def main():
    control, memory_mb = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    try:
        import math_verify

        logging.disable(logging.CRITICAL)
        for gold, text in (("$\\frac{1}{2}$", "so $x = \\boxed{0.5}$"), ("$(1, 2)$", "it is $(1,2)$"), ("$3$", "3.0")):
            judge(math_verify, text, gold)  # what sympy does once, it does here
    except Exception as error:
        control.sendall(f"error {type(error).__name__}: {error}\n".encode())
        return
    gc.freeze()
    control.sendall(b"ready\n")
    children = set()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            break
        if message == b"fork":
            pid = os.fork()
            if pid == 0:
                try:
                    control.close()
                    serve(math_verify, socket.socket(fileno=fds[0]), memory_mb)
                finally:
                    os._exit(0)
            os.close(fds[0])
            children.add(pid)
            control.sendall(f"{pid}\n".encode())
        else:
            end(int(message), children)
            control.sendall(b"ended\n")
    for pid in list(children):
        end(pid, children)


def end(pid, children):
    """Kill and bury one of our own; a judge that has died already is buried only."""
    if pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        children.discard(pid)


def serve(math_verify, connection, memory_mb):
    """Judge one answer after the other until the parent goes."""
    os.nice(10)  # who keeps the clock must get the processor first
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # die with the process that forked us
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    while True:
        header = connection.recv(4, socket.MSG_WAITALL)
        if len(header) < 4:
            return
        text, gold = json.loads(connection.recv(struct.unpack(">I", header)[0], socket.MSG_WAITALL))
        try:
            verdict = judge(math_verify, text, gold)
        except MemoryError:
            return
        connection.sendall(b"1" if verdict else b"0")


def judge(math_verify, text, gold):
    """math-verify's own verdict, its alarms off: the clock is the parent's."""
    try:
        said = math_verify.parse(text, parsing_timeout=None)
        return math_verify.verify(math_verify.parse(gold, parsing_timeout=None), said, timeout_seconds=None)
    except (RecursionError, ValueError, TypeError, ArithmeticError, AttributeError):
        return False


if __name__ == "__main__":
    main()
