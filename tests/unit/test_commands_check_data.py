"""`check --data`: every figure that it prints, against counts and lengths made here from the rows.

The tokenizer is a real one of transformers, trained on the spot. Not exercised: data sets on the
hub, a run's own first line (tests/e2e/test_cli_run.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made.configs import write_run

from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config

GOOD = [{"prompt": f"What is {n} + {n}?" + " Say." * (n % 7), "answer": 2 * n} for n in range(50)]
LIMIT = 48
BAD = {
    "not JSON": ['{"prompt": "1 +', "[1"],
    "without answer": ['{"prompt": "1 + 1 =", "answer": null}'],
    "too long": [json.dumps({"prompt": "1 + " * n, "answer": "4"}) for n in (100, 200, 300)],
    "with a reference that last_number cannot read": ['{"prompt": "Who?", "answer": "none"}'],
}


@pytest.fixture
def here(
    tmp_path: Path, model_dir: Callable[..., Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working directory whose model/ has the tokenizer."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained(model_dir(vocab_size=512))
    return tmp_path


def opened() -> Any:
    """What opens a run's data, on rank 0 of `train run.yaml`."""
    from sfpo_megatron.run.same_data import read_data

    return read_data(load_config("run.yaml", []), None)


def jsonl(name: str, rows: list[Any]) -> dict[str, str]:
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(f"{name}.jsonl").write_text("".join(f"{text}\n" for text in texts))
    return {"source": "jsonl", "path": f"{name}.jsonl"}


def parquet(name: str, rows: list[Any]) -> dict[str, str]:
    import pyarrow
    import pyarrow.parquet

    good = [row for row in rows if isinstance(row, dict)]
    columns = {key: [str(row[key]) for row in good] for key in ("prompt", "answer")}
    pyarrow.parquet.write_table(pyarrow.table(columns), f"{name}.parquet")
    return {"source": "parquet", "path": f"{name}.parquet"}


def run_of(*train: dict[str, Any], held_out: tuple[dict[str, Any], ...] = (), **data: Any) -> None:
    write_run(
        data={"train": train, "eval": held_out, **data},
        reward={"function": "last_number"},
        rollout={"max_prompt_tokens": LIMIT},
        train={"prompts_per_step": 4},
    )


def shown(capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, Any]:
    """The object that `check --data --json` prints."""
    assert cli.main(["check", "run.yaml", "--data", "--json", *options]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def percentiles(lengths: list[int]) -> dict[str, int]:
    """By counting: the least length that at least p of 100 prompts do not exceed."""

    def at(p: int) -> int:
        enough = (
            x for x in sorted(lengths) if 100 * sum(y <= x for y in lengths) >= p * len(lengths)
        )
        return next(enough)

    return {**{f"p{p}": at(p) for p in (50, 90, 99)}, "max": max(lengths)}


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_the_figures_of_a_file(
    here: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str], write: Any
) -> None:
    """Fifty problems, of which three are held out, and four more rows repeat; bad ones in jsonl."""
    bad = [text for texts in BAD.values() for text in texts] if write is jsonl else []
    rows = [*bad, *GOOD, *GOOD[10:14]]
    run_of(write("mine", rows), held_out=(jsonl("test", GOOD[:3]),), on_bad_row="skip")
    (train,) = shown(capsys)["train"]
    assert (train["name"], train["rows"]) == ("mine", len(rows))
    assert (train["kept"], train["repeated"], train["held_out"]) == (47, 4, 3)
    assert train["bad"] == ({kind: len(texts) for kind, texts in BAD.items()} if bad else {})
    texts = [row["prompt"] for row in GOOD[3:]]
    texts += [json.loads(text)["prompt"] for text in BAD["too long"]] if bad else []
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert train["tokens"] == percentiles(lengths)


