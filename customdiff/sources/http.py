"""Fetch files over HTTP from addresses that are not trusted: sizes, redirects, hosts and time are limited."""

import ipaddress
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import httpx

from customdiff.images import brief

MAX_REDIRECTS = 5
CHUNK = 1 << 16
HEADERS = {"User-Agent": "customdiff", "Accept-Encoding": "identity"}


class FetchError(Exception):
    """A download that did not come; the message is a short reason."""

    def __init__(self, reason: str, *, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again  # a later try may succeed


def client(timeout: float, transport: httpx.BaseTransport | None = None, **options: Any) -> httpx.Client:
    """An HTTP client that follows no redirect by itself; `fetch` does, with its checks."""
    return httpx.Client(timeout=timeout, transport=transport, headers=HEADERS, follow_redirects=False, **options)


def fetch(
    http: httpx.Client,
    url: str,
    file: IO[bytes],
    *,
    max_bytes: float,
    schemes: tuple[str, ...] = ("https",),
    trusted_hosts: frozenset[str] = frozenset(),
    deadline: float | None = None,
    on_chunk: Callable[[int, int | None], None] | None = None,
) -> httpx.Headers:
    """Stream what an address answers into an open file, and return the answer's headers.

    At most `MAX_REDIRECTS` redirects are followed, each only to one of `schemes` and to a public host. A
    host is public if neither its literal address nor any address that its name resolves to is private,
    loopback, link-local or reserved. The name is resolved once more when the connection is made, so a name
    server that lies from one look-up to the next is not guarded against.

    Args:
        max_bytes: more than this is given up, whatever Content-Length claims.
        trusted_hosts: may be private; for the host that the user named himself.
        deadline: seconds for the whole answer; the client's timeout bounds each read only.
        on_chunk: told of each chunk's size and of the total that the server claims.

    Raises:
        FetchError: refused, not found, too large, too slow or unreachable.
    """
    started = time.monotonic()
    for _ in range(MAX_REDIRECTS + 1):
        _check_address(url, schemes, trusted_hosts)
        with _answer(http, "GET", url) as answer:
            if answer.has_redirect_location:
                url = str(answer.url.join(answer.headers["location"]))
                continue
            _receive(answer, file, max_bytes, deadline and started + deadline, on_chunk)
            return answer.headers
    raise FetchError(f"more than {MAX_REDIRECTS} redirects")


def post_json(http: httpx.Client, url: str, body: Any, file: IO[bytes], *, max_bytes: float) -> None:
    """POST a value as JSON and stream the answer into an open file; redirects are not followed.

    Raises:
        FetchError: as `fetch`.
    """
    with _answer(http, "POST", url, json=body) as answer:
        _receive(answer, file, max_bytes, None, None)


@contextmanager
def _answer(http: httpx.Client, method: str, url: str, **options: Any) -> Iterator[httpx.Response]:
    """One request, with httpx's errors told as a `FetchError`."""
    try:
        with http.stream(method, url, **options) as answer:
            yield answer
    except httpx.TimeoutException as error:
        raise FetchError(f"no answer within {http.timeout.read:g} s", again=True) from error
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        again = isinstance(error, httpx.TransportError)
        raise FetchError(f"cannot be reached ({brief(error)})", again=again) from error


def _receive(
    answer: httpx.Response,
    file: IO[bytes],
    max_bytes: float,
    deadline: float | None,
    on_chunk: Callable[[int, int | None], None] | None,
) -> None:
    if answer.status_code != 200:
        again = answer.status_code == 429 or answer.status_code >= 500
        raise FetchError(f"the server answers {answer.status_code} {answer.reason_phrase}", again=again)
    claimed = answer.headers.get("content-length", "")
    total = int(claimed) if claimed.isdecimal() else None
    received = 0
    for chunk in answer.iter_bytes(CHUNK):
        received += len(chunk)
        if received > max_bytes or (total or 0) > max_bytes:
            raise FetchError(f"larger than {max_bytes / 1e6:g} MB")
        if deadline and time.monotonic() > deadline:
            raise FetchError("too slow")
        file.write(chunk)
        if on_chunk:
            on_chunk(len(chunk), total)


def _check_address(url: str, schemes: tuple[str, ...], trusted_hosts: frozenset[str]) -> None:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise FetchError(f"not a web address: {url[:100]}") from error
    if parsed.scheme not in schemes:
        raise FetchError(f"leads to {parsed.scheme or 'no scheme'}://, only {' and '.join(schemes)} is followed")
    if parsed.host not in trusted_hosts and not _is_public(parsed.host):
        raise FetchError(f"leads to {parsed.host or 'no host'}, which is not a public address")


def _is_public(host: str) -> bool:
    if not host or host == "localhost" or host.endswith((".localhost", ".local", ".internal")):
        return False
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return True  # behind a proxy, which resolves names itself, none may resolve here
    return all(ipaddress.ip_address(entry[4][0].partition("%")[0]).is_global for entry in found)
