"""YAML's traps: what a value became, its line, and what to write; in files and in overrides.

Not exercised: other YAML parsers than PyYAML's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfpo_megatron.config.load import ConfigError, dump_config, load_config
from sfpo_megatron.config.tree import RunConfig

BASE = """\
output_dir: runs/test
model: {path: some/model}
data: {train: [{source: reasoning_gym, task: chain_sum, size: 100}]}
"""
YES = "which YAML makes of"


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, list(overrides))


def refusal(tmp_path: Path, text: str | bytes, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    return caught.value


VALUES = {  # `key: value` -> part of what was found, part of the fix; all refused at that key
    # truth values
    "checkpoint.resume: yes": (f"True, {YES} yes", "write auto, never or a directory"),
    "checkpoint.resume: no": (f"False, {YES} no", "write auto, never or a directory"),
    "sfpo.trigger: off": (f"False, {YES} off", "use one of these"),
    "sfpo.moments: on": (f"True, {YES} on", "use one of these"),
    "output_dir: y e s: 1": ("mapping values are not allowed", "quote a value with ': '"),
    "reward.function: Yes": (f"True, {YES} Yes", "write it in quotes: function: 'Yes'"),
    "sfpo.latch: 'true'": ("'true' (str)", "write true or false, without quotes"),
    "sfpo.latch: 1": ("1 (int)", "write true or false"),
    "sfpo.stop_step: no": (f"False, {YES} no", "correct the value"),
    # numbers
    "train.group_size: 010": (f"8, {YES} 010 (octal)", "write 10, or 8 if octal was meant"),
    "seed: -017": (f"-15, {YES} -017 (octal)", "write -17, or -15"),
    "train.num_steps: 08": ("'08' (str)", "write 8"),
    "train.num_steps: 1:30": (f"90, {YES} 1:30", "write 90"),
    "train.control_timeout_s: 1:30:00": (f"5400, {YES} 1:30:00", "write 5400"),
    "train.optimizer.lr: 1:30.5": (f"90.5, {YES} 1:30.5", "write 90.5"),
    "train.num_steps: 1e3": ("'1e3' (str)", "write 1000"),
    "refit.bucket_bytes: 1.0e+9": (f"1000000000.0 (float), {YES}", "write 1000000000"),
    "train.num_steps: '5'": ("'5' (str)", "write 5"),
    "train.optimizer.lr: .nan": ("nan (float)", "correct the value"),
    "train.optimizer.lr: -.inf": ("-inf (float)", "correct the value"),
    "train.optimizer.lr: 1e999": ("'1e999'", "correct the value"),
    "seed: 99999999999999999999": ("99999999999999999999 (int)", "write a smaller one"),
    f"seed: {'9' * 5000}": ("cannot read as a number", "correct it"),
    f"train.optimizer.lr: {'9' * 400}": ("999", "write a smaller one"),
    "megatron.optimizer.a: 010": (f"8, {YES} 010 (octal)", "write 10, or 8"),
    "rollout.engine_args.a.b: [1, 1:30]": (f"90, {YES} 1:30", "write 90"),
    # texts
    "output_dir: 123": ("123 (int)", "write it in quotes: output_dir: '123'"),
    "output_dir: 010": (f"8 (int), {YES} 010", "write it in quotes: output_dir: '010'"),
    "output_dir: 2026-11-29": (f"a date, {YES} 2026-11-29", "output_dir: '2026-11-29'"),
    "output_dir: 2026-13-45": ("2026-13-45, which YAML cannot read as a date", "in quotes"),
    "objective.loss_args.day: 2026-11-29": ("a date", "day: '2026-11-29'"),
    "output_dir: ~": ("null", "~ alone is null in YAML, ~/ is your home directory"),
    "output_dir: null": ("null", "give output_dir a value"),
    "output_dir:": ("null", "give output_dir a value"),
    "output_dir: #r": ("null", "before the #, which begins a comment"),
    "output_dir: [a]": ("['a']", "write one text"),
    "output_dir: {{ dir }}": ("brackets in the place of a key", "in quotes"),
    "output_dir: @r": ("'@'", "quote a value that begins with this character"),
    "output_dir: %r": ("'%'", "quote a value that begins with this character"),
    "output_dir: *r": ("undefined alias", "quote a value that begins with *"),
    "output_dir: r\t": ("'\\t'", "not with tabs"),
    "output_dir: !env R": ("the tag !env", "remove the tag"),
    "output_dir: !join [a, b]": ("the tag !join", "remove the tag"),
    "output_dir: 'r": ("unexpected end of stream", "close the quote that is opened there"),
    "seed: !!int x": ("x, which YAML cannot read", "correct it"),
    "seed: !!bool maybe": ("maybe, which YAML cannot read", "correct it"),
    "seed: !!float ''": ("nothing, which YAML cannot read", "correct it"),
    "seed: !!timestamp x": ("x, which YAML cannot read", "correct it"),
    "seed: =": ("could not determine a constructor", "remove the tag"),
    # sections and lists
    "train: [{num_steps: 5}]": ("[{'num_steps': 5}]", "remove the dashes"),
    "train: num_steps:5": ("'num_steps:5' (str)", "write num_steps: 5, with a space"),
    "train: {num_steps:5}": ("an unknown key", "write num_steps: 5, with a space"),
    "train.num_steps: [5]": ("[5]", "correct the value"),
    "data.train: {source: jsonl}": ("a section of keys", "write a list"),
    "tracking.sinks: console": ("'console'", "write a list"),
    "megatron: {<<: 3}": ("no section to merge", "write <<: *NAME"),
    "megatron: {transformer: [1}": ("expected ',' or ']'", "correct that line"),
    "megatron: {transformer: {a: 1}": ("expected ',' or '}'", ""),
    f"megatron: {'[' * 500}": ("nested hundreds of levels deep", "remove the brackets"),
}  # fmt: skip


def nested(entry: str) -> str:
    """`a.b: value` as a file, the value on its last line."""
    key, _, value = entry.partition(":")
    *above, last = key.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(above)]
    return "\n".join([*lines, f"{'  ' * len(above)}{last}:{value}"])


@pytest.mark.parametrize("entry", VALUES, ids=lambda entry: entry[:40])
def test_a_value_in_a_file(tmp_path: Path, entry: str) -> None:
    found, fix = VALUES[entry]
    text = nested(entry)
    base = "".join(
        line + "\n" for line in BASE.splitlines() if line.split(":")[0] != text.split(":")[0]
    )
    error = refusal(tmp_path, base + text)
    assert found in error.found and fix in error.fix
    assert error.line == (base + text).count("\n") + 1
    assert str(error).endswith(f"(line {error.line})")


@pytest.mark.parametrize(
    "entry",
    [e for e in VALUES if not any(c in e for c in "#@%*=\t!'") and "y e s" not in e],
    ids=lambda entry: entry[:40],
)
def test_a_value_of_an_override(tmp_path: Path, entry: str) -> None:
    """The same refusals; what YAML cannot read at all is quoted as it was given."""
    found = VALUES[entry][0]
    key, _, value = entry.partition(":")
    error = refusal(tmp_path, BASE, f"{key}={value}")
    assert str(error).startswith("command line: ") and error.line is None
    assert found in error.found or "expected a YAML value; quote it" in str(error)


def test_the_advice_for_an_override_is_for_the_shell(tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE, "output_dir=7")
    assert "output_dir=\"'7'\"" in error.fix
    assert load(tmp_path, BASE, "output_dir='7'").output_dir == "7"


@pytest.mark.parametrize("text", ["runs #3", "runs\n3", "--- runs", "r\u0085s"])
def test_a_text_of_an_override_is_not_cut_silently(tmp_path: Path, text: str) -> None:
    """In a file a comment is somebody's intention; on the command line it is a part of the name."""
    error = refusal(tmp_path, BASE, f"output_dir={text}")
    assert "which YAML makes of" in error.found and "double quotes inside single" in error.fix


