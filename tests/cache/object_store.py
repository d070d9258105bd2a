"""An S3 server of the tests' own (moto), and a proxy before it that counts requests and breaks some of them.

The proxy draws each fault from a generator seeded by the request itself, so that a test meets the same faults in every run,
whatever the order in which threads send their requests.
"""

import http.client
import itertools
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver
from typing import Any

import pytest

from cache import objects

KEY, SECRET = "AKIAMTPDTESTSOWNKEY", "mtpd+tests/own+secret"
# what the proxy answers in the server's place, as S3 words it: with the access key in it, as some of S3's answers have
ERRORS = {
    "InternalError": 500,
    "SlowDown": 503,
    "AccessDenied": 403,
    "InvalidAccessKeyId": 403,
    "SignatureDoesNotMatch": 403,
    "PreconditionFailed": 412,
    "NoSuchUpload": 404,
}
_ANSWER = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>no</Message>'
    f"<AWSAccessKeyId>{KEY}</AWSAccessKeyId><StringToSign>{SECRET}</StringToSign></Error>"
)
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # ends with the process that started this one, however that ends
"""
_DELAY = 0.03
_names = itertools.count()


@cache
def server_port() -> int:
    """The port of the server, which runs as long as this process."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    _processes.append(process)
    assert process.stdout is not None
    return int(process.stdout.readline())


_processes: list[subprocess.Popen[bytes]] = []


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """Ask the server itself, past every client and proxy. Any signature does."""
    connection = http.client.HTTPConnection("127.0.0.1", server_port(), timeout=30)
    connection.request(method, path, body, {"Authorization": f"AWS {KEY}:signature"})
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status < 300, f"{method} {path}: {answer.status} {content!r}"
    return content


@dataclass(frozen=True)
class Bucket:
    """A bucket of a test's own."""

    name: str

    @property
    def uri(self) -> str:
        return f"s3://{self.name}/some/prefix"

    def contents(self) -> dict[str, bytes]:
        """Every object of the bucket, by name."""
        listed = request("GET", f"/{self.name}?list-type=2").decode()
        assert "<IsTruncated>false" in listed
        return {key: request("GET", f"/{self.name}/{key}") for key in re.findall(r"<Key>([^<]*)</Key>", listed)}

    def put(self, name: str, content: bytes) -> None:
        """Write an object below the URI."""
        request("PUT", f"/{self.name}/some/prefix/{name}", content)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new bucket, with an environment that leads to it, and a client that waits for little."""
    set_environment(monkeypatch, server_port())
    monkeypatch.setitem(objects._RETRY, "backoff", _short_backoff())
    monkeypatch.setattr(objects, "_FIRST_PAUSE", 0.01)
    made = Bucket(f"bucket-{os.getpid()}-{next(_names)}")
    request("PUT", f"/{made.name}")
    return made


@pytest.fixture
def proxy(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator["Proxy"]:
    """The proxy, between the client and the bucket's server."""
    with Proxy(server_port()) as made:
        set_environment(monkeypatch, made.port)
        yield made


@pytest.fixture
def new_forkserver() -> Iterator[None]:
    """Forked from a server that knows the test's environment, and of which the next test sees nothing."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


def set_environment(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Let the client find a server on this machine."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    objects._open.cache_clear()


def _short_backoff() -> dict[str, Any]:
    return {"init_backoff": timedelta(milliseconds=2), "max_backoff": timedelta(milliseconds=20), "base": 2}


@dataclass(frozen=True)
class Request:
    """A request as the proxy saw it.

    Attributes:
        nth: how often this method, path and range were asked for before.
        fault: what was done to it.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    nth: int
    fault: str | None = None

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def of_row(self) -> bool:
        """Whether it asks for a shard's end or for a row, and not for the rest of an answer that broke off."""
        return (self.range or "").startswith("bytes=-") or (self.range is not None and "if-match" in self.headers)


Rule = Callable[[Request], str | None]


