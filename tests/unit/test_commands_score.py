"""`sfpo-megatron score`: verdicts line by line, exit codes, what goes where, own rewards, memory.

Not exercised: stdin that comes slowly.
"""

from __future__ import annotations

import gzip
import importlib
import inspect
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made.servers import free_port, send, serving
from own_rewards import problem

from sfpo_megatron import cli
from sfpo_megatron.config import reward
from sfpo_megatron.plugins import REWARD

Run = Callable[..., tuple[int, list[str], str]]

ROWS = [
    {"response": "so .5", "answer": "0.50"},
    {"response": r"\boxed{3}", "answer": 4},
    {"response": "<think>3", "answer": "3"},
    {"response": "<think>2</think>3", "answer": "3", "question": "?", "level": [1, None]},
    {"response": "", "answer": "3"},
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(lines, *options)`: exit code, lines of stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def call(lines: list[Any], *options: str) -> tuple[int, list[str], str]:
        texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        Path("r.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        code = cli.main(["score", "r.jsonl", "--workers", "1", "--timeout-s", "20", *options])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def rewards(lines: list[str]) -> list[float]:
    return [json.loads(line)["reward"] for line in lines]


# ---- verdicts -----------------------------------------------------------------------------------


def test_a_terminal_without_the_letters_gets_their_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, written = tmp_path / "r.jsonl", io.BytesIO()
    file.write_text(json.dumps({"response": "\\boxed{é \ud800}", "answer": "é"}))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    words = ["score", str(file), "--reward", "math", "--explain", "--workers", "1"]
    assert cli.main(words) == 0
    sys.stdout.flush()
    assert b"\\xe9" in written.getvalue() and b"1 responses: " in written.getvalue()


def test_json_is_all_there_is_on_stdout_in_the_order_of_the_file(run: Run) -> None:
    code, out, err = run(ROWS, "--reward", "last_number", "--json")
    assert code == 0
    said = [json.loads(line) for line in out]
    assert [one["line"] for one in said] == [1, 2, 3, 4, 5]
    assert [one["reward"] for one in said] == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert [one["correct"] for one in said] == [True, False, False, True, False]
    assert "5 responses: reward_mean 0.4000, correct 2 (40.00%), timed out 0, bad lines 0" in err


def test_a_line_for_a_person_has_verdict_answer_and_reference(run: Run) -> None:
    code, out, _ = run(ROWS, "--reward", "last_number")
    assert code == 0
    assert out[0] == 'r.jsonl:1\t1\tfound "0.5"\treference "0.50"'
    assert out[4] == 'r.jsonl:5\t0\tfound no answer\treference "3"'
    assert out[5].startswith("5 responses: reward_mean 0.4000")
    halves = {"response": r"\boxed{0.5}", "answer": r"\frac12"}
    _, out, _ = run([halves], "--reward", "math", "--explain")
    assert out[0] == 'r.jsonl:1\t1\tfound "0.5" read as "1/2"\treference "\\\\frac12" read as "1/2"'


@pytest.mark.parametrize(
    ("reward", "response", "answer", "found", "reference"),
    [
        ("math", r"\boxed{(1, 2]}", "1 < x \\le 2", ["(1, 2]"], ["x = (1, 2]"]),
        ("math", r"\boxed{x=5 cm}", "5 cm", ["x = 5 centimeter"], ["5 centimeter"]),
        ("math", r"\boxed{9^{9^{9^{9^{9^{9}}}}}}", "7", ["not read: a tower of powers"], ["7"]),
        ("math_boxed", r"\boxed{50\%}", "1/2", ["50%"], ["1/2"]),
        ("last_number", "it is 1,234.0", "1234", [], ["1234"]),
        ("multiple_choice", "answer is (E)", "E. 42", [], ["choice E (42)"]),
        ("tagged_answer", "<answer>1/2</answer>", "0.5", ["1/2"], ["1/2"]),
        ("exact_match", " x ", "x", [], []),
        ("format", r"\boxed{1}", "", [], []),
    ],
)
def test_explanations(
    reward: str, response: str, answer: str, found: list[str], reference: list[str]
) -> None:
    module = importlib.import_module(f"sfpo_megatron.rewards.{reward}")
    explained = module.explain(response, problem(answer))
    assert explained["found"] and module.explain("", problem(answer))["found"] in (None, "")
    for want, said in ((found, explained["read"]), (reference, explained["reference_read"])):
        assert not want or want[0] in said


def test_every_built_in_reward_explains() -> None:
    for name in REWARD.built_in:
        module = importlib.import_module(f"sfpo_megatron.rewards.{name}")
        assert parameters(module.explain) == parameters(module.score)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("strip", [1, 0, 0, 1, 0]), ("require_closed", [0, 0, 0, 1, 0]), ("ignore", [1, 0, 1, 1, 0])],
)
def test_thinking(run: Run, mode: str, expected: list[float]) -> None:
    _, out, _ = run(ROWS, "--reward", "last_number", "--json", "--thinking", mode)
    assert rewards(out) == expected


def test_a_weighted_sum(run: Run) -> None:
    choice = "[{name: last_number}, {name: format, weight: 0.1}]"
    code, out, err = run(ROWS[:2], "--reward", choice, "--json")
    assert code == 0 and json.loads(out[1]) == {
        "line": 2, "reward": 0.1, "correct": False, "timed_out": False,
        "parts": {"last_number": 0.0, "format": 1.0},
    }  # fmt: skip
    assert "reward/last_number 0.5000, reward/format 0.5000" in err


def test_a_reward_of_ones_own_gets_the_row(run: Run) -> None:
    Path("mine.py").write_text(
        "def score(response, prompt):\n"
        "    print('to the log')\n"
        "    given = prompt.id, prompt.question, prompt.answer, prompt.metadata\n"
        "    right = given == ('r.jsonl:1', '?', '3', {'level': [1, None]})\n"
        "    return {'reward': right, 'length': len(response)}\n"
    )
    code, out, err = run(ROWS[3:4], "--reward", "mine:score", "--json")
    assert code == 0 and json.loads(out[0])["reward"] == 1.0
    assert json.loads(out[0])["parts"] == {"length": 17.0}
    assert "reward/length 17.0000" in err and len(out) == 1


def test_a_server(run: Run) -> None:
    with serving() as server:
        code, out, _ = run(
            [{"response": "3", "answer": "3"}, {"response": "4"}],
            *("--reward", "http", "--url", server.url, "--json"),
        )
    assert code == 0 and rewards(out) == [1.0, 0.0]
    asked = sorted(prompt["id"] for asked in server.asked for prompt in asked["prompts"])
    assert asked == ["r.jsonl:1", "r.jsonl:2"]


# ---- what is wrong ------------------------------------------------------------------------------


BAD = [
    ("not json", "'not json' (Expecting value"),
    ("[1]", "found [1] (list)"),
    ('{"answer": "3"}', "no field 'response' (fields: answer)"),
    ('{"response": "3"}', "no field 'answer' (fields: response)"),
    ('{"response": 3, "answer": "3"}', "response = 3 (int)"),
    ('{"response": null, "answer": "3"}', "response = None"),
    ('{"response": "3", "answer": null}', "answer = None"),
    ('{"response": "3", "answer": " "}', "answer = ' ' (str)"),
    ('{"response": "3", "answer": NaN}', "answer = nan"),
    ('{"response": "3", "answer": 1e999}', "answer = Decimal('1E+999')"),
    ('{"response": "3", "answer": 1e99999999999999999999}', "an exponent that no number has"),
    ('{"response": "3", "response": "4", "answer": "4"}', "two keys named 'response'"),
    ('{"response": "3", "answer": true}', "answer = True"),
    ('{"response": "3", "answer": ["3"]}', "answer = ['3']"),
    ('{"response": "3", "answer": "3", "question": 1}', "question = 1"),
    ("[" * 100_000, "recursion"),
    ('{"response": "3", "answer": "none"}', "reference answer 'none' too"),
]


def test_a_bad_line_is_named_and_the_others_are_scored(run: Run) -> None:
    good = {"response": "so 3", "answer": "3"}
    lines = [text for line, _ in BAD for text in (line, good, "")]
    code, out, err = run(lines, "--reward", "last_number", "--json")
    assert code == 2 and rewards(out) == [1.0] * len(BAD)
    assert [json.loads(one)["line"] for one in out] == [3 * i + 2 for i in range(len(BAD))]
    named = [text for text in err.splitlines() if text.startswith("r.jsonl:")]
    for i, (text, (_, found)) in enumerate(zip(named, BAD, strict=True)):
        assert text.startswith(f"r.jsonl:{3 * i + 1}: ") and found in text, text
    assert f"bad lines {len(BAD)}" in err


def test_numbers_as_references_are_their_digits(run: Run) -> None:
    """All of them, as a run's rows have them; a float would end after 17. So have the numbers
    beside them, which go to the scoring process."""
    long = "0.12345678901234567890123"
    rows = [
        '{"response": "0.0000001", "answer": 1e-7}',
        '{"response": "4", "answer": 4.0}',
        f'{{"response": "{long}", "answer": {long}, "level": {long}}}',
    ]
    _, out, _ = run(rows, "--reward", "exact_match", "--json")
    assert rewards(out) == [1.0, 1.0, 1.0]


def test_a_line_that_is_no_text_and_a_byte_order_mark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = b'\xef\xbb\xbf{"response": "3", "answer": "3"}\r\n{"response": "\xff", "answer": "3"}\n'
    file = tmp_path / "bytes.jsonl"
    file.write_bytes(text)
    options = ("--reward", "exact_match", "--workers", "1", "--json")
    assert cli.main(["score", str(file), *options]) == 2
    out, err = capsys.readouterr()
    assert rewards(out.splitlines()) == [1.0] and f"{file}:2: found " in err


def test_many_bad_lines_are_counted(run: Run) -> None:
    code, out, err = run(["x"] * 50, "--reward", "exact_match", "--json")
    assert code == 2 and not out and "bad lines 50" in err
    assert sum("r.jsonl:" in line for line in err.splitlines()) == 20


@pytest.mark.parametrize(
    ("options", "code", "found"),
    [
        (("--reward", "maths"), 2, "found 'maths', expected one of reasoning_gym, exact_match"),
        (("--reward", "[{name: math}, {nam: x}]"), 2, "unknown key"),
        (("--reward", "[{name: math"), 2, "error: "),
        (("--reward", "[]"), 2, "at least one function"),
        (("--reward", "[{name: math}, {name: math}]"), 2, "each function once"),
        (("--reward", "math", "--thinking", "no"), 2, "require_closed"),
        (("--reward", "math", "--timeout-s", "0"), 2, "timeout_s"),
        (("--reward", "math", "--timeout-s", "1e10"), 2, "expected at most 1e+09 seconds"),
        (("--reward", "math", "--workers", "0"), 2, "num_workers"),
        (("--reward", "math", "--workers", "99999"), 2, "expected a number in [1, 1024]"),
        (("--reward", "math", "--batched"), 2, "batched"),
        (("--reward", "nowhere:score"), 2, "nowhere does not import"),
        (("--reward", "http"), 2, "reward.http.url: found null"),
        (("--reward", "http", "--url", "x"), 2, "url"),
    ],
)
def test_options_that_cannot_be(run: Run, options: tuple[str, ...], code: int, found: str) -> None:
    given, out, err = run(ROWS, *options)
    assert given == code and not out
    assert found in err and err.startswith("error: ")


@pytest.mark.parametrize(("name", "found"), [("none.jsonl", "No such file"), (".", "a directory")])
def test_no_file(name: str, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", name, "--reward", "exact_match"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {name}: found {found}")


def test_an_empty_file(run: Run) -> None:
    code, out, err = run(["", ""], "--reward", "exact_match", "--json")
    assert code == 2 and not out and "r.jsonl: found no line" in err


def test_a_server_that_breaks_is_an_error_of_the_command(run: Run) -> None:
    with serving(otherwise=lambda handler, asked: send(handler, b"[]")) as server:
        code, out, err = run(ROWS, "--reward", "http", "--url", server.url, "--json")
    assert code == 1 and not out and f"error: reward.http.url: {server.url}" in err


# ---- where it comes from and goes to ------------------------------------------------------------


def test_stdin(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = '{"response": "3", "answer": "3"}\nx\n'
    stdin = io.BufferedReader(io.BytesIO(text.encode()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
    code = cli.main(["score", "-", "--reward", "exact_match", "--workers", "1", "--json"])
    out, err = capsys.readouterr()
    assert code == 2 and rewards(out.splitlines()) == [1.0] and "stdin:2: " in err


def test_a_packed_file_and_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, text = tmp_path / "r", b'{"response": "3", "answer": "3", "question": null}\n'
    packed = gzip.compress(text * 3000)
    for content, code, found in (
        (packed, 0, "bad lines 0"),
        (packed[:-10], 2, f"error: {file}: found Compressed file ended"),
        (b"PAR1" + text, 2, f"error: {file}: found a parquet file"),
        (text.decode().encode("utf-16"), 2, f"error: {file}: found text in UTF-16"),
    ):
        file.write_bytes(content)
        command = ["score", str(file), "--reward", "exact_match", "--workers", "1", "--json"]
        assert cli.main(command) == code
        out, err = capsys.readouterr()
        assert found in err and (code or rewards(out.splitlines()) == [1.0] * 3000)


_MEASURED = r"""
import re, sys
from sfpo_megatron import cli
def peak_kb():
    return int(re.search(r"VmHWM:\s*([0-9]+)", open("/proc/self/status").read())[1])
before = peak_kb()
code = cli.main(sys.argv[1:])
assert "torch" not in sys.modules and "numpy" not in sys.modules
print(peak_kb() - before, file=sys.stderr)
sys.exit(code)
"""


def test_a_long_file_is_not_held_in_memory(tmp_path: Path) -> None:
    """40 MB of responses would show."""
    response = "x" * 5000
    with (tmp_path / "long.jsonl").open("w") as file:
        for i in range(8000):
            file.write(json.dumps({"response": response, "answer": "x" if i % 2 else response}))
            file.write("\n")
    command = [sys.executable, "-c", _MEASURED, "score", "long.jsonl", "--json"]
    done = subprocess.run(
        [*command, "--reward", "exact_match", "--workers", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert rewards(lines) == [1.0, 0.0] * 4000
    assert int(done.stderr.split()[-1]) < 36_000


def test_whoever_reads_may_stop_reading(tmp_path: Path) -> None:
    row = json.dumps({"response": "3", "answer": "3"})
    (tmp_path / "r.jsonl").write_text(f"{row}\n" * 6000)
    command = f"{sys.executable} -m sfpo_megatron score r.jsonl --reward exact_match --json"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    first, code = done.stdout.splitlines()
    assert json.loads(first)["reward"] == 1 and code == "0" and "Traceback" not in done.stderr


def test_an_address_where_nothing_listens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "LONGEST_PAUSE_S", 0.0)
    code, out, err = run(
        ROWS, "--reward", "http", "--url", f"http://127.0.0.1:{free_port()}/", "--json"
    )
    assert code == 1 and not out and "ConnectionRefusedError" in err