def test_a_text_of_an_override_that_says_all_of_it_passes(tmp_path: Path) -> None:
    assert load(tmp_path, BASE, 'output_dir="runs #3"').output_dir == "runs #3"
    assert load(tmp_path, BASE, "output_dir= runs#3 ").output_dir == "runs#3"
    assert load(tmp_path, BASE, "train.num_steps=5 # short").train.num_steps == 5


def test_an_override_goes_before_what_was_read_of_the_file(tmp_path: Path) -> None:
    """The text of a value that is replaced says nothing of the new one."""
    text = BASE + "train: {group_size: 010}\nmegatron: {optimizer: {a: 1e-6}}"
    assert load(tmp_path, text, "train.group_size=10").train.group_size == 10
    assert load(tmp_path, text, "train={group_size: 10}").train.group_size == 10
    fine = BASE + "megatron: {optimizer: {a: 1e-6}}"
    assert load(tmp_path, fine, "megatron.optimizer.a='1e-6'").megatron.optimizer == {"a": "1e-6"}


FILES: dict[str, tuple[bytes, str, int | None]] = {
    "empty": (b"", "output_dir: found nothing", 1),
    "comment": (b"# nothing\n", "output_dir: found nothing", 1),
    "marker": (b"---\n", "output_dir: found nothing", 1),
    "text": (b"hello\n", "(top level): found 'hello' (str), expected a mapping of sections", 1),
    "no_space": (b"seed:3\n", "write seed: 3, with a space after the colon", 1),
    "list": (b"- seed: 3\n", "remove the dashes", 1),
    "utf16": (BASE.encode("utf-16"), "found UTF-16, expected UTF-8 text", 1),
    "latin1": (b"seed: 1\noutput_dir: \xe9\n", "found the byte 0xe9", 2),
    "pickle": (b"\x80\x04\x95", "found the byte 0x80", 1),
    "nul": (b"seed: 1\nx: \0\n", "found the character U+0000", 2),
    "tab": (b"train:\n\tnum_steps: 1\n", "indent with spaces, not with tabs", 2),
    "two_documents": (BASE.encode() + b"---\nseed: 1\n", "keep one document", 4),
    "twice": (b"seed: 1\ntrain:\n  group_size: 2\n  group_size: 2\n", "(first on line 3)", 4),
    "uneven": (b"train:\n  num_steps: 1\n group_size: 2\n", "indent the keys of a section", 3),
    "colon": (b"seed: 1\ntrain\nsfpo: {}\n", "space after the colon", 2),
    "fused": (b"seed:1\ntrain: {}\n", "space after the colon", 2),
    "brackets": (b"seed: 1\ntrain: {num_steps: 1\n", "close the bracket that is opened there", 2),
    "key_is_a_list": (b"seed: 1\n? [a]\n: 1\n", "brackets in the place of a key", 2),
    "norway": (b"seed: 1\nno: 1\n", "no: found an unknown key", 2),
    "null_key": (b"seed: 1\n~: 1\n", "~: found an unknown key", 2),
    "alias_to_itself": (b"megatron: &a\n  ddp: {x: *a}\n", "an alias to itself", 2),
    "version": (b"%YAML 9.9\n---\na: 1\n", "incompatible YAML document", 1),
    "null_section": (BASE.encode() + b"train:\n", "train: found null, expected a section", 4),
    "needed": (b"output_dir: r\nmodel:\n  dtype: float32\n", "model.path: found nothing", 2),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file(tmp_path: Path, name: str) -> None:
    content, said, line = FILES[name]
    error = refusal(tmp_path, content)
    assert said in str(error)
    assert error.line == line


def test_aliases_of_aliases(tmp_path: Path) -> None:
    """Ten lines that stand for 10^9 values, as values and as merges: refused in moments."""
    lists = "x0: &x0 [1]\n" + "".join(
        f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 10)
    )
    merges = "x0: &x0 {a: 1}\n" + "".join(
        f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 10)}]}}\n" for n in range(1, 10)
    )
    for text in (lists, merges):
        error = refusal(tmp_path, text)
        assert "more than 100,000 values" in error.found and error.line


