"""A refit's rank-side pieces, without vllm and without engines: the steps that all ranks take, and
what each kind of rank does when an update goes well, meets nobody or fails.

Not exercised: transports and engines (tests/e2e/test_refit.py, test_stock_transports.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.resharding.checksums import checksum
from sfpo_megatron.resharding.filling import ShardFiller
from sfpo_megatron.resharding.parts import EveryRank, Follower, Sender
from sfpo_megatron.resharding.source_pass import IntroductionFailed
from sfpo_megatron.resharding.stepwise import Stepwise
from sfpo_megatron.resharding.streams import Streams
from sfpo_megatron.resharding.transports import shared_file
from sfpo_megatron.resharding.transports.tensor_names import Bucket


class Recorder(Stepwise[str]):
    """Notes its steps; `fails_at` is the step that raises."""

    def __init__(self, num_rounds: int, fails_at: int = -1) -> None:
        super().__init__(num_rounds)
        self.manifest: list[TensorMeta] = []
        self.steps: list[str] = []
        self.fails_at = fails_at

    def _note(self, step: str) -> None:
        self.steps.append(step)
        if len(self.steps) - 1 == self.fails_at:
            raise RuntimeError(step)

    def _attach(self, where: str | None) -> None:
        self._note("attach")

    def _begin(self) -> None:
        self._note("begin")

    def follow_round(self) -> None:
        self._note(f"round {self.take_round()}")

    def _end(self) -> bool:
        self._note("end")
        return True


def steps(*, fresh: bool, num_rounds: int) -> list[str]:
    rounds = [f"round {number}" for number in range(num_rounds)]
    return [*(["attach"] if fresh else []), "begin", *rounds, "end"]


@given(st.integers(0, 4), st.booleans(), st.data())
def test_the_steps_are_the_same_wherever_one_fails(
    num_rounds: int, fresh: bool, data: st.DataObject
) -> None:
    """The failing rank has taken part in the step that failed, as the others have: it goes on with
    the next one, and never takes one twice."""
    expected = steps(fresh=fresh, num_rounds=num_rounds)
    recorder = Recorder(num_rounds, data.draw(st.integers(0, len(expected) - 1)))
    recorder.restart(fresh=fresh, verify=False)
    with pytest.raises(RuntimeError):
        recorder.follow()
    recorder.follow()
    assert recorder.steps == expected
    recorder.follow()  # an update that has ended has nothing left
    assert recorder.steps == expected


class End:
    """A sending end that takes part in `num_steps` steps of the driver, then fails or is done."""

    def __init__(self, driver: Recorder, error: Exception | None = None) -> None:
        self.lost = False
        self.is_open = True
        self._driver, self._error = driver, error

    def send_weights(self, weight_version: str) -> int:
        if self._error is not None:
            self._driver.begin()
            raise self._error
        self._driver.follow()
        return 7

    def shutdown(self) -> None:
        self.is_open = False


class Client:
    """The fleet's answers."""

    def __init__(self) -> None:
        self.knows = True
        self.skipped: list[str | None] = []

    def needs_introduction(self) -> bool:
        return not self.knows

    def skip_update(self, reason: str | None) -> None:
        self.skipped.append(reason)


def send(part: Any, driver: Recorder) -> int:
    """Send, as `Refit.send` does."""
    driver.steps.clear()
    fresh = part.needs_new_end()
    driver.restart(fresh=fresh, verify=False)
    return part.send("1", fresh=fresh)


def test_the_sender_keeps_its_end_until_it_is_lost_or_not_known() -> None:
    driver, client, made = Recorder(2), Client(), list[End]()

    def connect() -> End:
        made.append(End(driver))
        return made[-1]

    part = Sender(driver, client, connect)  # type: ignore[arg-type]
    assert send(part, driver) == 7 and driver.steps == steps(fresh=True, num_rounds=2)
    assert send(part, driver) == 7 and driver.steps == steps(fresh=False, num_rounds=2)
    assert len(made) == 1
    made[0].lost = True
    assert send(part, driver) == 7 and len(made) == 2 and not made[0].is_open
    client.knows = False
    assert send(part, driver) == 7 and len(made) == 3 and not made[1].is_open
    part.close()
    assert not made[2].is_open and client.skipped == []


@pytest.mark.parametrize("where", ["connecting", "sending"])
def test_a_sender_that_fails_follows_to_the_end_and_raises(where: str) -> None:
    driver, client = Recorder(2), Client()
    error = RuntimeError("refused")

    def connect() -> End:
        if where == "connecting":
            raise error
        return End(driver, error)

    with pytest.raises(RuntimeError, match="refused"):
        send(Sender(driver, client, connect), driver)  # type: ignore[arg-type]
    assert sorted(driver.steps) == sorted(steps(fresh=True, num_rounds=2))
    assert client.skipped == []


@pytest.mark.parametrize(("error", "reason"), [(IntroductionFailed("no route"), "no route"),
                                               (IntroductionFailed(), None)])  # fmt: skip
def test_a_sender_that_meets_nobody_skips_the_update(error: Exception, reason: Any) -> None:
    driver, client = Recorder(2), Client()

    def connect() -> End:
        raise error

    part = Sender(driver, client, connect)  # type: ignore[arg-type]
    for times in (1, 2):  # it has no end: the next one is fresh again
        assert send(part, driver) == 0
        assert driver.steps == steps(fresh=True, num_rounds=2)
        assert client.skipped == [reason] * times


def test_a_follower_takes_every_step() -> None:
    driver = Recorder(3)
    driver.restart(fresh=True, verify=False)
    assert Follower(driver).send("1", fresh=True) == 0
    assert driver.steps == steps(fresh=True, num_rounds=3)


