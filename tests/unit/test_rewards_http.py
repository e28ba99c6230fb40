"""The reward `http` against a real server that is right, away, slow, cut off or broken.

Not exercised: TLS, and a proxy that works.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from made.servers import Answer, Server, free_port, right, send, serving
from own_rewards import problem, rewards

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.reward import HttpRewardConfig, RewardConfig, WeightedReward
from sfpo_megatron.rewards.http import HttpScorer
from sfpo_megatron.rewards.pool import Score, ScoringPool, VerifierError
from sfpo_megatron.rewards.posting import Connection

PAUSE_S = 0.01


def scorer(server: Server, **config: Any) -> HttpScorer:
    settings = {"retries": 2, "concurrency": 1, **config}
    return HttpScorer(HttpRewardConfig(url=server.url, **settings), first_pause_s=PAUSE_S)


def score(server: Server, *responses: str, **config: Any) -> list[Any]:
    opened = scorer(server, **config)
    try:
        return list(opened.score([(problem(name=f"p/{i}"), r) for i, r in enumerate(responses)]))
    finally:
        opened.close()


def body(content: bytes) -> Answer:
    return lambda handler, asked: send(handler, content)


# ---- what it is asked ---------------------------------------------------------------------------


def test_what_the_server_is_asked_and_what_it_answers() -> None:
    prompt = problem(name="p/3", n=(1, 2.5), none=float("nan"), map={1: "é"})

    def answer(handler: BaseHTTPRequestHandler, asked: Any) -> None:
        send(handler, json.dumps([1, {"reward": 0.25, "style": 3}, True]).encode())

    with serving(answer) as server:
        opened = scorer(server)
        found: list[Any] = opened.score([(prompt, "é\ud800"), (prompt, "b"), (prompt, "c")])
        opened.close()
    assert server.asked == [
        {
            "responses": ["é?", "b", "c"],
            "prompts": [
                {
                    "id": "p/3",
                    "question": "6 * 7 =",
                    "answer": "42",
                    "metadata": {"n": [1, 2.5], "none": None, "map": {"1": "é"}},
                }
            ]
            * 3,
        }
    ]
    assert server.headers[0]["Content-Type"] == "application/json"
    assert rewards(found) == [1.0, 0.25, 1.0] and [one.correct for one in found] == [1, 0, 1]
    assert found[1].parts == {"style": 3.0}


def test_batches_are_spread_and_limited_and_come_back_in_order() -> None:
    responses = ["42" if i % 3 else "7" for i in range(50)]
    with serving() as server:
        found = score(server, *responses, concurrency=3, batch_size=8)
        few = score(server, "42", "7", "42", concurrency=3)
    assert rewards(found) == [float(r == "42") for r in responses]
    sizes = [len(asked["responses"]) for asked in server.asked]
    assert sorted(sizes[:7]) == [2] + [8] * 6 and sizes[7:] == [1, 1, 1]
    assert rewards(few) == [1, 0, 1]


def test_as_many_batches_as_concurrency_are_under_way() -> None:
    meeting = threading.Barrier(3)

    def meet(handler: BaseHTTPRequestHandler, asked: Any) -> None:
        meeting.wait(20)
        right(handler, asked)

    with serving(otherwise=meet) as server:
        assert rewards(score(server, "42", "42", "7", concurrency=3)) == [1, 1, 0]


# ---- outages: nothing is lost -------------------------------------------------------------------


def closes(handler: BaseHTTPRequestHandler, asked: Any) -> None:
    """Without a word."""


def cut(handler: BaseHTTPRequestHandler, asked: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"[1.0, ")


def cut_without_length(handler: BaseHTTPRequestHandler, asked: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"[1.0, ")


def cut_in_a_chunk(handler: BaseHTTPRequestHandler, asked: Any) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"8\r\n[1.0")


def drips_headers(handler: BaseHTTPRequestHandler, asked: Any) -> None:
    """A byte now and then: no single wait is long."""
    for byte in b"HTTP/1.0 200 OK\r\nX: " + b"x" * 2000:
        handler.wfile.write(bytes([byte]))
        if handler.server_stopping.wait(0.05):  # type: ignore[attr-defined]
            return


def drips_body(handler: BaseHTTPRequestHandler, asked: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "2000")
    handler.end_headers()
    for _ in range(2000):
        handler.wfile.write(b" ")
        if handler.server_stopping.wait(0.05):  # type: ignore[attr-defined]
            return


def busy(status: int) -> Answer:
    return lambda handler, asked: send(handler, b"later", status)


@pytest.mark.parametrize(
    "fault",
    [closes, cut, cut_without_length, cut_in_a_chunk, busy(503), busy(429), busy(500), busy(408)],
)
def test_a_passing_fault_costs_no_score(fault: Answer, caplog: pytest.LogCaptureFixture) -> None:
    with serving(fault, fault) as server:
        assert rewards(score(server, "42", "7")) == [1, 0]
    assert [len(asked["responses"]) for asked in server.asked] == [2, 2, 2]
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and "pauses and asks again" in said[0] and "answers again" in said[1]


@pytest.mark.parametrize("slow", [drips_headers, drips_body])
def test_the_time_limit_is_of_all_of_the_answer(slow: Answer) -> None:
    def slowly(handler: BaseHTTPRequestHandler, asked: Any) -> None:
        handler.server_stopping = stopping  # type: ignore[attr-defined]
        slow(handler, asked)

    stopping = threading.Event()
    with serving(slowly) as server:
        assert rewards(score(server, "42", timeout_s=0.5)) == [1]
        assert len(server.asked) == 2
        stopping.set()


def test_an_outage_that_does_not_end_is_one_error() -> None:
    with serving(otherwise=closes) as server, pytest.raises(VerifierError) as caught:
        score(server, "42", "7", "42", concurrency=2)
    message = str(caught.value)
    assert server.url in message and "in 3 attempts" in message and "\n" not in message
    assert "RemoteDisconnected" in message or "middle" in message


def test_a_server_that_is_not_there_is_an_error_at_the_start() -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    config = HttpRewardConfig(url=url, retries=1)
    with pytest.raises(VerifierError, match=r"2 attempts \(the last: ConnectionRefusedError"):
        HttpScorer(config, first_pause_s=PAUSE_S)


def test_a_server_that_comes_later_is_waited_for() -> None:
    """It is back after the first attempt has failed, at the same port."""
    port = free_port()
    config = HttpRewardConfig(url=f"http://127.0.0.1:{port}/", retries=0)
    with pytest.raises(VerifierError):
        HttpScorer(config, first_pause_s=PAUSE_S)
    with serving() as server:
        assert rewards(score(server, "42", retries=0)) == [1]


def test_closing_ends_the_pause() -> None:
    with serving(otherwise=closes) as server:
        opened = HttpScorer(HttpRewardConfig(url=server.url, retries=3), first_pause_s=3600.0)
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                opened.score([(problem(), "42")])
            except VerifierError as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while not server.asked:
            thread.join(0.01)
        opened.close()
        thread.join()
    assert "was away when scoring ended" in str(errors[0])


# ---- a broken server: an error, never a wrong answer --------------------------------------------


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (body(b"[1.0]"), ": found 1 entries in [1.0] (list), expected a list of 2"),
        (body(b"[1, 0, 1]"), "found 3 entries"),
        (body(b"[]"), "found 0 entries"),
        (body(b'{"rewards": [1, 0]}'), "expected a list of 2"),
        (body(b"1.0"), "found 1.0 (float), expected a list"),
        (body(b'"10"'), "expected a list"),
        (body(b"null"), "found None"),
        (body(b""), "no JSON"),
        (body(b"<html>hello</html>"), "'<html>hello</html>' (str), which is no JSON"),
        (body(b"[1.0, 0.0"), "no JSON"),
        (body(b"\xff\xfe"), "no JSON"),
        (body(b"[" * 100_000), "no JSON"),
        (busy(404), "status 404 Not Found ('later'), expected 200"),
        (busy(400), "status 400"),
        (busy(401), "status 401"),
        (busy(204), "status 204"),
        (busy(201), "status 201"),
        (
            lambda handler, asked: send(handler, b"", 307, Location="http://else.where/"),
            "a redirection to http://else.where/",
        ),
        (lambda handler, asked: send(handler, b"", 302, Location="/x"), "a redirection to /x"),
    ],
)
def test_what_is_no_answer_is_an_error_at_once(answer: Answer, found: str) -> None:
    with serving(otherwise=answer) as server, pytest.raises(VerifierError) as caught:
        score(server, "42", "7")
    assert len(server.asked) == 1, "asked again, in vain"
    assert found in str(caught.value) and server.url in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry", ["NaN", "Infinity", "2.0", "-0.5", "null", '"1"', "[1]", "{}", '{"reward": NaN}',
              '{"reward": 1, "style": "x"}']
)  # fmt: skip
def test_an_entry_that_is_no_score_names_its_prompt(entry: str) -> None:
    with serving(body(f"[1, {entry}]".encode())) as server:
        first, second = score(server, "42", "7")
    assert isinstance(first, Score) and first.reward == 1
    assert isinstance(second, VerifierError)
    assert str(second).startswith(f"prompt p/1: reward.function http ({server.url}) returned no")


# ---- proxies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_is_not_used_for_loopback(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with serving() as server:
        assert rewards(score(server, "42")) == [1]
        server.url = server.url.replace("127.0.0.1", "localhost")
        assert rewards(score(server, "42")) == [1]


def test_a_proxy_is_used_for_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked with the whole address; NO_PROXY is heeded."""
    with serving(body(b"[1]")) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        far = Connection("http://scores.invalid/x", 5.0)
        far.reach()
        assert far.post(b"{}")[0] == b"[1]"
        assert proxy.headers[0]["Host"] == "scores.invalid"
        monkeypatch.setenv("no_proxy", "scores.invalid")
        assert not Connection("http://scores.invalid/x", 5.0)._proxies.proxies


