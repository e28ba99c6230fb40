"""Problems as verifiers get them."""

from __future__ import annotations

from sfpo_megatron.rewards.wire import WireProblem


def problem(answer: str = "42", **metadata: object) -> WireProblem:
    return WireProblem(id="p", question="?", answer=answer, metadata=metadata)
