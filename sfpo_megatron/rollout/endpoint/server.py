"""Serves sessions on loopback: the API key of a request says which is asked."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from aiohttp import web

from sfpo_megatron.host.event_loops import LoopThread
from sfpo_megatron.rollout.endpoint.protocol import (
    ApiError,
    JsonObject,
    Sampling,
    chunks,
    completion_body,
    parse_request,
)
from sfpo_megatron.rollout.endpoint.session import Session

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
HOST = "127.0.0.1"
MODEL = "policy"
"""What the model is called; a request may call it anything."""
_START_S = 30.0

log = logging.getLogger(__name__)


class _InALine(logging.Filter):
    """Says what was wrong with a client's request, or that the client has gone, without the stack
    of the server: a fault of ours is logged where it is answered (`Endpoint._errors`)."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            what = " ".join(str(error).split())
            record.msg, record.args = f"{record.getMessage()}: {type(error).__name__}: {what}", ()
            record.exc_info = None
            record.levelno, record.levelname = (
                logging.WARNING,
                logging.getLevelName(logging.WARNING),
            )
        return True


_clients = log.getChild("clients")
_clients.addFilter(_InALine())


class Endpoint:
    """The server, in a thread of its own from when it is made until `close`."""

    def __init__(self, *, max_request_bytes: int) -> None:
        self._max_request_bytes = max_request_bytes
        self._sessions: dict[str, tuple[Session, Sampling]] = {}
        self.shared_key = _new_key()
        """Key of clients that cannot have one for each session (`also`)."""
        self.thread = LoopThread("rollout-endpoint")
        """Runs all that sessions do."""
        self.base_url: str = self.thread.call(self._start(), timeout_s=_START_S)
        """What clients of the protocol take as such."""

    @contextmanager
    def serving(self, session: Session, sampling: Sampling) -> Iterator[str]:
        """The API key under which `session` is asked, meanwhile."""
        key = _new_key()
        self._sessions[key] = (session, sampling)
        try:
            yield key
        finally:
            for name in [n for n, (served, _) in list(self._sessions.items()) if served is session]:
                del self._sessions[name]

    def also(self, key: str, session_id: str) -> None:
        """Serve the session of `key` to those too who have the endpoint's shared key and send this
        as X-Session-ID."""
        self._sessions[f"{self.shared_key} {session_id}"] = self._sessions[key]

    def close(self) -> None:
        """Serve no more."""
        self.thread.close()

    async def _start(self) -> str:
        app = web.Application(client_max_size=self._max_request_bytes, middlewares=[self._errors])
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app, access_log=None, logger=_clients, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        return f"http://{HOST}:{runner.addresses[0][1]}/v1"

    # ---- requests ------------------------------------------------------------------------------

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        session, sampling = self._asked(request)
        asked = parse_request(await request.read(), sampling)
        answer = await session.answer(asked, is_awaited=lambda: _is_connected(request))
        created = int(time.time())
        if asked.stream:
            return await _streamed(request, chunks(asked, answer, created))
        return web.json_response(completion_body(asked, answer, created))

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._asked(request)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "sfpo-megatron"}
        return web.json_response({"object": "list", "data": [model]})

    def _asked(self, request: web.Request) -> tuple[Session, Sampling]:
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        if key == self.shared_key:
            key = f"{key} {request.headers.get('X-Session-ID', '')}"
        if kind.lower() != "bearer" or key not in self._sessions:
            raise ApiError(
                "found no API key of an episode that runs, expected the one that the agent was "
                "given, as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )
        return self._sessions[key]

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whatever goes wrong, in the protocol's own form."""
        try:
            return await handler(request)
        except ApiError as error:
            return _error(error)
        except web.HTTPRequestEntityTooLarge:
            most = f"expected at most {self._max_request_bytes} bytes"
            return _error(ApiError(f"the body is too large, {most}", status=413))
        except web.RequestPayloadError as error:
            what = " ".join(str(error).split())
            return _error(ApiError(f"the body cannot be read: {what}"))
        except web.HTTPException as error:
            what = f"{request.method} {request.path}: {error.reason}"
            expected = "expected POST /v1/chat/completions or GET /v1/models"
            return _error(ApiError(f"{what}; {expected}", status=error.status))
        except ConnectionError:
            raise  # the client has gone: `_clients` says so
        except Exception as error:
            log.exception("a request failed")
            return _error(ApiError(f"{type(error).__name__}: {error}", status=500))


def _new_key() -> str:
    return f"sk-{secrets.token_urlsafe(24)}"


def _error(error: ApiError) -> web.Response:
    return web.json_response(error.body, status=error.status)


def _is_connected(request: web.Request) -> bool:
    """Whether the client still waits: it may have asked again on another connection."""
    return request.transport is not None and not request.transport.is_closing()


async def _streamed(request: web.Request, events: list[JsonObject]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response
