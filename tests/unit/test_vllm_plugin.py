"""Our plug-in in a vLLM of another version: its processes go on, and engines of ours say why not.

Not exercised: such a version itself.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from sfpo_megatron.resharding.transports import register
from sfpo_megatron.rollout.vllm_arguments import require_transports

FACTORY = "vllm.distributed.weight_transfer.factory"


@pytest.fixture
def other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the module, and not all of its names."""
    monkeypatch.setitem(sys.modules, FACTORY, ModuleType(FACTORY))


@pytest.mark.usefixtures("other_version")
def test_a_process_that_is_not_ours_is_warned_once(caplog: pytest.LogCaptureFixture) -> None:
    register()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "has registered nothing with this vLLM" in record.getMessage()
    assert "ImportError: cannot import name 'WeightTransfer" in record.getMessage()


@pytest.mark.usefixtures("other_version")
def test_an_engine_of_ours_is_refused() -> None:
    with pytest.raises(RuntimeError, match="found another version than this package is for; inst"):
        require_transports()