class Control:
    """Two ranks; `other` is what the other one answers to `max`."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.other = 0.0

    def broadcast_json(self, value: Any) -> Any:
        return {"num_workers": 1} if value is None else value

    def max(self, values: Tensor) -> Tensor:
        return torch.maximum(values, torch.tensor(self.other))


@pytest.mark.parametrize("is_sender", [True, False])
def test_either_every_rank_has_an_end_or_none(is_sender: bool) -> None:
    driver, client, made, control = Recorder(1), Client(), list[End](), Control()
    errors: list[Exception] = []

    class Ends:
        def place(self, client: Any) -> dict[str, Any]:
            return {"num_workers": 1}

        def meet(self, place: Any, client: Any) -> End:
            if errors:
                raise errors.pop()
            made.append(End(driver))
            return made[-1]

    part = EveryRank(Ends(), control, client if is_sender else None)  # type: ignore[arg-type]
    assert part.needs_new_end() == is_sender
    sent = 7 if is_sender else 0
    driver.restart(fresh=True, verify=False)
    assert part.send("1", fresh=True) == sent
    driver.restart(fresh=False, verify=False)
    assert part.send("2", fresh=False) == sent and len(made) == 1
    # Another rank could not meet the engines: this one gives its end back.
    control.other = 1.0
    driver.restart(fresh=True, verify=False)
    assert part.send("3", fresh=True) == 0 and [end.is_open for end in made] == [False, False]
    assert client.skipped == ([None] if is_sender else [])
    # This one could not, and says why; what is no failure to meet is raised, after all have heard.
    control.other = 0.0
    errors.append(IntroductionFailed("no route"))
    assert part.send("3", fresh=True) == 0
    assert client.skipped == ([None, "no route"] if is_sender else [])
    errors.append(ImportError("no nccl"))
    with pytest.raises(ImportError, match="no nccl"):
        part.send("3", fresh=True)
    # Another rank's end is lost: so is this one's, and the sender makes new ones.
    assert part.send("4", fresh=True) == sent
    control.other = 1.0
    part.send("5", fresh=False)
    assert made[-1].lost and part.needs_new_end() == is_sender


class Shards:
    """A `ShardedSource` of one rank."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.control = self
        self.rank = 0
        self.leaders = [0] * len(tensors)
        self.tensors = tensors

    def metadata(self) -> list[TensorMeta]:
        return [
            TensorMeta(name=str(i), shape=tuple(t.shape), dtype=t.dtype)
            for i, t in enumerate(self.tensors)
        ]

    def prepare(self) -> None:
        pass

    def checksum(self, index: int) -> int:
        return checksum(self.tensors[index])

    def sum(self, values: Tensor) -> Tensor:
        return values


def test_checksums_are_of_the_update_that_is_verified() -> None:
    """And there are none in the next one: engines would compare its tensors with the last ones'."""
    source = Shards([torch.arange(6.0), torch.ones(3)])
    streams = Streams(source, bucket_bytes=4096, backend="gloo", timeout_s=1.0)  # type: ignore[arg-type]
    for verify in (True, False, True):
        source.tensors[0] += 1
        streams.restart(fresh=False, verify=verify)
        streams.begin()
        wanted = [checksum(tensor) for tensor in source.tensors]
        mod = [number % 2**64 for number in streams.checksums or []]
        assert mod == ([number % 2**64 for number in wanted] if verify else [])
        assert (streams.checksums is None) == (not verify)


class PartsOfTwoRanks(Shards):
    """Notes what a filler does; this rank has the first half of each tensor, `others` are the
    checksums of the other's."""

    def __init__(self, tensors: list[Tensor], others: list[int]) -> None:
        super().__init__(tensors)
        self.others = others
        self.events: list[str] = []

    def broadcast_json(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        self.events.append("all ranks")

    def write(self, index: int, target: Tensor) -> None:
        half = target.numel() // 2
        target[:half] = self.tensors[index][:half]
        self.events.append(f"write {index}")

    def checksum(self, index: int) -> int:
        whole = self.tensors[index]
        return checksum(whole[: whole.numel() // 2], whole.shape)

    def sum(self, values: Tensor) -> Tensor:
        self.events.append("all have written")
        return values + torch.tensor(self.others)

    def max(self, values: Tensor) -> Tensor:
        return torch.maximum(values, torch.tensor(self.others))


def test_shards_are_written_while_the_bucket_is_everybodys(tmp_path: Path) -> None:
    """Not before the sender comes by, which has seen the last round read; and the sender goes on
    when all have written. A tensor's checksum is the sum of its pieces'."""
    tensors = [torch.arange(6.0), torch.arange(4.0) - 9]
    halves = [checksum(t[t.numel() // 2 :], t.shape, start=t.numel() // 2) for t in tensors]
    source = PartsOfTwoRanks(tensors, halves)
    filler = ShardFiller(source)  # type: ignore[arg-type]
    file = tmp_path / "buffer"
    file.write_bytes(bytes(64))
    filler.attach((str(file), 64))
    assert source.events == ["all ranks"]  # all have mapped it: the sender may unlink it
    for verify in (True, False):
        source.events.clear()
        filler.begin(verify=verify)
        sums = filler.fill(Bucket(first=0, offsets=(0, 32)), None)
        assert source.events == ["all ranks", "write 0", "write 1", "all have written"]
        wanted = [checksum(tensor) % 2**64 for tensor in tensors]
        assert ([number % 2**64 for number in sums] if sums else sums) == (
            wanted if verify else None
        )
    written = shared_file.map_bytes(file, 64).view(torch.float32)
    assert written[:3].tolist() == [0, 1, 2] and written[8:10].tolist() == [-9, -8]
