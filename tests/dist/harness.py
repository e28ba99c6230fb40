"""Tests whose bodies run on torchrun ranks: `@on_ranks(...)` makes one pytest test a case.

    @on_ranks(TP1, TP2, model=["qwen2_tied"])
    def test_something(bench, model): ...      # runs on every rank, under worker.py

Start-up (imports, about 5 s a rank) dominates, so ONE torchrun a world size runs all the cases that
pytest selected, one after another; the pytest side (`Jobs`) only reports what the ranks wrote down.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CASE_LIMIT_S = 90.0
"""A case that takes longer on any rank is a hang: the rank prints all its stacks and exits."""
START_LIMIT_S = 300.0
"""What a torchrun may take besides its cases."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Layout:
    """How the ranks of a case are laid out; the fields are those of ParallelConfig."""

    name: str
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    sequence: bool = False
    context: int = 1
    expert: int = 1
    """Expert-parallel size: of the data x tensor ranks of a pipeline stage."""
    expert_tensor: int = 1
    te: bool = False
    """Under Megatron's TransformerEngine layer spec, over tests/te_standin."""

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context


TP1 = Layout(name="TP1")
TE1 = Layout(name="TE1", te=True)
CP2 = Layout(name="CP2", context=2, te=True)
TP2 = Layout(name="TP2", tensor=2)
SP2 = Layout(name="TP2+SP", tensor=2, sequence=True)
PP2 = Layout(name="PP2", pipeline=2)
VPP2 = Layout(name="PP2xVPP2", pipeline=2, virtual=2)
DP2 = Layout(name="DP2", data=2)
TP2PP2 = Layout(name="TP2xPP2", tensor=2, pipeline=2)
TEDP2 = Layout(name="TEDP2", data=2, te=True)
PP2DP2 = Layout(name="PP2xDP2", pipeline=2, data=2)
TP2PP2DP2 = Layout(name="TP2xPP2xDP2", tensor=2, pipeline=2, data=2)
EP2 = Layout(name="DP2xEP2", data=2, expert=2)
SP2EP2 = Layout(name="TP2+SPxEP2", tensor=2, sequence=True, expert=2)
EP2DP4 = Layout(name="DP4xEP2", data=4, expert=2)
TE_TP2 = Layout(name="TExTP2", te=True, tensor=2)
TE_SP2 = Layout(name="TExTP2+SP", te=True, tensor=2, sequence=True)
TE_EP2 = Layout(name="TExDP2xEP2", te=True, data=2, expert=2)
TE_SP2EP2 = Layout(name="TExTP2+SPxEP2", te=True, tensor=2, sequence=True, expert=2)
TE_PP2 = Layout(name="TExPP2", te=True, pipeline=2)
TE_VPP2 = Layout(name="TExPP2xVPP2", te=True, pipeline=2, virtual=2)
EP2PP2 = Layout(name="DP2xEP2xPP2", data=2, expert=2, pipeline=2)

SP2EP2PP2 = Layout(name="TP2+SPxEP2xPP2", tensor=2, sequence=True, expert=2, pipeline=2)


@dataclass(kw_only=True, frozen=True)
class Case:
    """One function under one layout with one set of arguments."""

    function: Callable[..., None]
    layout: Layout
    arguments: dict[str, Any]
    needs: Layout | None
    """The same case under this layout runs before (it saves what this one compares with)."""

    @property
    def label(self) -> str:
        return "-".join([self.layout.name, *map(str, self.arguments.values())])

    @property
    def id(self) -> str:
        return f"{module_of(self.function)}:{self.function.__name__}[{self.label}]"

    def needed(self) -> Case | None:
        if self.needs is None or self.needs == self.layout:
            return None
        label = self.label.replace(self.layout.name, self.needs.name)
        return CASES[self.id.replace(self.label, label)]


def module_of(function: Callable[..., None]) -> str:
    return Path(function.__code__.co_filename).stem


CASES: dict[str, Case] = {}
"""Every case of the test modules imported so far, by id."""


