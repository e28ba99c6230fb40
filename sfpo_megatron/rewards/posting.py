"""One POST with a limit on all of it, and what its failures mean. Standard library only.

The environment's proxies are used, but never for this machine's own addresses: a proxy elsewhere
has another loopback.
"""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.error
import urllib.request
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from sfpo_megatron.host.addresses import is_loopback

_MAX_ANSWER_BYTES = 64 << 20
_SHOWN_BYTES = 200
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of a server that may do better later."""


class Unavailable(Exception):
    """The server may answer another time: it is away, slow, overloaded, or was cut off."""


class Refused(Exception):
    """The server answers, and another time it would answer the same."""


class Connection:
    """The way to one address."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._parts = urlsplit(url)
        host = self._parts.hostname or ""
        direct = is_loopback(host) or urllib.request.proxy_bypass(host)
        proxies = {} if direct else urllib.request.getproxies()
        self._is_direct = self._parts.scheme not in proxies
        self._proxies = urllib.request.ProxyHandler(proxies)

    def reach(self) -> None:
        """Raise Unavailable if nothing listens there; a proxy is not asked."""
        if not self._is_direct:
            return
        port = self._parts.port or (443 if self._parts.scheme == "https" else 80)
        try:
            socket.create_connection((self._parts.hostname or "", port), self._timeout_s).close()
        except OSError as error:
            raise Unavailable(_reason(error)) from error

    def post(self, body: bytes) -> tuple[bytes, bool]:
        """The answer to JSON, and whether it is known to be whole."""
        watch = _Watch(self._timeout_s)
        opener = urllib.request.build_opener(self._proxies, _Plain(watch), _Secure(watch), _Stay())
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with watch, opener.open(request, timeout=self._timeout_s) as answer:
                content = answer.read(_MAX_ANSWER_BYTES + 1)
                is_whole = answer.headers["Content-Length"] is not None or answer.chunked
                status = answer.status
                if len(content) > _MAX_ANSWER_BYTES:
                    raise Refused(f"an answer of over {_MAX_ANSWER_BYTES >> 20} MiB")
                if answer.length:  # `read` with a number does not say that it was cut
                    raise Unavailable("it closed the connection in the middle of its answer")
        except urllib.error.HTTPError as error:
            raise _status(error, watch) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise watch.unavailable(error) from error
        if watch.has_ended:
            raise watch.unavailable(None)
        if status != 200:
            raise Refused(f"status {status}, expected 200")
        return content, is_whole


class _Watch:
    """Ends the connection when the time for all of it is over: a socket's own timeout starts again
    with each byte that comes."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._timer = threading.Timer(timeout_s, self._end)
        self._timer.daemon = True
        self._socket: socket.socket | None = None
        self.has_ended = False

    def connected(self, connection: socket.socket) -> None:
        """Watch this one."""
        self._socket = connection
        if self.has_ended:
            self._end()

    def unavailable(self, error: Exception | None) -> Unavailable:
        """What an exchange that failed has failed of."""
        if self.has_ended or isinstance(error, TimeoutError):
            return Unavailable(f"no answer within {self._timeout_s:g} s")
        return Unavailable(_reason(error))

    def _end(self) -> None:
        self.has_ended = True
        if self._socket is not None:
            try:
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # of TLS, too, the socket
            except OSError:
                pass  # closed already

    def __enter__(self) -> _Watch:
        self._timer.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._timer.cancel()


class _HTTP(http.client.HTTPConnection):
    """A connection whose socket the watch knows."""

    def __init__(self, host: str, *, watch: _Watch, **options: Any) -> None:
        super().__init__(host, **options)
        self._watch = watch

    def connect(self) -> None:
        super().connect()
        self._watch.connected(self.sock)


class _HTTPS(_HTTP, http.client.HTTPSConnection):
    """The same over TLS: `super()` above is HTTPSConnection here."""


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_HTTP, watch=self._watch), req)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_HTTPS, watch=self._watch), req)


class _Stay(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would become a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _status(error: urllib.error.HTTPError, watch: _Watch) -> Unavailable | Refused:
    try:
        text = error.read(_SHOWN_BYTES).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException, ValueError):
        text = ""
    finally:
        error.close()
    said = f"status {error.code} {error.reason}" + (f" ({text!r})" if text else "")
    if location := error.headers.get("Location"):
        said += f", a redirection to {location}"
    if error.code in _PASSING or watch.has_ended:
        return Unavailable(said)
    return Refused(f"{said}, expected 200")


def _reason(error: Exception | None) -> str:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected):
        return "it closed the connection in the middle of its answer"
    said = str(error).splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