def test_what_is_the_same_config(tmp_path: Path) -> None:
    """A byte-order mark, other line ends, JSON, anchors, merges, underscores, 1e-6 as it stands."""
    plain = load(tmp_path, BASE + "train: {num_steps: 1000, group_size: 4}\n")
    text = BASE + "train: {num_steps: 1_000, group_size: 4}\n"
    assert load(tmp_path, b"\xef\xbb\xbf" + text.encode()) == plain
    assert load(tmp_path, text.replace("\n", "\r\n")) == plain
    assert load(tmp_path, text.replace("\n", "\r")) == plain
    assert load(tmp_path, "---\n" + text + "...\n") == plain
    assert load(tmp_path, json.dumps(yaml.safe_load(text), indent=1)) == plain
    merged = BASE + "train:\n  <<: [{num_steps: 1000}, {num_steps: 3, group_size: 4}]\n"
    assert load(tmp_path, merged) == plain
    own = BASE + "train:\n  <<: {num_steps: 9, group_size: 4}\n  num_steps: 1000\n"
    assert load(tmp_path, own) == plain
    sources = yaml.safe_load(BASE)["data"]["train"]
    aliased = load(
        tmp_path, BASE.replace("train: [", "train: &t [").replace("}]}", "}], eval: *t}")
    )
    assert len(sources) == len(aliased.data.eval) and aliased.data.eval == aliased.data.train


