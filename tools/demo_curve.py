"""The README's picture: held-out accuracy of the demo, from its committed result.

tools/doc_tables.py writes it to docs/images/demo.svg; a unit test fails when it is stale.
"""

from __future__ import annotations

from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 56, 700, 52, 240
"""Frame of the curves, in pixels."""
LOW, HIGH = 0.2, 0.8
"""Accuracies at the bottom and the top of the frame."""
_STYLE = """\
  svg { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
  .back { fill: #f7f8fa; } text { fill: #1c2430; } .small { font-size: 11.5px; fill: #55606f; }
  .bold { font-weight: 600; } .end { text-anchor: end; } .middle { text-anchor: middle; }
  .grid { stroke: #dfe3e8; } .seed { fill: none; stroke: #3a76c4; stroke-width: 1.2; opacity: .45; }
  .mean { fill: none; stroke: #1f5fa8; stroke-width: 2.8; } .dot { fill: #1f5fa8; }
  @media (prefers-color-scheme: dark) {
    .back { fill: #161b22; } text { fill: #e6edf3; } .small { fill: #9da7b3; }
    .grid { stroke: #30363d; } .seed { stroke: #58a6ff; } .mean { stroke: #58a6ff; }
    .dot { fill: #58a6ff; }
  }"""


def svg(result: dict[str, Any]) -> str:
    """A thin line for each seed and a thick one for their mean, against train steps."""
    seeds = [run["held_out_accuracy"] for name, run in result.items() if name.startswith("seed ")]
    steps = [int(step) for step in seeds[0]]
    curves = [[seed[str(step)] for step in steps] for seed in seeds]
    means = [sum(values) / len(values) for values in zip(*curves, strict=True)]

    def x(step: int) -> float:
        return LEFT + (RIGHT - LEFT) * step / steps[-1]

    def line(kind: str, values: list[float]) -> str:
        points = " ".join(
            f"{x(step):.0f},{_y(v):.1f}" for step, v in zip(steps, values, strict=True)
        )
        return f'<polyline class="{kind}" points="{points}"/>'

    title = f"Held-out accuracy of the demo: {means[0]:.0%} to {means[-1]:.0%}, mean of"
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 290" width="780" height="290" '
        'role="img" aria-labelledby="title">',
        f'<title id="title">{title} {len(seeds)} seeds</title>',
        f"<style>\n{_STYLE}\n</style>",
        '<rect class="back" width="780" height="290" rx="8"/>',
        f'<text class="bold" x="{LEFT}" y="28">Held-out accuracy of the demo</text>',
        f'<text class="small end" x="{RIGHT}" y="28">{len(seeds)} seeds and their mean</text>',
    ]
    for tenth in range(round(10 * LOW), round(10 * HIGH) + 1):
        height = _y(tenth / 10)
        parts += [
            f'<path class="grid" d="M{LEFT} {height:.1f}H{RIGHT}"/>',
            f'<text class="small end" x="{LEFT - 8}" y="{height + 4:.1f}">{10 * tenth}%</text>',
        ]
    parts += [
        f'<text class="small middle" x="{x(step):.0f}" y="{BOTTOM + 18}">{step}</text>'
        for step in steps
    ]
    middle = (LEFT + RIGHT) / 2
    parts += [f'<text class="small middle" x="{middle:.0f}" y="{BOTTOM + 36}">train step</text>']
    parts += [*(line("seed", curve) for curve in curves), line("mean", means)]
    for step, value in zip(steps, means, strict=True):
        parts.append(f'<circle class="dot" cx="{x(step):.0f}" cy="{_y(value):.1f}" r="4"/>')
    for step, value, offset in ((steps[0], means[0], 20), (steps[-1], means[-1], -12)):
        place = f'x="{x(step) + 10:.0f}" y="{_y(value) + offset:.1f}"'
        parts.append(f'<text class="bold" {place}>{value:.0%}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _y(accuracy: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * (accuracy - LOW) / (HIGH - LOW)
