"""Rules of check.py about the server of the reward `http`. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig

_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
_LONGEST_PAUSE_S = 30.0
"""What comes after `_PAUSES_S`, each time (rewards/http.py)."""


def server(config: RunConfig) -> Iterator[Problem]:
    """It has an address where it is asked, and an outage is over before the ranks stop waiting."""
    http = config.reward.http
    used = any(one.name == "http" for one in config.reward.functions(config.rewards))
    if used and http.url is None:
        yield Problem(
            "reward.http.url",
            "null with a reward http",
            "the address of the server that scores, such as http://127.0.0.1:8000/score",
            "set it, or choose another reward",
        )
    if http.url is not None and not used:
        yield Problem(
            "reward.http.url",
            f"{http.url!r}, and no reward that is http",
            "reward.function http, or a source with reward http",
            "it has no effect",
            "warning",
        )
    pauses_s = sum(_PAUSES_S[: http.retries])
    pauses_s += _LONGEST_PAUSE_S * max(0, http.retries - len(_PAUSES_S))
    longest_s = http.timeout_s * (http.retries + 1) + pauses_s
    if used and longest_s > config.train.control_timeout_s:
        yield Problem(
            "reward.http.retries",
            f"{http.retries} of {http.timeout_s:g} s each, with their pauses {longest_s:,.0f} s",
            f"at most train.control_timeout_s ({config.train.control_timeout_s:g} s)",
            "the other ranks give up before; lower reward.http.retries or timeout_s",
            "warning",
        )
