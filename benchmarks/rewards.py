r"""Verdicts a second of the `math` reward, through the scoring pool on two cores.

    python benchmarks/rewards.py [--num 4000] [--out FILE]

(a) ordinary answers: groups of eight responses to references that are integers, fractions,
    decimals, expressions, lists, intervals and quantities (seed fixed, references distinct);
(b) the same with as many hostile answers among them that are refused unread (hostile.py);
(c) the same with a share that only `reward.timeout_s` ends: no pool can do more than
    workers / (share x timeout) then, which is printed beside.

Targets: 2,000 a second in (a), and half of (a)'s in (b), where ordinary ones are counted. A target
that is missed is printed as missed; it does not fail the run.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import torch

from benchmarks.common import provenance
from sfpo_megatron.config.tree import RewardConfig
from sfpo_megatron.rewards import math
from sfpo_megatron.rewards.pool import Item, ScoringPool
from sfpo_megatron.rewards.wire import WireProblem

NUM_WORKERS = 2
GROUP_SIZE = 8
TARGET = 2000.0
MOST_MS = 1.0
SHARES = (0.002, 0.01)
TIMEOUT_S = 0.5
REFUSED = (
    "9^{9^{9^{9}}}",
    "(((9!)!)!)!",
    "2^{999999999}",
    r"\binom{99999999}{44444444}",
    "(" * 10_000 + "1" + ")" * 10_000,
    "(" * 201 + "1" + ")" * 201,
    "1+" * 10_000 + "1",
    "7" * 5000,
    "__import__('os')",
)
ENDLESS = r"\int_0^1 \frac{\sqrt{x^5+x+1} \sin(x)}{\ln(2+x^3)} dx"


def answer(draw: random.Random) -> tuple[str, str]:
    """A reference, and the same answer written in another way."""
    a, b, c = (draw.randint(2, 9999) for _ in range(3))
    forms = (
        *[(f"{a}", f"{a}"), (f"{a * b}", f"{a * b:,}"), (f"-{a}", f"-{a}.0")] * 3,
        (rf"\frac{{{a}}}{{{b}}}", f"{a}/{b}"),
        (f"{a / 100}", rf"{a / 100:.2f}"),
        (f"{a}x^2 + {b}", f"{b} + {a}x^2"),
        (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{b}}} \cdot {a}"),
        (f"{a}, {b}", f"{b}, {a}"),
        (f"[{a}, {a + b})", rf"{a} \le x < {a + b}"),
        (rf"{a}\text{{ cm}}", f"{a}"),
        (rf"{a}\%", rf"{a}\%"),
        (f"({a}, {b}, {c})", rf"\left({a}, {b}, {c}\right)"),
    )
    return draw.choice(forms)


def ordinary(num: int, *, seed: int) -> list[Item]:
    """Groups of responses, half of them right."""
    draw = random.Random(seed)
    items: list[Item] = []
    while len(items) < num:
        reference, same = answer(draw)
        problem = WireProblem(id=f"p/{len(items)}", question="?", answer=reference, metadata={})
        for sample in range(GROUP_SIZE):
            given = same if sample % 2 else answer(draw)[1]
            text = f"<think>{'Let us see. ' * 100}</think>\nSo the answer is $\\boxed{{{given}}}$."
            items.append((problem, text))
    return items[:num]


def hostile(items: list[Item], answers: tuple[str, ...], every: int) -> list[Item]:
    """One hostile answer behind each `every` of `items`."""
    mixed: list[Item] = []
    for index, item in enumerate(items):
        mixed.append(item)
        if index % every == every - 1:
            text = answers[index // every % len(answers)]
            mixed.append((item[0], f"\\boxed{{{text}}}"))
    return mixed


def seconds(pool: ScoringPool, items: list[Item]) -> float:
    begun = time.perf_counter()
    pool.score(items)
    return time.perf_counter() - begun


def slowest_refusal_ms() -> float:
    """Milliseconds that the slowest of REFUSED takes in this process, the best of five."""
    problem = WireProblem(id="p", question="?", answer="42", metadata={})
    math.warm_up()
    worst = 0.0
    for text in REFUSED:
        times = []
        for _ in range(5):
            math.readings.cache_clear()
            begun = time.perf_counter()
            assert math.score(f"\\boxed{{{text}}}", problem) == 0.0
            times.append(time.perf_counter() - begun)
        worst = max(worst, min(times))
    return worst * 1e3


def measure(num: int) -> list[dict[str, Any]]:
    items = ordinary(num, seed=0)
    rows = []
    config = RewardConfig(function="math", num_workers=NUM_WORKERS, timeout_s=TIMEOUT_S)
    with ScoringPool(config) as pool:
        pool.score(ordinary(64, seed=1))
        rate = num / seconds(pool, items)
        rows.append(row("ordinary", rate, "target, at least", TARGET, met=rate >= TARGET))
        mixed = hostile(ordinary(num, seed=2), REFUSED, 1)
        beside = num / seconds(pool, mixed)
        half = rate / 2
        rows.append(row("as many refused unread", beside, "half of it", half, met=beside >= half))
        for share in SHARES:
            part = ordinary(int(4 / share), seed=3)
            mixed = hostile(part, (ENDLESS,), int(1 / share))
            took = seconds(pool, mixed)
            bound = NUM_WORKERS / (share * TIMEOUT_S)
            name = f"{share:.1%} that the time limit ends"
            rows.append(row(name, len(part) / took, "workers / (share x timeout)", bound, met=None))
    slowest = slowest_refusal_ms()
    most = MOST_MS
    rows.append(
        row("ms of the slowest refusal", slowest, "target, at most", most, met=slowest <= most)
    )
    return rows


def row(what: str, value: float, beside: str, bound: float, *, met: bool | None) -> dict[str, Any]:
    """A figure beside another; `met`: whether that is a target that it meets, None for none."""
    figures = {"value": round(value, 3), "beside": beside, "bound": round(bound, 3)}
    return {"what": what, **figures, "met": met}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num", type=int, default=4000, help="ordinary answers")
    parser.add_argument("--out", type=Path, help="file of figures")
    args = parser.parse_args()
    device = torch.device("cpu")
    print(provenance.hardware(device))
    rows = measure(args.num)
    print("| verdicts a second | | | | |\n|---|---|---|---|---|")
    said = {True: "met", False: "missed", None: ""}
    for one in rows:
        cells = (one["what"], f"{one['value']:,.4g}", one["beside"], f"{one['bound']:,.4g}")
        print(f"| {' | '.join((*cells, said[one['met']]))} |")
    provenance.write(
        args.out or provenance.ROOT / "benchmarks" / "results" / "rewards.json",
        {"workers": NUM_WORKERS, "timeout_s": TIMEOUT_S, "rows": rows},
        device=device,
        features=["math"],
    )


if __name__ == "__main__":
    main()
