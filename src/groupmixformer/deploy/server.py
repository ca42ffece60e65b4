"""uvicorn with what it leaves to a proxy in front of it: limits on connections, a check of the Host header, an access log.

uvicorn (0.54) waits for the rest of a header for ever and takes connections until descriptors run out. Hypercorn and Granian
limit neither together with the number of connections, so a subclass of uvicorn's protocol does both.
"""

import asyncio
import contextlib
import functools
import logging
import os
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import h11
import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..files import to_json

# Seconds that a connection may spend in a state; after those it is cut.
SECONDS = {
    "header": 10,  # waiting for a request, or for the rest of its header; uvicorn ends those that wait between requests after 5
    "body": 120,
    "rest": 30,  # of a body that was answered before it was read: uvicorn reads it on, else a TCP reset takes the answer away
    "answer": 60,  # that the client does not take in
    "closing": 5,
}
INTERVAL = 1.0  # seconds between two looks at the states
ACCEPTED = 16  # connections that asyncio takes in at a time
# Descriptors that are left for all else. A connection that is turned away keeps its own for four turns of the event loop.
SPARE = 4 * ACCEPTED + 36
BACKLOG = 1024  # connections that the system keeps waiting


class Rarely(logging.Filter):
    """Lets one record a second of each logger through, so that whoever causes them cannot fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to log a record."""
        now = time.monotonic()
        passed = now - self._last.get(record.name, -1) >= 1
        if passed:
            self._last[record.name] = now
        return passed


LOGGER = logging.getLogger(__name__)
RARELY = Rarely()
LOGGER.addFilter(Rarely())


def available_connections(most: int) -> int:
    """Return `most`, or less where the process may not open as many descriptors.

    Raises:
        ValueError: If none is left.
    """
    try:
        import resource
    except ImportError:  # Windows counts no descriptors
        return most
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return most
    free = limit - len(os.listdir("/dev/fd")) - SPARE  # noqa: PTH208
    if free < 1:
        raise ValueError(f"the limit of {limit} open files leaves none for connections: raise it, such as by ulimit -n 1024")
    return min(most, free)


