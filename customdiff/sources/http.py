"""HTTP downloads from untrusted addresses, with limits on size, redirects, hosts and time."""

import ipaddress
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import httpx

from customdiff.images import brief

MAX_REDIRECTS = 5
Origin = tuple[str, int | None]  # host and port
T = TypeVar("T")
DEFAULT_PORTS = {"http": 80, "https": 443}
HEADERS = {"User-Agent": "customdiff", "Accept-Encoding": "identity"}


class FetchError(Exception):
    """A download that failed; the message is a short reason.

    Attributes:
        retry: whether a later attempt may succeed.
        status: the HTTP status code, where the server answered with one other than 200.
    """

    def __init__(self, reason: str, *, retry: bool = False, status: int | None = None) -> None:
        super().__init__(reason)
        self.retry = retry
        self.status = status


class TooLargeError(FetchError):
    """A download above its size limit."""


def client(timeout: float, transport: httpx.BaseTransport | None = None, **options: Any) -> httpx.Client:
    """An HTTP client that does not follow redirects; `fetch` follows them and checks each address."""
    return httpx.Client(timeout=timeout, transport=transport, headers=HEADERS, follow_redirects=False, **options)


def fetch(
    http: httpx.Client,
    url: str,
    file: IO[bytes],
    *,
    max_bytes: float,
    schemes: tuple[str, ...] = ("https",),
    trusted: frozenset[Origin] = frozenset(),
    deadline: float,
    on_chunk: Callable[[int, int | None], None] | None = None,
) -> httpx.Headers:
    """Stream a response body into an open file and return the response's headers.

    At most `MAX_REDIRECTS` redirects are followed, each only to one of `schemes` and to a public host. A
    host is public if neither its literal address nor any address that its name resolves to is private,
    loopback, link-local or reserved. The name is resolved again when the connection is made, so this does not
    protect against a name server that changes its answer between the two look-ups (DNS rebinding).

    Args:
        max_bytes: limit of the body; the download stops there, whatever Content-Length claims.
        trusted: origins (`origin_of`) that may be private, such as the one that the user named.
        deadline: seconds for everything, from the look-up of the name to the last byte; the client's timeout limits
            only each read.
        on_chunk: called with the size of each chunk and the total that the server claims.

    Raises:
        FetchError: refused, not found, too large, too slow or unreachable.
    """

    def follow(abandoned: threading.Event) -> httpx.Headers:
        address = url
        for _ in range(MAX_REDIRECTS + 1):
            _check_address(address, schemes, trusted)
            with _answer(http, "GET", address) as answer:
                if answer.has_redirect_location:
                    address = str(answer.url.join(answer.headers["location"]))
                    continue
                _receive(answer, file, max_bytes, abandoned, on_chunk)
                return answer.headers
        raise FetchError(f"more than {MAX_REDIRECTS} redirects")

    return _within(deadline, follow)


def post_json(http: httpx.Client, url: str, body: Any, file: IO[bytes], *, max_bytes: float, deadline: float) -> None:
    """POST a value as JSON and stream the response body into an open file; redirects are not followed.

    Raises:
        FetchError: as `fetch`.
    """

    def post(abandoned: threading.Event) -> None:
        with _answer(http, "POST", url, json=body) as answer:
            _receive(answer, file, max_bytes, abandoned, None)

    _within(deadline, post)


def origin_of(url: str) -> Origin:
    """Host and port of an address; the port is None if it is the scheme's default, not named or invalid."""
    try:
        parts = urlsplit(url)
        return parts.hostname or "", None if parts.port == DEFAULT_PORTS.get(parts.scheme) else parts.port
    except ValueError:
        return "", None


def _within(seconds: float, work: Callable[[threading.Event], T]) -> T:
    """The result of a request, which runs in a thread of its own.

    A server that sends one byte at a time keeps any single read below its timeout. After `seconds` the thread is
    therefore told to stop, and not waited for: it ends at its next read.
    """
    done: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
    abandoned = threading.Event()

    def run() -> None:
        try:
            done.put(work(abandoned))
        except BaseException as error:
            done.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = done.get(timeout=seconds)
    except queue.Empty:
        raise FetchError(f"not complete after {seconds:g} s", retry=True) from None
    finally:
        abandoned.set()
    if isinstance(result, BaseException):
        raise result
    return result


@contextmanager
def _answer(http: httpx.Client, method: str, url: str, **options: Any) -> Iterator[httpx.Response]:
    """One request; converts httpx's errors to `FetchError`."""
    try:
        with http.stream(method, url, **options) as answer:
            yield answer
    except httpx.TimeoutException as error:
        raise FetchError(f"no answer within {http.timeout.read:g} s", retry=True) from error
    except (httpx.InvalidURL, UnicodeError) as error:
        raise FetchError("not a web address") from error
    except (httpx.HTTPError, OSError) as error:
        retry = isinstance(error, httpx.TransportError)
        raise FetchError(f"cannot be reached ({brief(error)})", retry=retry) from error


def _receive(
    answer: httpx.Response,
    file: IO[bytes],
    max_bytes: float,
    abandoned: threading.Event,
    on_chunk: Callable[[int, int | None], None] | None,
) -> None:
    if answer.status_code != 200:
        status = answer.status_code
        retry = status == 429 or status >= 500
        raise FetchError(f"the server answered {status} {answer.reason_phrase}", retry=retry, status=status)
    claimed = answer.headers.get("content-length", "")
    total = int(claimed) if re.fullmatch(r"[0-9]{1,18}", claimed) else None
    received = 0
    for chunk in answer.iter_bytes():
        if abandoned.is_set():
            return
        received += len(chunk)
        if received > max_bytes or (total or 0) > max_bytes:
            raise TooLargeError(f"larger than {max_bytes / 1e6:g} MB")
        file.write(chunk)
        if on_chunk:
            on_chunk(len(chunk), total)


def _check_address(url: str, schemes: tuple[str, ...], trusted: frozenset[Origin]) -> None:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError, ValueError) as error:
        raise FetchError("not a web address") from error
    if parsed.scheme not in schemes:
        raise FetchError(f"scheme {parsed.scheme or '(none)'}:// is not allowed, only {' and '.join(schemes)}")
    if (parsed.host, parsed.port) not in trusted and not _is_public(parsed.host):
        raise FetchError(f"{parsed.host or 'an address without a host'} is not a public address")


def _is_public(host: str) -> bool:
    if not host or host == "localhost" or host.endswith((".localhost", ".local", ".internal")):
        return False
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return True  # a proxy may resolve names that cannot be resolved here
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_global for entry in found)
