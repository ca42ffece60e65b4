"""The server's front: connections that are held, names that are not its own, answers that arrive, and what is logged."""

import asyncio
import contextlib
import json
import logging
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse

from groupmixformer import GroupMixFormer
from groupmixformer.deploy import server as front
from groupmixformer.deploy.server import available_connections, listen, server
from groupmixformer.models.checkpoint import save_checkpoint

TINY = {"embed_dims": [20, 30, 40, 50], "depths": [1] * 4, "mlp_ratios": [2] * 4}


async def app(scope, receive, send):
    """Answer by path: /early before the body is read, /body after, /large with 20 MB, /wait after the body's seconds."""
    path = scope["path"]
    if scope["type"] == "lifespan":
        raise ValueError("has none")
    if path != "/early":
        body = b""
        while (message := await receive()).get("more_body") or message.get("body"):
            body += message["body"]
            if not message["more_body"]:
                break
        if path == "/wait":
            await asyncio.sleep(float(body))
    answer = PlainTextResponse(bytes(20_000_000)) if path == "/large" else JSONResponse({"path": path})
    await answer(scope, receive, send)


@contextlib.contextmanager
def running(host="127.0.0.1", **options):
    """A server of `app` in a thread: its port."""
    listening, _ = listen(host, 0)
    made = server(app, listening, host, **options)
    thread = threading.Thread(target=made.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        made.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def fast(monkeypatch):
    """Looks at the connections often, and a function that sets the seconds of a state; all others last an hour."""
    monkeypatch.setattr(front, "INTERVAL", 0.02)

    def limit(**seconds):
        monkeypatch.setattr(front, "SECONDS", {state: seconds.get(state, 3600) for state in front.SECONDS})

    return limit


def client(port, sent=b""):
    opened = socket.create_connection(("127.0.0.1", port), timeout=20)
    opened.sendall(sent)
    return opened


def ended(opened, seconds=0.0):
    """Whether the other side has closed or cut a connection."""
    opened.settimeout(seconds or 0.001)
    try:
        return opened.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def received(opened):
    """How many bytes arrive until the connection is closed or cut."""
    taken = 0
    with contextlib.suppress(ConnectionError):
        while part := opened.recv(1_000_000):
            taken += len(part)
    return taken


HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


def test_a_header_has_to_arrive_in_time(fast):
    fast(header=0.5)
    with running() as port:
        start = time.monotonic()
        slow = [client(port), client(port, b"G"), client(port, HALF), client(port, WHOLE + HALF)]
        again = client(port, WHOLE)
        assert again.recv(9) == b"HTTP/1.1 "
        drops = client(port, HALF)
        while time.monotonic() < start + 0.4:  # a byte now and then buys no time
            drops.sendall(b"a")
            again.sendall(WHOLE)
            assert again.recv(65536)
            time.sleep(0.05)
        assert slow[3].recv(65536).startswith(b"HTTP/1.1 200")
        assert all(ended(one, 20) for one in [*slow, drops])
        assert 0.4 < time.monotonic() - start < 10
        waiting = client(port, POST % (b"wait", 1) + b"1")  # the server's own time is not the client's
        assert waiting.recv(12) == b"HTTP/1.1 200"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "sent"), [("body", POST % (b"body", 9) + b"abc"), ("rest", POST % (b"early", 9) + b"abc"), ("answer", b"")]
)
def test_a_client_may_not_stop_in_the_middle(fast, state, sent):
    fast(**{state: 0.3})
    with running() as port:
        one = client(port, sent or b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.15)
        if state == "rest":
            assert one.recv(65536).startswith(b"HTTP/1.1 200")
        start = time.monotonic()
        if state == "answer":  # 20 MB, of which it takes in what the system's buffers hold
            time.sleep(1)
            assert received(one) < 20_000_000
        else:
            assert ended(one, 20) and time.monotonic() - start < 10
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


@pytest.mark.slow
def test_others_are_answered_while_connections_are_held(caplog):
    with running(connections=5) as port:
        working = client(port, POST % (b"wait", 1) + b"2")
        sending = client(port, POST % (b"body", 9) + b"abc")
        time.sleep(0.1)
        held = []
        for _ in range(15):
            held.append(client(port, HALF))
            assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        assert sum(not ended(one) for one in held) <= 3  # the newest
        sending.sendall(b"123456")
        assert sending.recv(65536).startswith(b"HTTP/1.1 200") and working.recv(65536).startswith(b"HTTP/1.1 200")
        messages = [line for line in caplog.messages if "connections are open" in line]
        assert 1 <= len(messages) <= 3 and messages[0].startswith("5 connections are open, the most that are taken")


