"""A reward function that does to its process what the response says; for test_rewards_pool.py."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

HOME = os.getcwd()


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
        case ["write", size, path]:
            return float(Path(path).write_bytes(bytes(int(size))) == int(size))
        case ["print"]:
            print('[1.0]\n{"error": "forged"}', flush=True)
        case ["raise"]:
            raise KeyError("only this response")
        case ["start-children", path]:  # one by exec, one by fork
            sleeper = subprocess.Popen(["sleep", "600"])
            forked = os.fork()
            if not forked:
                time.sleep(600)
            Path(path).write_text(f"{sleeper.pid} {forked}")
        case ["start-stubborn-child", path]:
            forked = os.fork()
            if not forked:
                signal.signal(signal.SIGIO, signal.SIG_IGN)
                Path(path).write_text(str(os.getpid()))
                time.sleep(600)
            while not Path(path).is_file() or not Path(path).read_text():
                time.sleep(0.01)
        case ["sleep", "deaf"]:  # to every signal that one can be deaf to
            for signum in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(signum, signal.SIG_IGN)
            time.sleep(600)
        case ["sleep", "blocked"]:
            signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
            time.sleep(600)
        case ["sleep", "cut-off"]:
            os.close(int(sys.argv[2]))  # the pipe whose other end the parent holds
            time.sleep(600)
        case ["sleep", "elsewhere"]:  # in another group than the one that is signalled
            os.setpgid(0, os.getpgid(os.getppid()))
            os.close(int(sys.argv[2]))  # the pipe whose other end the parent holds
            time.sleep(600)
        case ["torch"]:
            return float("torch" in sys.modules)
        case ["tidy"]:
            return float(is_tidy())
        case [what]:
            leave_behind(what)
    if prompt.answer == "broken":
        raise KeyError("this prompt")
    if prompt.answer == "out of range":
        return 2.0
    return float(response == prompt.answer)


def leave_behind(what):
    """Change what the next response would find."""
    match what:
        case "close-descriptors":
            for descriptor in (0, 1, 2):
                os.close(descriptor)
        case "close-all":
            os.closerange(0, 256)
        case "close-streams":
            sys.stdout.close()
            sys.stderr.close()
        case "detach-stream":
            sys.stdout.detach()
        case "replace-streams":
            sys.stdout = sys.stderr = io.StringIO()
        case "change-directory":
            os.chdir("/")
        case "handlers":
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        case "alarm":
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        case "read-requests":
            sys.stdin.read()
            try:
                input()
            except EOFError:
                pass
        case "fork-and-return":
            if not os.fork():
                raise SystemExit("the child's own business")
            os.wait()
        case "thread":
            threading.Thread(target=lambda: [print("late"), sys.exit(3)]).start()
        case "surrogate":
            print("\ud800", file=sys.stderr)


def is_tidy():
    time.sleep(0.2)  # an alarm would come meanwhile
    print("a line")
    os.write(1, b"descriptor 1\n")
    os.write(2, b"descriptor 2\n")
    handlers = signal.getsignal(signal.SIGIO), signal.getsignal(signal.SIGINT)
    return os.getcwd() == HOME and handlers == (signal.SIG_DFL, signal.SIG_IGN)