def test_the_figures_of_a_generator_and_of_held_out_rows(
    here: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Problems that are drawn twice stay; a held-out row that repeats is asked again."""
    args = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    source = {"source": "reasoning_gym", "task": "chain_sum", "args": args, "size": 300}
    run_of(source, held_out=(jsonl("test", [*GOOD[:5], GOOD[0], "{"]),), on_bad_row="skip")
    found = shown(capsys, "rollout.max_prompt_tokens=64")
    (train,), (held_out,) = found["train"], found["eval"]
    assert (train["name"], train["rows"], train["kept"]) == ("chain_sum", 300, 300)
    assert train["repeated"] == train["held_out"] == 0 and train["bad"] == {}
    assert (held_out["name"], held_out["rows"], held_out["kept"]) == ("eval.test", 7, 6)
    assert held_out["bad"] == {"not JSON": 1}
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in [*GOOD[:5], GOOD[0]]]
    assert held_out["tokens"] == percentiles(lengths)


def test_the_first_prompt_as_the_engine_and_the_reward_get_it(
    here: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rendered by the chat template, in tokens, and the reference as each reward reads it."""
    Path("model/chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{% endfor %}[bot]"
    )
    rows = [{"prompt": "Half of one?", "answer": r"\boxed{\frac{2}{4}}"}, *GOOD[::7]]
    both = [{"name": "math"}, {"name": "format", "weight": 0.1}]
    mine = {**jsonl("mine", rows), "reward": both}
    Path("mine_too.py").write_text("def score(response, prompt):\n    return 0.5\n")
    own = {
        **jsonl("own", [{"prompt": "Name a number.", "answer": "any"}]),
        "reward": "mine_too:score",
    }
    long = "rollout.max_prompt_tokens=64"
    run_of(mine, own, chat_template=True, system_prompt="Be brief.", prompt_suffix=" Think.")
    first, second = (one["first"] for one in shown(capsys, long)["train"])
    assert (first["id"], first["where"]) == ("mine/1", "mine.jsonl:1")
    assert first["text"] == "[system]\nBe brief.[user]\nHalf of one? Think.[bot]"
    assert first["token_ids"] == tokenizer(first["text"], add_special_tokens=False)["input_ids"]
    assert first["reference"] == r"\boxed{\frac{2}{4}}"
    assert first["reference_read"] == {"math": ["1/2"], "format": ["any one answer"]}
    assert second["reference"] == "any" and second["reference_read"] == {}
    assert cli.main(["check", "run.yaml", "--data", long]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("mine/1, the first of its source (mine.jsonl:1):")
    assert lines[at + 1 : at + 5] == [
        "    | [system]",
        "    | Be brief.[user]",
        "    | Half of one? Think.[bot]",
        f"    {len(first['token_ids'])} token ids: {' '.join(map(str, first['token_ids']))}",
    ]
    assert lines[at + 5].endswith("; math reads 1/2; format reads any one answer")


def test_a_person_reads_the_same_figures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [text for texts in BAD.values() for text in texts]
    source = jsonl("mine", [*bad, *GOOD, GOOD[9]])
    run_of(source, held_out=(jsonl("test", GOOD[:3]),), on_bad_row="skip")
    found = shown(capsys)
    assert cli.main(["check", "run.yaml", "--data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokens = [str(one) for one in found["train"][0]["tokens"].values()]
    assert lines[1].split() == ["mine", "58", "47", "1", "3", "7", *tokens]
    assert lines[2].split()[:6] == ["eval.test", "3", "3", "0", "0", "0"]
    assert (
        "bad rows of mine: 3 too long, 2 not JSON, 1 without answer, 1 with a reference that "
        "last_number cannot read" in lines
    )
    assert lines[-1] == found["summary"]


def test_what_a_run_counts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By what opens a run, on the same rows."""
    bad = [text for texts in BAD.values() for text in texts]
    sources = (jsonl("mine", [*bad, *GOOD, GOOD[9]]), jsonl("more", GOOD))
    run_of(*sources, held_out=(jsonl("test", [*GOOD[:3], "{"]),), on_bad_row="skip")
    found = shown(capsys)
    data = opened()
    assert found["summary"] == data.summary
    assert "1 bad rows left out" in data.summary and "48 rows repeated" in data.summary
    assert sum(one["kept"] for one in found["train"]) == len(data.prompts.prompts) == 47
    assert found["train"][0]["first"]["token_ids"] == list(data.prompts.prompts[0].token_ids)
    assert sum(one["kept"] for one in found["eval"]) == len(data.held_out)


def test_bad_rows_are_the_report_that_training_gives(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures are printed, and the exit code is that of a wrong config."""
    bad = [text for texts in BAD.values() for text in texts] + ["{"] * 15
    run_of(jsonl("mine", [*GOOD, *bad]), held_out=(jsonl("test", [GOOD[0], "{"]),))
    assert cli.main(["check", "run.yaml", "--data", "--json"]) == 2
    printed = capsys.readouterr()
    with pytest.raises(ValueError) as caught:
        opened()
    found, report = json.loads(printed.out), str(caught.value)
    assert f"error: {report}\n" in printed.err and found["error"] == report
    lines = report.splitlines()
    assert len(lines) == 21 and lines[0].startswith('mine.jsonl:51: found \'{"prompt": "1 +\'')
    assert lines[-1].startswith("23 bad rows (18 not JSON, 3 too long, 1 without answer, ")
    assert found["train"][0]["bad"]["not JSON"] == 17 and found["eval"][0]["bad"]["not JSON"] == 1


def test_fewer_prompts_than_a_step_draws(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four of five rows repeat: only reading tells."""
    run_of(jsonl("mine", [GOOD[0]] * 5))
    error = shown(capsys, code=2)["error"]
    assert "found 1 prompts, expected at least one batch of 4 different ones" in error


def test_what_cannot_be_read_at_all(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(jsonl("mine", ["{]"] * 30))
    assert cli.main(["check", "run.yaml", "--data", "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "30 bad rows (30 not JSON)" in printed.err
    assert "begins a new run" not in printed.err, "no run begins"


def test_json_is_for_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(jsonl("mine", GOOD))
    assert cli.main(["check", "run.yaml", "--json"]) == 2
    assert "--json: found no --data beside it" in capsys.readouterr().err


def test_it_needs_no_torch_and_stdout_is_its_own(here: Path) -> None:
    """On a login node without torch, and with a source that prints while it is read."""
    Path("talking.py").write_text(
        "def rows(source, seed):\n"
        "    print('reading')\n"
        "    return [{'prompt': f'{n} + 1 =', 'answer': n + 1} for n in range(9)]\n"
    )
    run_of({"source": "talking:rows"})
    script = (
        "import runpy, sys\n"
        "from importlib.machinery import PathFinder\n"
        "class WithoutTorch(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, *rest):\n"
        "        return None if name == 'torch' else super().find_spec(name, *rest)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch\n"
        "sys.argv = ['sfpo-megatron', 'check', 'run.yaml', '--data', '--json']\n"
        "try:\n    runpy.run_module('sfpo_megatron', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(*(n for n in ('vllm', 'ray', 'megatron') if n in sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"][0]["kept"] == 9
    assert done.stderr.splitlines()[-1] == "" and "reading" in done.stderr
