"""The rollout endpoint: wrong requests, strangers, engines that fail, and many sessions at once.

The server and the tokenizer are real, `generate` is scripted.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from made.endpoint import END, MAX_BYTES, Says, client_of, events, user
from made.fleets import until
from made.tool_templates import tool_tokenizer

from sfpo_megatron.rollout.endpoint.server import Endpoint
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.rollout.sampling import call_seed


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tool_tokenizer()


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temperature": 0.0}, "temperature", "found 0.0, expected 0.7, the run's"),
        ({"top_p": 1}, "top_p", "expected 0.9"),
        ({"n": 2}, "n", "found 2, expected nothing or 1"),
        ({"stop": ["\n"]}, "stop", r'found ["\n"]'),
        ({"seed": 1}, "seed", "expected nothing"),
        ({"top_k": 5}, "top_k", "not supported; leave it out"),
        ({"top_logprobs": 3}, "top_logprobs", "expected nothing or 0"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text"),
        ({"tool_choice": "none", "tools": [1]}, "tool_choice", 'nothing or "auto"'),
        ({"max_tokens": 0}, "max_tokens", "a whole number >= 1"),
        ({"max_tokens": True}, "max_tokens", "a whole number >= 1"),
        ({"stream": 1}, "stream", "expected bool"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": None}, "messages", "at least one"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0]", "a role"),
        ({"messages": ["x"]}, "messages[0]", "a role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0]", "a role"),
        ({"messages": [user("x"), {"role": "user", "content": 3}]}, "messages[1]", "found 3"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0]", "no Unicode"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0]",
            "text only",
        ),
        ({"messages": [user([{"type": "text", "text": None}])]}, "messages[0]", "found null"),
        ({"messages": [user([{"type": "text", "text": {}}])]}, "messages[0]", "expected text"),
        ({"messages": [user("x"), {"role": "assistant", "content": "y"}]}, "messages", "the last"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}, user("x")]},
            "messages[0]",
            "expected tool_calls with",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0]", "a function with a name"),
        ({"tools": {}}, "tools", "a list"),
        ({"messages": [user("word " * 3000)]}, "messages", "rollout.max_response_tokens"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told_why(
    endpoint: Endpoint, tokenizer: Any, change: Any, param: str, message: str
) -> None:
    """And harms nobody: the session's next request is answered."""

    async def talk() -> None:
        async with client_of(endpoint, Says(tokenizer, f"a{END}", context_tokens=300)) as client:
            status, body = await client.post({"model": "m", "messages": [user("1")], **change})
            assert status == 400 and set(body) == {"error"}
            error = body["error"]
            assert error["param"] == param and error["type"] == "invalid_request_error"
            assert message in error["message"]
            assert not client.session.turns
            await client.say([user("1")], temperature=0.7, top_p=0.9, stop=None, tool_choice="none")

    asyncio.run(talk())


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 15_000, b'"text"'])
def test_what_is_no_json_object_is_refused(endpoint: Endpoint, tokenizer: Any, body: bytes) -> None:
    async def talk() -> None:
        async with client_of(endpoint, Says(tokenizer)) as client:
            status, answer = await client.post(body)
            assert status == 400 and "the body is no" in answer["error"]["message"]

    asyncio.run(talk())


@pytest.mark.parametrize("key", ["seed", "messages", "tools", "temperature"])
def test_a_body_that_is_nested_deeply_is_refused(
    endpoint: Endpoint, tokenizer: Any, key: str
) -> None:
    """Python reads 900 lists inside of one another here, and cannot write them everywhere."""
    body = f'{{"messages": [{{"role": "user", "content": "1"}}], "{key}": {"[" * 900}{"]" * 900}}}'

    async def talk() -> None:
        async with client_of(endpoint, Says(tokenizer)) as client:
            status, answer = await client.post(body.encode())
            assert status == 400 and "nested deeper than 100" in answer["error"]["message"]

    asyncio.run(talk())