def on_ranks(
    *layouts: Layout,
    needs: Layout | None = None,
    full: Collection[str] = (),
    only: Collection[str] | None = None,
    **parameters: Sequence[Any],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(bench, **arguments)` under each layout and combination of parameters.

    Cases whose label is in `full`, or with `only` all others than those, run in `make test-full`
    only. Those under TransformerEngine's spec are marked `te_spec` (`make test-te`).
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        cases = [
            Case(
                function=function,
                layout=layout,
                arguments=dict(zip(parameters, values, strict=True)),
                needs=needs,
            )
            for layout in layouts
            for values in itertools.product(*parameters.values())
        ]
        CASES.update({case.id: case for case in cases})

        def test(case: Case, jobs: Jobs) -> None:
            jobs.check(case)

        functools.update_wrapper(test, function)
        del test.__wrapped__  # pytest would read the fixtures of the wrapped signature
        labels = {case.label for case in cases}
        unknown = {*full, *(only or ())} - labels
        assert not unknown, f"{module_of(function)}: no case is labelled {unknown}"
        long = set(full) if only is None else labels - set(only)
        marked = [
            pytest.param(
                case,
                id=case.label,
                marks=[pytest.mark.full] * (case.label in long)
                + [pytest.mark.te_spec] * case.layout.te,
            )
            for case in cases
        ]
        return pytest.mark.parametrize("case", marked)(test)

    return register


class Jobs:
    """Runs the selected cases when the first result of their kind is asked for."""

    def __init__(self, selected: Sequence[Case], directory: Path) -> None:
        self._directory = directory
        self._results: dict[str, dict[int, dict[str, Any]]] = {}
        self._ran: set[tuple[int, bool]] = set()
        wanted = {case.id: case for case in selected}
        for case in selected:
            before = case.needed()
            if before is not None:
                wanted[before.id] = before
        self._cases = list(wanted.values())

    def check(self, case: Case) -> None:
        """Fail with what the ranks said."""
        self._run(case.layout)
        results = self._results.get(case.id, {})
        failures = [
            f"rank {rank}:\n{result['error']}"
            for rank, result in sorted(results.items())
            if result["error"]
        ]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        assert sorted(results) == list(range(case.layout.world)), f"ranks {sorted(results)} only"

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """What the cases measured (`bench.figures` on rank 0), by case."""
        found = {
            name: ranks[0].get("figures") for name, ranks in self._results.items() if 0 in ranks
        }
        return {name: figures for name, figures in sorted(found.items()) if figures}

    def _run(self, layout: Layout) -> None:
        kind = (layout.world, layout.te)
        if kind in self._ran:
            return
        self._ran.add(kind)
        cases = [c for c in self._cases if (c.layout.world, c.layout.te) == kind]
        for before in filter(None, (case.needed() for case in cases)):
            self._run(before.layout)
        # One layout after another: its process groups are made once.
        todo = [case.id for case in sorted(cases, key=lambda case: case.layout.name)]
        for attempt in range(3):  # a hang or a crash ends the job: go on after the case it was in
            log = self._launch(kind, todo, attempt)
            missing = [i for i in todo if len(self._results.get(i, {})) < layout.world]
            if not missing:
                return
            self._results.setdefault(missing[0], {})[-1] = {
                "error": f"the torchrun of this case ended in the middle of it:\n{log[-6000:]}"
            }
            todo = missing[1:]
        for name in todo:
            self._results[name] = {-1: {"error": "not run: torchrun died three times before it"}}

    def _launch(self, kind: tuple[int, bool], cases: list[str], attempt: int) -> str:
        world, te = kind
        work = self._directory / f"world{world}{'-te' if te else ''}-{attempt}"
        work.mkdir()
        (work / "cases.json").write_text(json.dumps(cases))
        paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
        paths += [str(HERE.parent / "te_standin")] if te else []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", str(HERE / "worker.py"), str(work)]
        # gloo would otherwise look up the host's own name, which not every machine can.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONWARNINGS": "ignore",
        }
        with (work / "log.txt").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            try:
                process.wait(timeout=START_LIMIT_S + CASE_LIMIT_S * len(cases))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for file in sorted(work.glob("rank*.jsonl")):
            rank = int(file.stem.removeprefix("rank"))
            for line in file.read_text().splitlines():
                result = json.loads(line)
                self._results.setdefault(result["case"], {})[rank] = result
        return (work / "log.txt").read_text()