# ---- in a pool ----------------------------------------------------------------------------------


def test_a_sum_of_a_server_and_a_function() -> None:
    both = (WeightedReward(name="http", weight=0.5), WeightedReward(name="exact_match"))

    def half(handler: BaseHTTPRequestHandler, asked: Any) -> None:
        send(handler, json.dumps([{"reward": 0.5, "style": 2}] * len(asked["responses"])).encode())

    with serving(otherwise=half) as server:
        config = RewardConfig(function=both, http=HttpRewardConfig(url=server.url))
        with ScoringPool(config) as pool:
            found = pool.score([(problem(), "42"), (problem(), "7")])
    assert rewards(found) == [1.25, 0.25] and not any(one.correct for one in found)
    assert found[0].parts == {"http": 0.5, "http/style": 2.0, "exact_match": 1.0}


def test_a_server_alone_needs_no_process() -> None:
    with serving() as server:
        config = RewardConfig(function="http", http=HttpRewardConfig(url=server.url))
        with ScoringPool(config) as pool:
            assert pool.worker_pids == []
            assert rewards(pool.score([(problem(), "42"), (problem(), "7")])) == [1, 0]
            assert pool.score([]) == []


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("localhost:8000", "scheme"),
        ("ftp://x/", "scheme"),
        ("http://", "no host"),
        ("http://x:99999/", "Port"),
        ("http://x:0/", "no host and port"),
        ("http://user:secret@x/", "RUN/config.yaml"),
        ("http://x/a b", "blank"),
        ("", "scheme"),
    ],
)
def test_an_address_that_is_none(url: str, found: str) -> None:
    with pytest.raises(FieldError, match=rf"^url: .*{found}"):
        HttpRewardConfig(url=url)


def test_calls_in_several_threads_are_under_way_together() -> None:
    """The controller scores a few rollouts a call."""
    meeting = threading.Barrier(2)

    def meet(handler: BaseHTTPRequestHandler, asked: Any) -> None:
        meeting.wait(20)
        right(handler, asked)

    with serving(otherwise=meet) as server:
        http = HttpRewardConfig(url=server.url, concurrency=2)
        with ScoringPool(RewardConfig(function="http", http=http)) as pool:
            with ThreadPoolExecutor(2) as threads:
                calls = [threads.submit(pool.score, [(problem(), text)]) for text in ("42", "7")]
            assert [rewards(call.result()) for call in calls] == [[1.0], [0.0]]
