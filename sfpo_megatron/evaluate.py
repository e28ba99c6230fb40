"""`sfpo-megatron eval`: models on held-out problems, by engines alone."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sfpo_megatron.config.reward import RewardChoice
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data.prompts import source_of
from sfpo_megatron.evaluation import report
from sfpo_megatron.evaluation.answers import answer_of
from sfpo_megatron.evaluation.models import Model, as_files
from sfpo_megatron.evaluation.problems import Problems, problems_of
from sfpo_megatron.evaluation.records import DATE, Record, Records
from sfpo_megatron.evaluation.request import Request
from sfpo_megatron.host.spans import span
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.run.held_out import HeldOutRollout, eval_metrics
from sfpo_megatron.tracking.screen import open_screen, screen
from sfpo_megatron.types import Prompt, Rollout

_ROLLOUTS_PER_PART = 512
"""Kept at a time: what a kill loses. Two parts are under way, so that engines never wait."""


def run(request: Request) -> None:
    """Evaluate every model, write what was found below output_dir, and print it."""
    directory = RunDirectory.of(request.config.output_dir)
    found: dict[str, Mapping[str, Sequence[Record]]] = {}
    with open_screen("quiet" if request.quiet else "lines", sys.stderr):
        for asked in problems_of(request, directory.eval):
            found[asked.model.name] = _records_of(asked, fresh=request.fresh)
    results = report.results(found)
    report.write(directory.eval, results)
    for name, records in found.items():
        line = json.dumps({"model": name, **_metrics(records)})
        with directory.evals.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")
        print(line, flush=True)
    if not request.as_json:
        print(f"\n{report.table(results)}\nwritten: {directory.eval}", file=sys.stderr, flush=True)


def _records_of(asked: Problems, *, fresh: bool) -> dict[str, list[Record]]:
    """All rollouts of a model, of which those that are kept in its folder are not made again;
    `fresh` sets them aside."""
    model, config, folder, prompts = asked.model, asked.config, asked.folder, asked.prompts
    if asked.said:
        screen().text(f"{model.name}: {asked.said}")
    settings = settings_of(model, config, prompts, date=asked.date)
    with Records(folder, settings, n=config.eval.n, fresh=fresh) as records:
        if records.previous is not None:
            screen().text(f"{folder}: set aside as {records.previous.name}")
        records.require_figures()
        missing = [prompt for prompt in prompts if prompt.id not in records.problems]
        if len(missing) < len(prompts):
            done = len(prompts) - len(missing)
            screen().text(f"{model.name}: {done} of {len(prompts)} problems are there")
        if missing:
            said = f"{len(missing)} problems, {config.eval.n} responses each; the engines start"
            screen().text(f"{model.name}: {said}")
            with as_files(model, folder / "converted") as files:
                for part in _rollouts(config, str(files), missing):
                    records.add([_record(config, *one) for one in part])
                    done = len(records.problems)
                    screen().text(f"{model.name}: {done}/{len(prompts)} problems")
        return {prompt.id: records.problems[prompt.id] for prompt in prompts}


def _rollouts(
    config: RunConfig, model_path: str, prompts: Sequence[Prompt]
) -> Iterator[list[tuple[Prompt, Rollout]]]:
    """The rollouts of all prompts, part by part, each prompt's together."""
    from sfpo_megatron.rollout.controller import start_rollouts
    from sfpo_megatron.rollout.sampling import eval_request

    size = max(1, _ROLLOUTS_PER_PART // config.eval.n)
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    client = start_rollouts(config, model_path=model_path)
    try:
        begun = time.monotonic()
        with span("engines"):
            client.wait_ready(config.rollout.timeout_s)
        waited = time.monotonic() - begun
        screen().text(f"engines ready (waited {waited:.1f} s)")
        requests = [
            eval_request(config, f"eval/{number}", part, step=0)
            for number, part in enumerate(parts)
        ]
        client.submit(requests[0])
        for number, part in enumerate(parts):
            if number + 1 < len(parts):
                client.submit(requests[number + 1])
            with span("evaluate", number=number + 1, of=len(parts)):
                rollouts = client.collect(requests[number].id)
            by_id = {prompt.id: prompt for prompt in part}
            yield [(by_id[rollout.prompt_id], rollout) for rollout in rollouts]
    finally:
        client.close()


def _record(config: RunConfig, prompt: Prompt, rollout: Rollout) -> Record:
    return {
        "problem": prompt.id,
        "source": source_of(prompt.id),
        "sample": rollout.sample,
        "question": prompt.question,
        "reference": prompt.answer,
        "text": rollout.text,
        "reward": rollout.reward,
        "correct": rollout.correct,
        "answer": answer_of(config.reward, prompt.reward, rollout.scored_text),
        "parts": dict(rollout.parts),
        "num_tokens": rollout.num_generated,
        "truncated": not rollout.finished,
    }


def settings_of(
    model: Model, config: RunConfig, prompts: Sequence[Prompt], *, date: str | None = None
) -> dict[str, Any]:
    """What the records depend on. `date`: that which the prompts print, kept for another start."""
    rollout, reward = config.rollout, config.reward
    return {
        "model": str(model.checkpoint or model.hf),
        "files": model.fingerprint(),
        "dtype": config.model.dtype,
        "quantization": rollout.quantization,
        "engine_args": rollout.engine_args,
        "environment": rollout.environment,
        "environment_args": rollout.environment_args,
        "seed": config.seed,
        "n": config.eval.n,
        "temperature": config.eval.temperature,
        "top_p": config.eval.top_p,
        "max_tokens": config.eval_response_tokens,
        "reward": _rewards(config),
        "batched": reward.batched,
        "thinking": reward.thinking,
        "reward_timeout_s": reward.timeout_s,
        "reward_url": reward.http.url,
        "prompts": _digest(repr([(p.id, p.token_ids, p.answer) for p in prompts])),
        "metadata": _digest("\n".join(_plain(dict(p.metadata)) for p in prompts)),
        **({DATE: date} if date else {}),
    }


def _plain(metadata: dict[str, Any]) -> str:
    """JSON; of a value that it cannot hold the type alone, whose text may be another next time."""
    return json.dumps(metadata, default=lambda value: type(value).__name__, skipkeys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rewards(config: RunConfig) -> Any:
    """The reward of all sources or, where one has its own, of each."""

    def plain(choice: RewardChoice | None) -> Any:
        choice = config.reward.function if choice is None else choice
        return choice if isinstance(choice, str) else [asdict(one) for one in choice]

    own = [source.reward for source in config.data.eval]
    return [plain(choice) for choice in own] if any(own) else plain(None)


def _metrics(records: Mapping[str, Sequence[Record]]) -> dict[str, float]:
    """The figures under the names that evaluations of a run have in metrics.jsonl."""
    rollouts = [record for samples in records.values() for record in samples]
    return eval_metrics(
        [HeldOutRollout(**{k: one[k] for k in HeldOutRollout._fields}) for one in rollouts]
    )
