"""The built-in tools: what they answer and refuse. The processes are test_tools_pool.py's."""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfpo_megatron.plugins import PluginError
from sfpo_megatron.sandbox import interpreter, landlock, mounts, sockets
from sfpo_megatron.sandbox.isolation import Isolation, isolation
from sfpo_megatron.sandbox.waiting import ready
from sfpo_megatron.tools import ToolError
from sfpo_megatron.tools.calculator import calculator
from sfpo_megatron.tools.declared import ToolChoice
from sfpo_megatron.tools.python import MAX_OUTPUT_CHARS, python
from sfpo_megatron.tools.search import passages_of, search

# ---- calculator --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("2 * (3 + 4)", "14"),
        ("7 / 2", "3.5"),
        ("0.1 + 0.2", "0.3"),
        ("1/3 + 2/3", "1"),
        ("-2 ^ 2", "-4"),
        ("17 // 5 + 17 % 5", "5"),
        ("6 × 7 − 2 ÷ 2", "41"),
        ("sqrt(16) + sqrt(1/4)", "4.5"),
        ("2 ** -1", "0.5"),
        ("round(2.345, 2) + round(1250, -2) + round(0.6)", "1203.34"),
        ("2 ** 0.5", repr(math.sqrt(2))),
        ("factorial(20)", "2432902008176640000"),
        ("round(2.675, 2)", "2.68"),
        ("max(1, 2.5, -3)", "2.5"),
        ("floor(-1.5) + ceil(-1.5) + abs(-3)", "0"),
        ("2 ** 100", str(2**100)),
        ("cos(pi)", "-1.0"),
        ("10000000000000000.5 * 2", "20000000000000001"),  # no float has it
        ("1e400 / 1e399 + 1e-999 * 10 ** 999", "11"),
        ("10 ** -400", "1E-400"),
        ("-(10 ** 400 + 0.5)", "-1.0000000000000000E+400"),
    ],
)
def test_values(expression: str, wanted: str) -> None:
    assert calculator(expression) == wanted


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(-99, 99)), min_size=1, max_size=8))
def test_rational_arithmetic_is_exact(steps: list[tuple[str, int]]) -> None:
    text, value = "7", Fraction(7)
    for sign, number in steps:
        if sign == "/" and number == 0:
            continue
        text = f"({text}) {sign} ({number})"
        value = {
            "+": lambda a, b: a + b,
            "-": lambda a, b: a - b,
            "*": lambda a, b: a * b,
            "/": lambda a, b: a / b,
        }[sign](value, Fraction(number))
    found = calculator(text)
    assert found == (str(value) if value.denominator == 1 else repr(float(value)))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1 / 0", "division by zero"),
        ("9 ** 9 ** 9", "too large"),
        ("factorial(5000)", "a factorial of"),
        ("exp(10000)", "too large"),
        ("1e4000", "too large"),
        ("1e-4000", "too large"),
        ("1e999999999999999999999", "too large"),
        ("sqrt(-1)", "root of a negative number"),
        ("log(0)", "no value"),
        ("sqrt(1, 2)", "2 arguments"),
        ("__import__('os')", "nothing that the calculator knows"),
        ("(1).real", "nothing that the calculator knows"),
        ("'a' * 9", "nothing that the calculator knows"),
        ("True + 1", "nothing that the calculator knows"),
        ("2 +", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        ("(" * 300 + "1" + ")" * 300, "not an arithmetic expression|too deeply"),
        ("-" * 999 + "1", "too deeply|not an"),
        ("1" * 2000, "longer than"),
        ("round(1.5, 10**9)", "rounding to more than 1000 digits"),
        ("round(5, -1e308)", "rounding to more than 1000 digits"),
        ("1 + \ud83d", "not an arithmetic expression"),
    ],
)
def test_what_it_refuses(expression: str, message: str) -> None:
    began = time.thread_time()
    with pytest.raises(ToolError, match=message):
        calculator(expression)
    assert time.thread_time() - began < 5  # whoever works one out is at it for hours


# ---- search ------------------------------------------------------------------------------------


