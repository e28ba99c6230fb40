"""An engine that computes other log-probs than the trainer is named, and may end the run.

Its copy of the model has another rope_theta, by an argument of vLLM's. Not exercised: the place of
the farthest token under splits (tests/unit/test_run_agreement.py), bf16 and quantized engines.
"""

from __future__ import annotations

import re
from pathlib import Path

import digits
import pytest

OTHER_ROPE = {
    "hf_overrides": {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
}


@pytest.mark.full
@pytest.mark.parametrize("most", [None, 0.001])
def test_a_wrong_rope_in_the_engine(tmp_path: Path, most: float | None) -> None:
    """Warned of at the first step and not at each; past train.max_logprob_diff the run ends with an
    error, the step saved."""
    config = digits.write_config(
        tmp_path,
        digits.make_model(tmp_path / "model"),
        train={"num_steps": 2, "max_logprob_diff": most},
        rollout={"engine_args": OTHER_ROPE},
        checkpoint={"every": 5},
    )
    process = digits.start_train(config)
    output, _ = process.communicate(timeout=240)
    said = re.findall(
        r"train step (\d+): generator and trainer disagree by ([\d.e-]+) nats", output
    )
    assert [step for step, _ in said] == ["1"], output
    assert float(said[0][1]) > 0.001
    assert re.search(r"farthest in rollout \d+ .* at response token \d+: generator -", output)
    saved = [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")]
    if most is None:
        assert process.returncode == 0 and saved == ["step_0000002"]
    else:
        assert process.returncode == 1 and saved == ["step_0000001"]
        assert "train.max_logprob_diff is 0.001" in output