def test_no_more_is_taken_than_can_be_worked_on():
    with running(connections=3) as port:
        working = [client(port, POST % (b"wait", 1) + b"1") for _ in range(3)]
        time.sleep(0.2)
        assert ended(client(port, WHOLE), 20)
        assert all(one.recv(65536).startswith(b"HTTP/1.1 200") for one in working)
        assert client(port, WHOLE).recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("host", "allowed", "good", "bad"),
    [
        (
            "127.0.0.1",
            (),
            ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]"],
            ["evil.example", "10.0.0.1", "a b", "[", "*"],
        ),
        ("127.0.0.1", ("api.example", "*.lab.example"), ["api.example:1", "A.Lab.Example"], ["lab.example", "xapi.example"]),
        ("127.0.0.1", ("*",), ["evil.example", "10.0.0.1"], []),
        (
            "0.0.0.0",
            (),
            ["localhost", "10.0.0.1:80", "[fe80::1]", socket.gethostname()],
            ["evil.example", "10.0.0.1.evil.example"],
        ),
        ("localhost", (), ["localhost", "127.0.0.1"], ["evil.example"]),
    ],
)
def test_only_its_own_names_are_answered(host, allowed, good, bad):
    with running(host, allowed_hosts=allowed) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as one:
        for name in good:
            assert one.get("/a", headers={"Host": name}).json() == {"path": "/a"}, name
        for name in bad:
            answer = one.get("/a", headers={"Host": name})
            assert answer.status_code == 400, name
            reason = f"got Host {name}, expected one of this server: see --allowed-hosts"
            assert answer.json() == {"error": reason, "request_id": answer.headers["x-request-id"]}
        with client(port, b"GET /a HTTP/1.0\r\n\r\n") as old:
            assert old.recv(65536).startswith(b"HTTP/1.1 200")


def test_requests_are_logged_in_a_line_each(capsys):
    with running(access_log=True) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as one:
        named = one.get("/a%0Ab?secret=1", headers={"X-Request-ID": "job-7/a.b"}).headers
        other = one.get("/a", headers={"Host": "evil.example", "X-Request-ID": "two words"}).headers
        one.post(f"/{'x' * 900}", content=b"abc", headers={"X-Forwarded-For": "192.0.2.7"})
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert named["x-request-id"] == first["request_id"] == "job-7/a.b"
    assert re.fullmatch("[0-9a-f]{32}", other["x-request-id"]) and other["x-request-id"] == second["request_id"]
    assert list(first) == ["time", "request_id", "client", "method", "path", "status", "ms", "bytes"]
    assert [first[key] for key in ("client", "method", "path", "status", "bytes")] == ["127.0.0.1", "GET", "/a\nb", 200, 16]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["time"]) and 0 < first["ms"] < 20_000
    assert (second["status"], third["client"], len(third["path"])) == (400, "192.0.2.7", 200)


def test_the_log_cannot_be_filled(capfd):
    with running() as port:
        for _ in range(100):
            for name in ("asyncio", "python_multipart"):
                record = logging.makeLogRecord({"name": name, "levelno": logging.ERROR, "msg": f"{name} is unhappy"})
                logging.lastResort.handle(record)  # where all goes unless a program says otherwise; pytest does
        for _ in range(20):
            with client(port, b"nothing\r\n\r\n") as one:
                assert one.recv(65536).startswith(b"HTTP/1.1 400")
    assert capfd.readouterr().err == "asyncio is unhappy\npython_multipart is unhappy\n"


def test_connections_are_fewer_than_descriptors(monkeypatch):
    opened = len([*Path("/dev/fd").iterdir()])
    for limit, expected in ((100_000, 512), (resource.RLIM_INFINITY, 512), (opened + front.SPARE + 40, 40)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert abs(available_connections(512) - expected) <= 2
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(ValueError, match="the limit of 64 open files leaves none for connections: raise it"):
        available_connections(512)


@pytest.mark.slow
def test_health_while_300_connections_are_held_with_256_descriptors(tmp_path):
    """As it was reported: /health was dead until they left, with 178 MB of log in 49 s."""
    run, log = tmp_path / "run", tmp_path / "log"
    save_checkpoint(GroupMixFormer(num_classes=8, **TINY), run, list("abcdefgh"), {"input_size": (3, 32, 32)})
    command = [sys.executable, "-m", "groupmixformer.cli.main", "serve", str(run), "--port", "0"]

    def limits():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    with log.open("w") as file, subprocess.Popen(command, stderr=file, stdout=file, preexec_fn=limits) as process:
        try:
            while not (address := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            port, held, start, answers = int(address[1]), [], time.monotonic(), 0
            while time.monotonic() < start + 15:  # longer than a header may take
                held += [client(port, HALF) for _ in range(300 - len(held))]
                answers += httpx.get(f"{address[0]}/health", timeout=20).json()["ready"]
                gone = [one for one in held if ended(one)]
                for one in gone:
                    one.close()
                held = [one for one in held if one not in gone]
                assert len([*Path(f"/proc/{process.pid}/fd").iterdir()]) < 256
                time.sleep(0.1)
            assert answers > 2
            assert all(ended(one, 20) for one in held)
            lines = log.read_text().splitlines()
            assert 1 < len(lines) < time.monotonic() - start + 5 and all(line.startswith("gmf") for line in lines)
        finally:
            process.kill()