def test_search_finds_by_rare_words_first(tmp_path: Path) -> None:
    text = tmp_path / "facts.txt"
    text.write_text(
        "The cat sat on the mat.\n\n\nParis is the capital.\n\nThe zebra is the animal."
    )
    assert search("the capital", path=str(text), max_results=1) == "Paris is the capital."
    assert search("THE zebra", path=str(text)).splitlines()[0] == "The zebra is the animal."
    assert search("unicorns", path=str(text)) == "nothing found"
    with pytest.raises(ToolError, match="no word"):
        search("?!", path=str(text))


def test_search_reads_jsonl_and_names_a_bad_line(tmp_path: Path) -> None:
    rows = tmp_path / "facts.jsonl"
    rows.write_text(json.dumps({"title": "France", "text": "Paris"}) + "\n\n" + '{"text": "Bonn"}')
    assert search("france", path=str(rows)) == "France\nParis"
    assert search("bonn", path=str(rows)) == "Bonn"
    for separator in "\u2028\x85":  # which JSON need not escape
        rows = tmp_path / f"{ord(separator)}.jsonl"
        rows.write_text(f'{{"text": "one{separator}line"}}\n', encoding="utf-8")
        assert search("line", path=str(rows)) == f"one{separator}line"
    for wrong in ('{"body": "b"}', '{"text": "b'):
        bad = tmp_path / f"bad-{len(wrong)}.jsonl"
        bad.write_text('{"text": "a"}\n' + wrong)
        with pytest.raises(ValueError, match=r"jsonl line 2: found .*; write the passage as text"):
            search("a", path=str(bad))
    rows.write_bytes(b'\xef\xbb\xbf{"text": "marked"}')
    assert passages_of(rows) == ["marked"]
    rows.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=rf"{rows}: found .*, expected text in UTF-8; convert it"):
        passages_of(rows)


@pytest.mark.parametrize(
    ("tool", "chosen", "said"),
    [
        ("python", {"timeout_s": "5"}, "timeout_s: found '5', expected a number > 0"),
        ("python", {"memory_mib": 0.5}, "memory_mib: found 0.5, expected a whole number >= 1"),
        ("python", {"memory_mib": True}, "memory_mib: found True, expected a whole"),
        ("search", {"path": __file__, "max_results": 0}, "max_results: found 0, expected a whole"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_call(
    tool: str, chosen: dict[str, Any], said: str
) -> None:
    """Else the model would be told of it, in every call."""
    with pytest.raises(ValueError, match=said):
        ToolChoice(name=tool, settings=chosen).load().warm_up()


def test_a_tool_may_be_async_and_may_not_yield() -> None:
    assert ToolChoice(name="own_tools:later").load().call({"text": "a"}) == "later: a"
    with pytest.raises(PluginError, match="yields, which yields, expected a function that returns"):
        ToolChoice(name="own_tools:yields").load()


def test_the_longest_wait_that_a_config_takes_is_waited() -> None:
    """The kernel's own limit is 24 days."""
    reader, writer = os.pipe()
    os.write(writer, b"x")
    assert ready([reader], [], 1e9) == ([reader], [])
    os.close(reader)
    os.close(writer)
    assert python("6 * 7", timeout_s=1e9) == "42"


# ---- python ------------------------------------------------------------------------------------


def test_programs_and_their_output() -> None:
    assert python("import sys\nprint('a')\nprint('b', file=sys.stderr)\n6 * 7") == "a\nb\n42"
    assert python("x = 1") == ""
    failed = python("print('before')\n1 / 0")
    assert failed.startswith("before\nTraceback") and failed.endswith(
        "ZeroDivisionError: division by zero"
    )
    assert "program.py" not in failed and "1 / 0" in failed
    assert "SyntaxError" in python("1 +")
    unreadable = python("'\ud83d'")  # without the stack of what reads it
    assert unreadable.startswith("UnicodeEncodeError") and "\n" not in unreadable
    assert python("import sys\nsys.exit('no answer')") == "no answer"
    assert python("open('f', 'w').write('x'); print(open('f').read(), input())").endswith(
        "EOFError: EOF when reading a line"
    )


def test_each_program_is_by_itself() -> None:
    python("open('left', 'w').write('x')")
    assert python("import os; sorted(os.listdir('.'))") == "[]"


def test_programs_get_nothing_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "secret")
    assert "secret" not in python("import os; dict(os.environ)")


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("while True: pass", "[ended: it took longer than 0.5 s]"),
        ("print('seen')\nimport time; time.sleep(60)", "seen\n[ended: it took longer than 0.5 s]"),
        ("x = 'a' * (1 << 30)", "MemoryError"),
        ("while True: print('x' * 999)", "[more output is not shown]"),
        ("import ctypes; ctypes.string_at(0)", "[ended by signal 11]"),
        ("print('an exit code'); raise SystemExit(200)", "an exit code"),
        ("print('seen'); import sys; sys.stdout = None", "seen"),
    ],
)
def test_limits(code: str, ending: str) -> None:
    found = python(code, timeout_s=0.5)
    assert found.endswith(ending) and len(found) < MAX_OUTPUT_CHARS + 100


