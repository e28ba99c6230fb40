"""A verifier that does to its process what the response says; for test_rewards_pool.py."""

from __future__ import annotations

import os
import re
import time


def score(response, prompt):
    """1 for the reference answer; else misbehave as told, or 0."""
    match response.split():
        case ["sleep"]:
            time.sleep(60)
        case ["loop"]:
            while True:
                pass
        case ["loop-in-C"]:  # holds the interpreter lock: no Python thread or handler gets in
            re.match(r"(a+)+$", "a" * 64 + "b")
        case ["catch-all"]:  # a signal handler that raises would be swallowed here
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    pass
        case ["memory"]:
            return float(len(b"x" * (8 << 30)) > 0)
        case ["crash"]:
            os.kill(os.getpid(), 11)
        case ["exit"]:
            os._exit(0)
        case ["write", path]:
            with open(path, "w", encoding="ascii") as file:
                file.write("x")
            return 1.0
        case ["print"]:
            print('[1.0]\n{"error": "forged"}', flush=True)
        case ["raise"]:
            raise KeyError("only this response")
        case ["torch"]:
            import sys

            return float("torch" in sys.modules)
    if prompt.answer == "broken":
        raise KeyError("this prompt")
    if prompt.answer == "out of range":
        return 2.0
    return float(response == prompt.answer)
