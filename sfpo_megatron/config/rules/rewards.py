"""Rules of check.py about the server of the reward `http`. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.reward import LONGEST_PAUSE_S, pauses_s
from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig

_GROWING = 8
"""Not before so many pauses are they all as long as they get."""


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
    growing_s = sum(pauses_s(min(http.retries, _GROWING)))
    all_s = growing_s + LONGEST_PAUSE_S * max(0, http.retries - _GROWING)
    longest_s = http.timeout_s * (http.retries + 1) + all_s
    if used and longest_s > config.train.control_timeout_s:
        yield Problem(
            "reward.http.retries",
            f"{http.retries} of {http.timeout_s:g} s each, with their pauses {longest_s:,.0f} s",
            f"at most train.control_timeout_s ({config.train.control_timeout_s:g} s)",
            "the other ranks give up before; lower reward.http.retries or timeout_s",
            "warning",
        )