class Proxy:
    """Between client and server, in threads of this process.

    A rule says what is done to a request. Besides the names of `ERRORS`, which are answered in the server's place:
    ``reset`` (the connection, before the server hears of it), ``lost`` (the server does it, the answer is lost), ``cut``
    (the answer breaks off in the middle), ``short`` (its end is missing, and its length says so), ``flip`` (one bit of its
    body), ``delay``, ``silence`` (no answer before the proxy ends).

    Attributes:
        rule: of each request; None lets it pass.
        requests: all that came, in the order in which they came.
    """

    def __init__(self, upstream: int) -> None:
        self.rule: Rule = lambda _: None
        self.requests: list[Request] = []
        self._upstream = upstream
        self._seen: Counter[tuple[str, str, str | None]] = Counter()
        self._lock = threading.Lock()
        self.conditional = threading.Lock()  # moto looks at a condition and writes in two steps
        self.ended = threading.Event()
        self.errors: list[BaseException] = []
        proxy = self

        class Handler(_Handler):
            @property
            def proxy(self) -> Proxy:
                return proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.errors = self.errors
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> "Proxy":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        assert not self.errors, self.errors

    @property
    def faults(self) -> Counter[str]:
        """How often each fault was met."""
        return Counter(one.fault for one in self.requests if one.fault is not None)

    def judge(self, method: str, path: str, headers: Mapping[str, str]) -> Request:
        """Note a request, and what is to be done to it."""
        place = method, re.sub(r"uploadId=[^&]*", "uploadId", path), headers.get("range")
        with self._lock:
            seen = Request(method, place[1], headers, self._seen[place])
            self._seen[place] += 1
            judged = Request(method, place[1], headers, seen.nth, self.rule(seen))
            self.requests.append(judged)
        return judged

    def forward(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> http.client.HTTPResponse:
        """Ask the server."""
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=30)
        connection.request(method, path, body, dict(headers))
        return connection.getresponse()


def randomly(seed: int, chances: Mapping[str, float], most: int = 3) -> Rule:
    """A rule that draws faults, at most so many for one method, path and range.

    ``flip`` and ``short`` befall only the rows of shards, and each of them once: nothing else is fetched again when its
    checksum is wrong.
    """

    def rule(one: Request) -> str | None:
        drawn = random.Random(f"{seed} {one.method} {one.path} {one.range} {one.nth}").random()
        for fault, chance in chances.items():
            drawn -= chance
            if drawn < 0:
                once = one.of_row and one.nth == 0
                return fault if (once if fault in ("flip", "short") else one.nth < most) else None
        return None

    return rule


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    errors: list[BaseException]

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # no orderly end before it: a reset is a reset

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):  # a client that went away is no error
            self.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    proxy: Proxy

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # the client gave up
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        judged = self.proxy.judge(self.command, self.path, headers)
        fault = judged.fault
        if fault in ERRORS:
            self._answer(ERRORS[fault], [], _ANSWER.format(code=fault).encode())
            return
        if fault == "silence":
            self.proxy.ended.wait(30)
        if fault in ("reset", "silence"):
            self._reset()
            return
        if fault == "delay":
            time.sleep(_DELAY)
        if "if-match" in headers or "if-none-match" in headers:
            with self.proxy.conditional:
                answer = self.proxy.forward(self.command, self.path, headers, body)
        else:
            answer = self.proxy.forward(self.command, self.path, headers, body)
        content = answer.read()
        if fault == "lost":
            self._reset()
            return
        if fault == "flip" and content:
            content = bytearray(content)
            content[len(content) // 2] ^= 16
        if fault == "short":
            content = content[: -1 - len(content) // 3]
        self._answer(answer.status, answer.getheaders(), bytes(content), cut=fault == "cut")

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                self.send_header(name, value)
        length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.wfile.flush()
        if cut:
            time.sleep(0.005)  # so that the first half is on its way
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815 - the base class names them so