def test_clients_that_go_or_speak_no_http_leave_a_line_each(
    endpoint: Endpoint, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of a body or before a stream begins, by closing or by a reset; no trace of the
    server's stack, and the session goes on."""
    body = json.dumps({"messages": [user("1")], "stream": True})

    async def talk() -> None:
        async with client_of(endpoint, Says(tokenizer, *[f"a{END}"] * 2)) as client:
            start = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            start += f"Authorization: Bearer {client.key}"
            for rest, resets in (
                ("Content-Length: 99\r\n\r\n{", False),
                ("Content-Length: 99\r\n\r\n{", True),
                ("Transfer-Encoding: chunked\r\n\r\n5\r\n{", False),
                (f"Content-Length: {len(body)}\r\n\r\n{body}", True),
                ("Transfer-Encoding: chunked\r\n\r\nZZ\r\n{", False),
                ("Content-Length: -5\r\n\r\n", False),
            ):
                before = len(caplog.records)
                await asyncio.to_thread(_goes, endpoint, f"{start}\r\n{rest}", resets)
                for _ in range(100):
                    if len(caplog.records) > before:
                        break
                    await asyncio.sleep(0.02)
                (record,) = caplog.records[before:]
                assert record.levelname == "WARNING" and not record.exc_info
                assert "\n" not in record.getMessage() and "Error" in record.getMessage()
            await client.say([user("1")])

    asyncio.run(talk())


def _goes(endpoint: Endpoint, request: str, resets: bool) -> None:
    """Send that much, and go."""
    address = urlsplit(endpoint.base_url)
    with socket.create_connection((address.hostname, address.port)) as client:
        client.sendall(request.encode())
        if resets:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_body_that_cannot_be_unpacked_is_refused(endpoint: Endpoint, tokenizer: Any) -> None:
    async def talk() -> None:
        async with client_of(endpoint, Says(tokenizer)) as client, aiohttp.ClientSession() as http:
            headers = {"Authorization": f"Bearer {client.key}", "Content-Encoding": "gzip"}
            url = f"{endpoint.base_url}/chat/completions"
            async with http.post(url, data=b"not packed", headers=headers) as answer:
                error = (await answer.json())["error"]
                assert answer.status == 400 and "cannot be read" in error["message"]

    asyncio.run(talk())


def test_halves_of_surrogate_pairs_in_tools_and_calls(endpoint: Endpoint) -> None:
    """What a client says of tools is read; what a model says of one can be sent back as it is."""
    tokenizer = tool_tokenizer()
    said = '<tool_call>{"name": "a", "arguments": {"x": "\\ud83d é"}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "a", "description": "\ud83d"}}]

    async def talk() -> None:
        async with client_of(endpoint, Says(tokenizer, said + END, f"so{END}")) as client:
            choice = await client.say([user("1")], tools=tools)
            (call,) = choice["message"]["tool_calls"]
            assert call["function"]["arguments"] == '{"x": "\\ud83d \\u00e9"}'
            result = {"role": "tool", "tool_call_id": call["id"], "content": "2"}
            await client.say([user("1"), choice["message"], result], tools=tools)
            assert client.session.num_branches == 1

    asyncio.run(talk())


def test_who_may_ask_what(endpoint: Endpoint, tokenizer: Any) -> None:
    """Keys of no session and of one that has ended, paths and methods that are not there, a body
    that is too large."""
    asked = {"messages": [user("1")]}

    async def talk() -> None:
        async with client_of(endpoint, Says(tokenizer)) as ended:
            pass
        async with client_of(endpoint, Says(tokenizer, f"a{END}")) as client:
            for key in ("sk-other", ended.key, client.key[:-1]):
                status, body = await client.post(asked, key=key)
                assert status == 401 and body["error"]["code"] == "invalid_api_key"
            for path, wanted in (("completions", 404), ("models", 405), ("../metrics", 404)):
                status, body = await client.post(asked, path=path)
                assert status == wanted and "/v1/chat/completions" in body["error"]["message"]
            status, body = await client.post({**asked, "user": "x" * MAX_BYTES})
            assert status == 413 and "at most 20000 bytes" in body["error"]["message"]
            await client.say([user("1")])
            assert len(client.session.turns) == 1

    asyncio.run(talk())


def test_it_listens_on_loopback_alone(endpoint: Endpoint) -> None:
    assert endpoint.base_url.startswith("http://127.0.0.1:")


class Fails(Says):
    async def __call__(self, *args: Any, **more: Any) -> Any:
        raise RolloutError("engine 0 was lost")


def test_what_engines_raise_is_the_sessions(endpoint: Endpoint, tokenizer: Any) -> None:
    async def talk() -> None:
        async with client_of(endpoint, Fails(tokenizer)) as client:
            status, body = await client.post({"messages": [user("1")]})
            assert status == 503 and body["error"]["type"] == "server_error"
            assert isinstance(client.session.failed.exception(), RolloutError)

    asyncio.run(talk())


class Slow(Says):
    """Answers each call when `may_answer` is set."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.may_answer = asyncio.Event()
        self.num_cancelled = 0

    async def __call__(self, *args: Any, **more: Any) -> Any:
        try:
            made = await super().__call__(*args, **more)
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return made


async def given_up(client: Any, messages: list[Any]) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.say(messages), 0.3)


async def in_thread_of(endpoint: Endpoint, function: Callable[[], Any]) -> None:
    async def call() -> None:
        function()

    await endpoint.thread.start(call())


def test_a_session_without_a_turn_waits_for_what_the_model_says(
    endpoint: Endpoint, tokenizer: Any
) -> None:
    """A client that has gone: its turn is the episode, and not recorded."""

    async def talk() -> None:
        says = Slow(tokenizer, f"a{END}")
        async with client_of(endpoint, says) as client:
            await given_up(client, [user("1")])
            closing = endpoint.thread.start(client.session.close())
            await asyncio.sleep(0.1)
            assert not closing.done() and client.session.unread is None
            await in_thread_of(endpoint, says.may_answer.set)
            await closing
            assert client.session.unread and not client.session.turns and not says.num_cancelled

    asyncio.run(talk())


def test_a_session_that_ends_frees_the_engines(endpoint: Endpoint, tokenizer: Any) -> None:
    """What would come too late for the episode is generated no further."""

    async def talk() -> None:
        says = Slow(tokenizer, f"a{END}", f"b{END}", f"c{END}")
        async with client_of(endpoint, says) as client:
            await in_thread_of(endpoint, says.may_answer.set)
            said = await client.say([user("1")])
            await in_thread_of(endpoint, says.may_answer.clear)
            told = [user("1"), said["message"]]
            await given_up(client, [*told, user("2")])
            late = asyncio.ensure_future(client.post({"messages": [*told, user("3")]}))
            await until(lambda: len(says.asked) == 3)
            await endpoint.thread.start(client.session.close())
            assert says.num_cancelled == 2 and len(client.session.turns) == 1
            status, body = await late
            assert status == 410 and "has ended" in body["error"]["message"]

    asyncio.run(talk())


@pytest.mark.parametrize("when", ["under way", "there"])
def test_a_client_that_asks_again_gets_the_turn_that_it_gave_up(
    endpoint: Endpoint, tokenizer: Any, when: str
) -> None:
    """So does openai's, once its timeout is over: that rewrites nothing, and the turn is recorded
    once."""

    async def talk() -> None:
        says = Slow(tokenizer, f"a{END}", f"b{END}")
        async with client_of(endpoint, says) as client:
            for _ in range(2):
                await given_up(client, [user("1")])
            if when == "there":
                await in_thread_of(endpoint, says.may_answer.set)
                await until(lambda: client.session.unread)
                assert not client.session.turns
            again = asyncio.ensure_future(client.say([user("1")]))
            await asyncio.sleep(0.1)
            await in_thread_of(endpoint, says.may_answer.set)
            said = await again
            await client.say([user("1"), said["message"], user("2")])
            session = client.session
            assert said["message"]["content"] == "a" and len(says.asked) == 2
            assert [turn.number for turn in session.turns] == [1, 2]
            assert session.num_branches == 1 and not session.rewritten
            assert says.seeds == [call_seed(3, 0), call_seed(3, 1)]

    asyncio.run(talk())


def test_what_its_client_gave_up_is_no_branch(endpoint: Endpoint, tokenizer: Any) -> None:
    """Until it is asked for after all, beside what was said in its place."""

    async def talk() -> None:
        says = Slow(tokenizer, *(f"{word}{END}" for word in "abcd"))
        async with client_of(endpoint, says) as client:
            await given_up(client, [user("1")])
            await in_thread_of(endpoint, says.may_answer.set)
            await client.say([user("another")])
            session = client.session
            assert session.num_branches == 1 and not session.rewritten
            assert (await client.say([user("1")]))["message"]["content"] == "a"
            assert session.num_branches == 2 and "request 3 kept 0" in session.rewritten
            assert (await client.say([user("1")]))["message"]["content"] == "c"
            assert session.num_branches == 3 and len(set(says.seeds)) == len(says.asked) == 3

    asyncio.run(talk())


# ---- load --------------------------------------------------------------------------------------


def test_256_sessions_at_once_lose_and_double_nothing(endpoint: Endpoint, tokenizer: Any) -> None:
    """Five turns each, some refused requests in between: every session has the tokens that its own
    `generate` gave, in order, and sent each of them back to it."""
    num_sessions, num_turns = 256, 5

    async def one(index: int, http: aiohttp.ClientSession) -> None:
        words = [f"s{index} t{turn}" for turn in range(num_turns)]
        says = Says(tokenizer, *(f"{word}{END}" for word in words), seed=index)
        draw = random.Random(index)
        async with client_of(endpoint, says) as client:
            headers = {"Authorization": f"Bearer {client.key}"}
            messages: list[Any] = [user(f"I am {index}.")]
            for word in words:
                wrong = [{"n": 3}] if draw.random() < 0.2 else []
                for more in (*wrong, {"stream": draw.random() < 0.3}):
                    async with http.post(
                        f"{endpoint.base_url}/chat/completions",
                        json={"messages": messages, **more},
                        headers=headers,
                    ) as answer:
                        text = await answer.text()
                        assert answer.status == (400 if "n" in more else 200), text
                said = (
                    events(text)[0]["choices"][0]["delta"]
                    if more["stream"]
                    else (json.loads(text)["choices"][0]["message"])
                )
                assert said["content"] == word
                messages += [said, user("Go on.")]
            turns = client.session.turns
            assert len(turns) == num_turns and client.session.num_branches == 1
            episode = turns[-1].episode
            pairs = zip(episode.token_ids, episode.response_mask, strict=True)
            wanted = [token for word in words for token in says.spelt(f"{word}{END}")]
            assert [token for token, is_said in pairs if is_said] == wanted
            sent = (*episode.prompt_token_ids, *episode.token_ids)
            assert all(asked == sent[: len(asked)] for asked in says.asked)
            assert len(set(says.seeds)) == num_turns

    async def load() -> float:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            began = time.monotonic()
            await asyncio.gather(*(one(index, http) for index in range(num_sessions)))
            return time.monotonic() - began

    took = asyncio.run(load())
    print(f"{num_sessions * num_turns} turns in {took:.1f} s")