needs_landlock = pytest.mark.skipif(landlock.abi() < 4, reason="the kernel has no Landlock 4")


@pytest.mark.parametrize(
    ("command", "euid", "release", "how"),
    [
        (("--user", "--net", "--pid"), 1000, "5.15.0-91-generic", "rlimit"),
        (("--user", "--net", "--pid"), 0, "6.18.44-fc", "pid_max"),
        (("--net", "--pid"), 0, "6.14.0", "pid_max"),
        (("--user", "--net", "--pid"), 0, "6.8.0-40-generic", "no"),
        (("--user", "--net"), 0, "6.18.44", "no"),
        ((), 1000, "6.18.44", "no"),
    ],
)
def test_how_processes_are_counted(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], euid: int, release: str, how: str
) -> None:
    """pid_max is touched only where it is the namespace's own."""
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert Isolation(command=command, files=True, tcp=True).limits_processes == how


@pytest.mark.skipif(isolation().limits_processes == "no", reason="processes are not limited here")
def test_a_program_does_not_start_any_number_of_processes() -> None:
    code = "import os\nfor i in range(600):\n  if not os.fork(): import time; time.sleep(60)"
    assert "BlockingIOError" in python(code, timeout_s=10.0)


needs_unshare = pytest.mark.skipif(not isolation().processes, reason="unshare is not allowed here")


