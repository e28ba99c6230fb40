"""One train step, rollout by rollout: where K + 1 passes vanish behind generation. No torch.

planner/time.py knows a rollout batch by its mean length; here every response has a length of its
own. An engine decodes the sequences that it has room for, a waiting one takes the place of one that
has ended, and the step waits for the last engine. All else is as there: log-probs, passes,
reposition and refit depend on the number of tokens, which the trainer's ranks share evenly.

With `rollout.async_steps: 1` the next step's rollouts are generated beside the log-probs and the
passes, and the refit waits for both.
"""

from __future__ import annotations

import functools
import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from statistics import NormalDist

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape
from sfpo_megatron.planner.hardware import Gpu
from sfpo_megatron.planner.time import Decoder, StepSeconds, Workload, decoder, step_seconds

SPREAD = 0.8
"""Standard deviation of the logarithm of a response's length: one in ten is longer than 2.8 times
the median."""


@functools.lru_cache(maxsize=8)
def response_lengths(work: Workload, count: int) -> tuple[int, ...]:
    """Log-normal, cut at the longest, `work.mean_response` on average after the cut."""
    source, longest = random.Random(0), int(work.longest_response)
    mu = _log_median(work.mean_response, work.longest_response)
    drawn = (source.lognormvariate(mu, SPREAD) for _ in range(count))
    return tuple(min(max(round(length), 1), longest) for length in drawn)


def _log_median(mean: float, longest: float) -> float:
    """Logarithm of the median of a log-normal distribution whose mean, once it is cut at `longest`,
    is `mean`."""
    if not 0 < mean < longest:
        raise ValueError(
            f"mean response: found {mean:g}, expected more than 0 and less than the longest, "
            f"{longest:g}; give another workload"
        )
    normal, cut = NormalDist(), math.log(longest)

    def cut_mean(mu: float) -> float:
        below = math.exp(mu + SPREAD**2 / 2) * normal.cdf((cut - mu - SPREAD**2) / SPREAD)
        return below + longest * normal.cdf((mu - cut) / SPREAD)

    low, high = math.log(mean) - SPREAD**2, cut + 8 * SPREAD
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cut_mean(middle) < mean else (low, middle)
    return low


def decoding_seconds(engine: Decoder, lengths: Sequence[int], prompt: float, room: int) -> float:
    """An engine's time for responses of these lengths, begun in this order, `room` of them at a
    time; a decoding step gives each running sequence a token."""
    waiting = iter(lengths)
    running = [(length, length) for length in islice(waiting, room)]  # (last step, length)
    heapq.heapify(running)
    seconds = len(lengths) * prompt * engine.prompt_s
    now, context = 0, prompt * len(running)
    while running:
        steps, count = running[0][0] - now, len(running)
        seconds += steps * (engine.weights_s(count) + count * engine.token_s)
        # Each step reads what the one before it has added.
        seconds += (steps * context + count * steps * (steps - 1) / 2) * engine.context_s
        now, context = now + steps, context + count * steps
        while running and running[0][0] == now:
            context -= prompt + heapq.heappop(running)[1]
            for length in islice(waiting, 1):
                heapq.heappush(running, (now + length, length))
                context += prompt
    return seconds


def simulate(shape: ModelShape, config: RunConfig, gpu: Gpu, work: Workload) -> StepSeconds:
    """Seconds of `config`'s train step whose responses have lengths of their own, dealt out to the
    engines in turn. `parallel.data` must be a number."""
    engine, engines = decoder(shape, config, gpu), config.rollout.num_engines
    count = config.train.prompts_per_step * config.train.group_size
    lengths, room = response_lengths(work, count), int(engine.room_for(work))
    generation = max(
        decoding_seconds(engine, lengths[index::engines], work.mean_prompt, room)
        for index in range(min(engines, count))
    )
    return replace(step_seconds(shape, config, gpu, work), generation=generation)


def hidden_passes(step: StepSeconds, num_passes: int) -> int:
    """How many of the trainer's passes fit behind generation, `num_passes` being in `step`."""
    left = step.generation - step.logprobs - step.reposition
    return max(int(left / (step.passes / num_passes)), 0)


def cost_of_sfpo(step: StepSeconds, num_passes: int, *, async_steps: int) -> float:
    """`step` of `num_passes` passes by the same one with a single pass."""
    sfpo = replace(step, overlapped=async_steps > 0)
    grpo = replace(sfpo, passes=step.passes / num_passes, reposition=0.0)
    return sfpo.total / grpo.total