def test_numbers_of_a_section_that_is_passed_on(tmp_path: Path) -> None:
    """YAML 1.1 makes texts of 1e-6 and 1.0e5; quotes keep a text, also through a dump."""
    text = "megatron: {optimizer: {a: 1e-6, b: '1e-6', c: [1.0e5], d: yes, e: v1e5, f: .5}}"
    config = load(tmp_path, BASE + text)
    expected = {"a": 1e-6, "b": "1e-6", "c": [1e5], "d": True, "e": "v1e5", "f": 0.5}
    assert config.megatron.optimizer == expected
    assert load(tmp_path, dump_config(config)) == config


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for path, found in {
        tmp_path: "a directory",
        tmp_path / "none.yaml": "no such file",
        tmp_path / "link": "no such file",
        tmp_path / "loop": "no such file",
        tmp_path / "pipe": "no regular file",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"{path}: (file): found {found}, expected a YAML file")


# ---- any text ----------------------------------------------------------------------------------

WORDS = """
    yes no on off ~ null 010 1:30 1e-6 1_000 0x10 .inf .nan 2026-11-29 2026-13-45 = << # *a &a !a
    !!int !!float %a @a `a {} [] {a [a 'a "a a: -
"""
PHRASES = ["a: b", "a\tb", "- a", "a #b", "", "!!binary x", "? a", "{a: 1, a: 2}", "9" * 4400]
SCALARS = st.sampled_from([*WORDS.split(), *PHRASES]) | st.text(max_size=6)
SECTION = ["train:", "  num_steps: 5", "  group_size: 4", "megatron: {ddp: {a: 1}}"]
LINES = [*BASE.splitlines(), *SECTION]


def mutated(lines: list[str], number: int, kind: str, text: str) -> list[str]:
    line = lines[number]
    key = line.partition(":")[0]
    other: dict[str, list[str]] = {
        "value": [f"{key}: {text}"],
        "fused": [line.replace(": ", ":", 1)],
        "twice": [line, line],
        "tab": ["\t" + line],
        "dash": ["- " + line],
        "insert": [text, line],
        "append": [line + text],
        "key": [f"{text}: 1", line],
        "indent": ["   " + line],
        "cut": [line[: len(line) // 2]],
    }
    return lines[:number] + other[kind] + lines[number + 1 :]


MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, len(LINES) - 1),
        st.sampled_from(
            ["value", "fused", "twice", "tab", "dash", "insert", "append", "key", "indent", "cut"]
        ),
        SCALARS,
    ),
    min_size=1,
    max_size=2,
)


@settings(deadline=None, max_examples=150)
@given(mutations=MUTATIONS, ends=st.sampled_from(["\n", "\r\n"]))
@example(mutations=[(0, "value", "2026-13-45")], ends="\n")
@example(mutations=[(4, "value", "9" * 4400)], ends="\n")
def test_any_variant_loads_or_is_refused_with_its_line(
    mutations: list[tuple[int, str, str]],
    ends: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Never another exception; the line is one of the file. What loads survives a dump."""
    lines = list(LINES)
    for mutation in mutations:
        lines = mutated(lines, *mutation)
    path = tmp_path_factory.mktemp("variant") / "run.yaml"
    path.write_bytes(ends.join(lines).encode("utf-8", "surrogatepass"))
    try:
        config = load_config(path)
    except ConfigError as error:
        assert "\n" not in str(error)
        assert error.line is not None
        assert 1 <= error.line <= len(path.read_bytes().splitlines()) + 1
        return
    path.write_text(dump_config(config))
    assert load_config(path) == config or "nan" in repr(config)


@settings(deadline=None, max_examples=100)
@given(
    text=SCALARS, key=st.sampled_from(["seed", "output_dir", "train", "megatron.ddp", "a.b", ""])
)
def test_any_override_sets_a_value_or_is_refused(
    text: str, key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "overridden.yaml"
    path.write_text(BASE)
    try:
        load_config(path, [f"{key}={text}"])
    except ConfigError as error:
        assert error.file == "command line"


VALID: dict[str, Any] = yaml.safe_load(BASE) | {
    "train": {"num_steps": 5, "optimizer": {"lr": 1e-6}},
    "megatron": {"optimizer": {"a": [1, {"b": "x"}]}},
}


@settings(deadline=None, max_examples=40)
@given(
    flow=st.sampled_from([None, True, False]),
    style=st.sampled_from([None, '"', "'"]),
    indent=st.integers(2, 9),
    width=st.integers(10, 200),
    order=st.permutations(list(VALID)),
)
def test_every_way_to_write_a_config_is_the_same_config(
    flow: bool | None,
    style: str | None,
    indent: int,
    width: int,
    order: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Block and flow, quotes (with tags where a number stands in them), widths, orders."""
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(json.dumps(VALID))
    expected = load_config(path)
    tree = {name: VALID[name] for name in order}
    path.write_text(
        yaml.safe_dump(
            tree,
            default_flow_style=flow,
            default_style=style,
            indent=indent,
            width=width,
            sort_keys=False,
        )
    )
    assert load_config(path) == expected