@needs_landlock
def test_files_of_others_cannot_be_seen(tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("42")
    for code in (
        f"open({str(tmp_path / 'answers.txt')!r}).read()",
        "open('/etc/passwd').read()",
        f"open({__file__!r}).read()",
        "open('/proc/self/environ').read()",
    ):
        assert "PermissionError" in python(code), code
    refused = "Read-only file system" if isolation().mounts else "PermissionError"
    assert refused in python(f"open({str(tmp_path / 'new')!r}, 'w')")
    assert not (tmp_path / "new").exists()


needs_mounts = pytest.mark.skipif(not isolation().mounts, reason="no mounts of one's own here")


@needs_mounts
def test_modes_and_times_of_other_files_stay(tmp_path: Path) -> None:
    """Landlock keeps their content alone; a program could lock the run out of its own files."""
    (tmp_path / "metrics").write_text("x")
    before = (tmp_path / "metrics").stat()
    for call in ("chmod({!r}, 0)", "utime({!r}, (1, 1))", "chown({!r}, 0, 0)"):
        found = python(f"import os; os.{call.format(str(tmp_path / 'metrics'))}")
        assert "Read-only file system" in found
    after = (tmp_path / "metrics").stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


MAKE_WRITABLE = """
import ctypes, os, subprocess
libc = ctypes.CDLL(None)
clear = (ctypes.c_uint64 * 4)(0, 1, 0, 0)  # MOUNT_ATTR_RDONLY
for folder in {folders}:
    for flags in (0, 0x8000):
        libc.syscall(442, -100, os.fsencode(folder), flags, clear, 32)
for way in ([], ["unshare", "--user", "--map-root-user", "--mount"]):
    for folder in {folders}:
        change = f"mount -o remount,bind,rw '{{folder}}'; chmod 777 {file!r}"
        subprocess.run([*way, "sh", "-c", change], capture_output=True)
"""


@needs_mounts
def test_a_program_that_is_root_there_cannot_make_mounts_writable_again(tmp_path: Path) -> None:
    """The call fails directly, by mount, and in a namespace inside of its own."""
    file = tmp_path / "metrics"
    file.write_text("x")
    file.chmod(0o640)
    folders = [str(folder) for folder in file.parents]
    python(MAKE_WRITABLE.format(folders=folders, file=str(file)), timeout_s=60.0)
    assert file.stat().st_mode & 0o777 == 0o640


@needs_mounts
def test_a_folder_has_a_limit() -> None:
    code = (
        "import os\nnumber = 0\ntry:\n    for number in range(999):\n"
        "        open(str(number), 'wb').write(b'x' * (1 << 20))\n"
        "except OSError as error: print(error.strerror)\nnumber"
    )
    assert python(code) == f"No space left on device\n{mounts.FOLDER_BYTES >> 20}"


def test_mounts_of_the_run_are_never_changed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no mounts of its own"):
        mounts.keep_to(str(tmp_path), outer=mounts.namespace())


@pytest.mark.skipif(not sockets.can_refuse(), reason="no seccomp, or an unknown machine")
def test_sockets_of_others_cannot_be_reached(tmp_path: Path) -> None:
    """Such as Ray's or an agent's: a path leads to them from every network namespace."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        connect = f"s.socket(s.AF_UNIX).connect({str(tmp_path / 'socket')!r})"
        for call in (connect, *(f"s.socketpair(s.AF_UNIX, s.SOCK_{k})" for k in ("DGRAM", "RAW"))):
            assert "PermissionError" in python(f"import socket as s; {call}")
    for family in ("AF_VSOCK", "AF_ALG", "AF_PACKET"):  # to a virtual machine's host, say
        assert "PermissionError" in python(f"import socket as s; s.socket(s.{family})")
    assert python("import asyncio\nasync def two(): return 2\nasyncio.run(two())") == "2"


@pytest.mark.skipif("--ipc" not in isolation().command, reason="shared memory is not apart here")
def test_no_memory_outlives_a_program() -> None:
    code = "import ctypes; print(ctypes.CDLL(None).shmget(0x5F90, 4096, 0o1600) >= 0)"
    before = Path("/proc/sysvipc/shm").read_text()
    assert python(code) == "True"
    assert Path("/proc/sysvipc/shm").read_text() == before


@pytest.mark.parametrize("name", [".output", "output", "."])
def test_no_link_is_followed_by_who_reads_the_output(tmp_path: Path, name: str) -> None:
    """The reader is not limited: by way of it a program could see what it may not."""
    (tmp_path / "answers.txt").write_text("the answer")
    code = (
        "import os, pathlib\n"
        f"for path in [*pathlib.Path().iterdir(), pathlib.Path({name!r})]:\n"
        "    try: path.unlink(missing_ok=True)\n"
        "    except OSError: continue\n"
        f"    path.symlink_to({str(tmp_path / 'answers.txt')!r})\n"
    )
    assert python(code) == ""


@needs_unshare
def test_what_a_program_starts_ends_with_it_and_sees_no_one(tmp_path: Path) -> None:
    mark = f"60.{os.getpid()}"
    code = f"import os\nif os.fork() == 0:\n  os.setsid(); os.execvp('sleep', ['sleep', '{mark}'])"
    assert python(f"{code}\nprint(os.getpid())") == "1"
    pids = filter(str.isdigit, os.listdir("/proc"))
    assert not [pid for pid in pids if mark.encode() in _command(pid)]
    send = "import socket as s; s.socket(s.AF_INET, s.SOCK_DGRAM).sendto(b'', ('1.1.1.1', 9))"
    assert "Network is unreachable" in python(send)


def _command(pid: str) -> bytes:
    try:
        return Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return b""


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """And programs run all the same where nothing can be unshared."""
    bare = Isolation(command=(), files=False, tcp=False)
    kept = [
        "modes and times of this user's files, and filling the disk",
        *("Unix sockets of this user", "shared memory that outlives it"),
        *("the list of processes", "starting any number of processes"),
    ]
    assert bare.missing == ["the network", "files of this user", *kept]
    assert Isolation(command=("unshare", "--net"), files=True, tcp=True).missing == kept
    more = Isolation(command=("--net", "--ipc", "--mount"), files=True, tcp=True, sockets=True)
    assert more.missing == kept[-2:]
    monkeypatch.setattr(interpreter, "isolation", lambda: bare)
    assert python("6 * 7") == "42"
