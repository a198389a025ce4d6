"""Object servers on this machine (moto speaks S3, gcp-storage-emulator GCS), and a proxy that makes them fail at
random."""

import http.client
import itertools
import logging
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from unittest import mock

from jaxlm.storage import remote

# refused (500, 503), the connection reset before the request is done or after it is, and an answer that breaks off
# half-way
BEFORE = ("500", "503", "reset")
AFTER = ("lost", "cut")
NUMBERS = itertools.count()


class Request(NamedTuple):
    """One request as the proxy saw it, and how it was made to fail (None: it was not)."""

    method: str
    path: str
    range: str | None
    failure: str | None
    sent: int  # bytes of the answer's body


class FailingProxy(ThreadingHTTPServer):
    """Passes requests on to `backend`, of which a share of `rate` fails in one of the ways `failures`, by a fixed
    seed."""

    daemon_threads = True

    def __init__(self, backend: tuple[str, int]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.backend = backend
        self.lock = threading.Lock()
        self.fail(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, rate: float, seed: int = 0, failures: tuple[str, ...] = BEFORE + AFTER) -> None:
        """From now on; forgets the requests so far."""
        with self.lock:
            self.rate, self.failures, self.random = rate, failures, random.Random(seed)
            self.requests: list[Request] = []

    def next_failure(self) -> str | None:
        with self.lock:
            return self.random.choice(self.failures) if self.random.random() < self.rate else None

    def failed(self) -> int:
        return sum(request.failure is not None for request in self.requests)

    def handle_error(self, request: socket.socket, client_address: object) -> None:
        """A client may close its connection at any time."""

    def shutdown_request(self, request: socket.socket) -> None:
        self.close_request(request)  # at once: the default's orderly end would undo a reset


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for head and body
    server: FailingProxy

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        failure = self.server.next_failure()
        sent = 0
        if failure in ("500", "503"):
            self.refuse(int(failure))
        elif failure == "reset":
            self.reset()
        else:
            sent = self.pass_on(body, failure)
        self.server.requests.append(Request(self.command, self.path, self.headers.get("Range"), failure, sent))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = answer

    def pass_on(self, body: bytes, failure: str | None) -> int:
        connection = http.client.HTTPConnection(*self.server.backend, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                connection.putheader(name, value)
        connection.endheaders(body or None)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if failure == "lost":
            self.reset()
            return 0
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        if length is not None and answer.status not in (204, 304):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if failure == "cut":
            content = content[:len(content) // 2]
        self.wfile.write(content)
        if failure == "cut":
            self.wfile.flush()
            self.reset()
        return len(content)

    def refuse(self, status: int) -> None:
        """As S3 does; GCS' clients only read the status."""
        code = {500: "InternalError", 503: "SlowDown"}[status]
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made to fail</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if self.command != "HEAD" else b"")

    def reset(self) -> None:
        """The connection ends with a reset as soon as the handler returns."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def handle_expect_100(self) -> bool:
        proceed = super().handle_expect_100()
        self.wfile.flush()
        return proceed

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def failing(backend: tuple[str, int]) -> Iterator[FailingProxy]:
    proxy = FailingProxy(backend)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()


@contextmanager
def s3_server() -> Iterator[FailingProxy]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        with failing(server.get_host_and_port()) as proxy:
            yield proxy
    finally:
        server.stop()


@contextmanager
def gcs_server(bucket: str) -> Iterator[FailingProxy]:
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    server.start()
    try:
        with failing(server._api._httpd.server_address) as proxy:
            yield proxy
    finally:
        server.stop()


@contextmanager
def failing_bucket(scheme: str) -> Iterator[tuple[str, FailingProxy]]:
    """The URL of an empty bucket of `s3` or `gs`, for this process and those that it starts, and what makes its
    server fail."""
    bucket = f"bucket{next(NUMBERS)}"  # moto's servers of one process share their buckets
    with s3_server() if scheme == "s3" else gcs_server(bucket) as proxy:
        names = {"NO_PROXY": "127.0.0.1", "AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": "testing",
                 "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
                 "STORAGE_EMULATOR_HOST": proxy.url, "TENSORSTORE_GCS_HTTP_URL": proxy.url,
                 "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        with mock.patch.dict(os.environ, names):
            files = remote.file_system(scheme)
            if scheme == "s3":
                files.mkdir(bucket)
            yield f"{scheme}://{bucket}", proxy
            files.clear_instance_cache()
