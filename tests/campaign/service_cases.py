"""Services and servers on loopback that lie, drip, redirect and never end."""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx

from customdiff.config import Params, Service
from customdiff.errors import UserError
from customdiff.retrieval import class_images, clip_service
from customdiff.sources import http

from . import params_cases, source_cases
from .case import Case
from .source_cases import ASIDE, png

SECONDS = 0.4  # time limit of a request; a drip sends a byte every tenth of it
Answer = Callable[[socket.socket], None]


def serve(answer: Answer) -> int:
    """Answer every connection in a thread of its own; returns the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def loop() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=quietly, args=(connection,), daemon=True).start()

    def quietly(connection: socket.socket) -> None:
        try:
            with connection:
                connection.recv(65536)
                answer(connection)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # closing with unread data would reset the connection
                    pass
        except OSError:
            pass

    threading.Thread(target=loop, daemon=True).start()
    return listener.getsockname()[1]


def sends(body: bytes, status: str = "200 OK", *headers: str) -> Answer:
    """A whole response."""
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""])
    return lambda connection: connection.sendall(head.encode() + body)


def raw(data: bytes) -> Answer:
    """Bytes that need not be HTTP."""
    return lambda connection: connection.sendall(data)


def drips(head: bytes, forever: bytes = b"x") -> Answer:
    """A beginning, then one byte at a time without end."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            time.sleep(SECONDS / 10)
            connection.sendall(forever)

    return answer


def floods(head: bytes) -> Answer:
    """A beginning, then data as fast as possible without end."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(bytes(65536))

    return answer


def silent(connection: socket.socket) -> None:
    """No answer."""
    time.sleep(30)


OK = b"HTTP/1.1 200 OK\r\n"
SERVERS: list[tuple[str, Answer]] = [
    ("silence", silent),
    ("a dripping body", drips(OK + b"\r\n")),
    ("a dripping chunked body", drips(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n")),
    ("dripping headers", drips(OK, b"A: b\r\n")),
    ("a dripping header", drips(OK + b"A: ")),
    ("a dripping status", drips(b"")),
    ("an endless body", floods(OK + b"\r\n")),
    ("endless headers", floods(OK + b"A: ")),
    ("a body above its limit", sends(b"x" * 3_000_000)),
    ("a wrong length", raw(OK + b"Content-Length: 1000\r\n\r\nabc")),
    ("a length of 5000 digits", raw(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nabc")),
    ("a length that is no number", raw(OK + b"Content-Length: abc\r\n\r\nabc")),
    ("a negative length", raw(OK + b"Content-Length: -5\r\n\r\nabc")),
    ("not HTTP", raw(b"SSH-2.0-OpenSSH\r\n")),
    ("nothing", raw(b"")),
    ("bytes", raw(bytes(range(256)))),
    ("a gzip bomb", sends(b"\x1f\x8b" + bytes(100), "200 OK", "Content-Encoding: gzip")),
    ("404", sends(b"", "404 Not Found")),
    ("500", sends(b"", "500 Oops")),
    ("a redirect to itself", sends(b"", "302 Found", "Location: /")),
    ("a redirect to a file", sends(b"", "302 Found", "Location: file:///etc/passwd")),
    ("a redirect to the metadata service", sends(b"", "302 Found", "Location: http://169.254.169.254/")),
    ("a redirect to another port", sends(b"", "302 Found", "Location: http://127.0.0.1:1/")),
    ("a redirect to a private host", sends(b"", "302 Found", "Location: http://10.0.0.1/")),
    ("a redirect to nonsense", sends(b"", "302 Found", "Location: http://[::1")),
    ("a redirect to a port that is none", sends(b"", "302 Found", "Location: http://h:99999999/")),
    ("a redirect to bytes", raw(b"HTTP/1.1 302 Found\r\nLocation: \xff\xfe\r\nContent-Length: 0\r\n\r\n")),
    ("an empty redirect", sends(b"", "302 Found", "Location: ")),
]
IMAGE = base64.b64encode(png(9, 9)).decode()
DEEP = "[" * 100_000 + "]" * 100_000
ANSWERS: list[tuple[str, str, str]] = [  # body of a knn-service, and what is expected
    ("a good answer", json.dumps([{"image": IMAGE, "caption": "a cat", "id": 1, "similarity": 0.5}]), ASIDE),
    ("a lone surrogate in a caption", r'[{"image": "' + IMAGE + r'", "caption": "a \ud800 cat", "similarity": 0.5}]', ASIDE),
    ("a lone surrogate in an address", r'[{"url": "http://h/\ud800", "caption": "a"}]', ASIDE),
    ("a similarity of 400 digits", '[{"image": "' + IMAGE + '", "similarity": ' + "9" * 400 + "}]", ASIDE),
    ("a similarity of 5000 digits", '[{"image": "' + IMAGE + '", "similarity": ' + "9" * 5000 + "}]", ASIDE),
    ("a similarity of NaN", '[{"image": "' + IMAGE + '", "similarity": NaN}]', ASIDE),
    ("a similarity of Infinity", '[{"image": "' + IMAGE + '", "similarity": -Infinity}]', ASIDE),
    ("a similarity of true", '[{"image": "' + IMAGE + '", "similarity": true}]', ASIDE),
    ("a similarity of text", '[{"image": "' + IMAGE + '", "similarity": "high"}]', ASIDE),
    ("a caption that is a list", '[{"image": "' + IMAGE + '", "caption": ["a"]}]', ASIDE),
    ("a caption with control characters", json.dumps([{"image": IMAGE, "caption": "a\x1b[2J\0\ncat"}]), ASIDE),
    ("an image that is a number", '[{"image": 5}]', ASIDE),
    ("an image that is not base64", '[{"image": "###"}]', ASIDE),
    ("an image that is text", '[{"image": "aGVsbG8="}]', ASIDE),
    ("an address that is a number", '[{"url": 5}]', ASIDE),
    ("an address that is a list", '[{"url": ["http://h/"]}]', ASIDE),
    ("an address of a file", '[{"url": "file:///etc/passwd"}]', ASIDE),
    ("an address of this machine", '[{"url": "http://127.0.0.1:9/"}]', ASIDE),
    ("an address of this machine as a number", '[{"url": "http://2130706433/"}]', ASIDE),
    ("an address of this machine in IPv6", '[{"url": "http://[::ffff:127.0.0.1]/"}]', ASIDE),
    ("an address of the metadata service", '[{"url": "http://169.254.169.254/latest"}]', ASIDE),
    ("an address without a host", '[{"url": "http:///x"}]', ASIDE),
    ("half an address", '[{"url": "http://[::1"}]', ASIDE),
    ("an address of megabytes", '[{"url": "http://h/' + "x" * 3_000_000 + '"}]', ASIDE),
    ("nothing in an entry", "[{}]", ASIDE),
    ("no entries", "[]", ASIDE),
    ("deep JSON", DEEP, "retrieve.service.url"),
    ("deep JSON in an entry", '[{"caption": ' + DEEP + "}]", "retrieve.service.url"),
    ("an object", '{"error": "x"}', "retrieve.service.url"),
    ("numbers", "[1, 2]", "retrieve.service.url"),
    ("null", "null", "retrieve.service.url"),
    ("text", "hello", "retrieve.service.url"),
    ("UTF-16", "[]\ud800", "retrieve.service.url"),
    ("half of JSON", '[{"url": ', "retrieve.service.url"),
]  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of services and downloads."""
    for name, answer in SERVERS:
        yield Case("servers", f"archive: {name}", downloads(answer), "error: ")
        yield Case("servers", f"knn-service: {name}", queries(answer), "error: retrieve.service.url")
        yield Case("servers", f"image of a knn-service: {name}", queries_images(answer), ASIDE)
    for name, text, expected in ANSWERS:
        yield Case("knn answers", name, queries(sends(text.encode("utf-8", "surrogatepass"))), expected)
    yield Case("servers", "another port of the service's host", asks_another_port, ASIDE)