class Connections:
    """The connections of a server, none of which is kept longer than its state allows.

    Args:
        most: At once. For another one is closed that has little to lose: it waits for a request, or its request was answered.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._states: dict[Protocol, tuple[tuple[str, Any], float]] = {}  # each with its request, and since when

    def admit(self, new: "Protocol") -> bool:
        """Tell whether there is room for a connection, making some if need be."""
        if len(self._states) >= self.most:
            LOGGER.warning("%d connections are open, the most that are taken: closing some", self.most)
            held = Counter(one.address for one in self._states)
            idle = [one for one in self._states if one.state() != "working"]
            if not idle:
                return False
            # Of whoever holds most, the one that has stood still longest; a body that is being sent only if there is no other.
            closed = min(idle, key=lambda one: (one.state() == "body", -held[one.address], self._states[one][1]))
            self.remove(closed)
            closed.transport.abort()
        if not self._states:
            new.loop.call_later(INTERVAL, self._sweep, new.loop)
        self._states[new] = ("header", None), time.monotonic()
        return True

    def remove(self, one: "Protocol") -> None:
        """Forget a connection, if it is known."""
        self._states.pop(one, None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = time.monotonic()
        for one, (before, since) in list(self._states.items()):
            state = one.state()
            if before != (state, one.cycle):
                self._states[one] = (state, one.cycle), now
            elif now - since > SECONDS.get(state, float("inf")):
                one.transport.abort()
        if self._states:
            loop.call_later(INTERVAL, self._sweep, loop)


class Protocol(H11Protocol):
    """uvicorn's protocol of a connection, counted and watched."""

    def __init__(self, table: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._table = table

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or close it."""
        self.transport = transport
        if self._table.admit(self):
            super().connection_made(transport)
        else:
            transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Note that it is gone."""
        self._table.remove(self)
        super().connection_lost(error)

    @property
    def address(self) -> str:
        """The client's, as the system gives it."""
        return self.client[0] if self.client else ""

    def state(self) -> str:
        """Return a key of SECONDS, or "working" while it is the server that takes its time."""
        answered = self.cycle is None or self.cycle.response_complete
        if self.transport.is_closing():
            return "closing"
        if self.flow is not None and self.flow.write_paused:
            return "answer"
        if self.conn.their_state is h11.SEND_BODY:
            return "rest" if answered else "body"
        return "header" if answered else "working"


def request_id(scope: Scope) -> str:
    """Return the id of a request: its header X-Request-ID if that is a plain word, or one that is made for it."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        given = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = given if re.fullmatch(r"[\w.:/+=@-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
    return str(state["request_id"])


def refusal(scope: Scope, status: int, reason: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the answer to a request that is not met, in the one form that all of them have."""
    return JSONResponse({"error": reason, "request_id": request_id(scope)}, status, headers)


class _Front:
    """ASGI: refuses requests for other hosts, gives all an id, and logs them.

    Args:
        app: Answers the rest.
        known: Tells whether a host's name is one of this server's.
        log: Print a line of JSON for each request.
    """

    def __init__(self, app: ASGIApp, known: Callable[[str], bool], log: bool) -> None:
        self._app, self._known, self._log = app, known, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, size, identifier = time.perf_counter(), None, 0, request_id(scope)

        async def note(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = identifier
            status, size = message.get("status", status), size + len(message.get("body", b""))
            await send(message)

        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        app = self._app
        if host and not self._known(host):  # browsers always name one; HTTP/1.0 needs none
            app = refusal(scope, 400, f"got Host {host[:100]}, expected one of this server: see --allowed-hosts")
        try:
            await app(scope, receive, note)
        finally:
            if self._log:
                line = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "request_id": identifier,
                    "client": scope["client"][0] if scope.get("client") else None,
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": status,  # none if the client went away before
                    "ms": round(1000 * (time.perf_counter() - start), 2),
                    "bytes": size,
                }
                with contextlib.suppress(OSError):  # nobody reads it any more
                    print(to_json(line), flush=True)


def _hosts(listening: socket.socket, host: str, allowed: Sequence[str]) -> Callable[[str], bool]:
    """Return what tells whether a Host header names this server.

    A page of another site can reach it under a name of that site (DNS rebinding), never under an IP address. So where it
    listens on all addresses, any address is taken, beside localhost, the machine's own name, and those that are allowed.
    """
    bound = ip_address(listening.getsockname()[0].partition("%")[0])
    names = {"localhost", host.lower(), *(name.lower() for name in allowed)}
    if bound.is_unspecified:
        names.add(socket.gethostname().lower())

    def known(header: str) -> bool:
        try:
            name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
        except ValueError:
            name = ""
        if any(fnmatchcase(name, pattern) for pattern in names):
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        return bound.is_unspecified or address == bound or (bound.is_loopback and address.is_loopback)

    return known


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Open a port; 0 takes one that is free.

    Returns:
        The socket and its address for a browser.

    Raises:
        ValueError: If there is no such host or the port is taken.
    """
    try:
        opened = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error}: choose others with --host and --port") from error
    shown = f"[{host}]" if ":" in host else host
    return opened, f"http://{shown}:{opened.getsockname()[1]}"


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and let more connections wait than are taken in at a time: asyncio has one number for both."""
        await super().startup(sockets)
        for opened in sockets or ():
            opened.listen(BACKLOG)


def server(
    app: ASGIApp,
    listening: socket.socket,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
    connections: int = 512,
    access_log: bool = False,
    patience: int | None = None,
) -> uvicorn.Server:
    """Return what serves until SIGTERM or Ctrl-C, and then answers what was taken in: ``server(app, socket).run([socket])``.

    Args:
        app: The routes.
        listening: What it will run on.
        host: Name or address that was asked for.
        allowed_hosts: Names of this server beside it, as patterns: ``*.example.com``, ``*`` for any.
        connections: At once; fewer if the process may not open as many files.
        access_log: Print a line of JSON on stdout for each request.
        patience: Seconds after which connections are cut, without a word, when it is stopped; none by default.

    Raises:
        ValueError: If the process may open too few files.
    """
    table = Connections(available_connections(connections))
    if logging.lastResort:  # libraries warn of every bad request, asyncio of every connection for which no descriptor is left
        logging.lastResort.addFilter(RARELY)
    config = uvicorn.Config(
        _Front(app, _hosts(listening, host, allowed_hosts), access_log),
        http=functools.partial(Protocol, table),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        backlog=ACCEPTED,
        log_level="critical" if patience else "error",  # requests that are no HTTP would be warned of, as many as come
        access_log=False,
        timeout_graceful_shutdown=patience,
    )
    return _Server(config)