def downloads(answer: Answer) -> Callable[[], None]:
    """Download an archive; over http, which params.yaml does not allow, because loopback has no certificate."""

    def act() -> None:
        url = f"http://127.0.0.1:{serve(answer)}/"
        try:
            with http.client(SECONDS) as client:
                http.fetch(
                    client,
                    url,
                    io.BytesIO(),
                    max_bytes=2e6,
                    schemes=("http",),
                    trusted=frozenset({http.origin_of(url)}),
                    deadline=2 * SECONDS,
                )
        except http.FetchError as error:
            raise UserError(str(error)) from error

    return act


def queries(answer: Answer, timeout: float = SECONDS) -> Callable[[], None]:
    """Retrieve class images from a knn-service."""

    def act() -> None:
        clip_service.MAX_ANSWER_BYTES, clip_service.MAX_IMAGE_BYTES = 5_000_000, 1_000_000
        retrieve(f"http://127.0.0.1:{serve(answer)}/knn-service", timeout)

    return act


def retrieve(url: str, timeout: float, transport: httpx.BaseTransport | None = None) -> None:
    """Retrieve class images in the working folder; that none of them is good is not an error here."""
    source_cases.good("instances")
    values = params_cases.GOOD | {
        "retrieve": {
            "backend": "service",
            "num_class_images": 3,
            "minimum": 1,
            "service": {"url": url, "timeout": timeout, "retries": 0},
        }
    }
    try:
        result = class_images.retrieve(
            Params.model_validate(values), "cat", instances="instances", index="none", out="out", transport=transport
        )
        print(json.dumps(result.kept, allow_nan=False), [refused.reason for refused in result.set_aside])
    except UserError as error:
        if "retrieve.minimum" not in str(error):
            raise


def queries_images(answer: Answer) -> Callable[[], None]:
    """Download one image that a knn-service names, from its own host."""

    def act() -> None:
        port = serve(answer)
        service = Service(url=f"http://127.0.0.1:{port}/knn-service", timeout=SECONDS, retries=0)
        address = f"http://127.0.0.1:{port}/x.png"
        with http.client(SECONDS) as client:
            item = clip_service._download(client, service, address, {"url": address, "caption": "a"})
        print(item.problem)

    return act


def asks_another_port() -> None:
    """The service names an address of its own host at another port, which may be private to this machine."""
    reached: list[bool] = []

    def private(connection: socket.socket) -> None:
        reached.append(True)
        sends(png(9, 9))(connection)

    address = f"http://127.0.0.1:{serve(private)}/x.png"
    queries(sends(json.dumps([{"url": address, "caption": "a"}]).encode()))()
    assert not reached
