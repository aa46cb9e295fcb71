"""Who may talk to the page: hosts, origins, the token, and the size of requests, checked before anything else."""

import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from customdiff.app.dropped import MAX_PHOTO_MEGABYTES

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "customdiff_token"
MAX_BODY = (MAX_PHOTO_MEGABYTES + 1) * 1_000_000  # bytes; the form around a photo


class Guard:
    """ASGI middleware in front of the page.

    Without a token, only requests to a loopback name are answered: a name of another site that leads here (DNS
    rebinding) is refused. Requests that another site's page sends are refused, those of web sockets included. The
    token is in the address once; a cookie then replaces it, so that it is in no history and no referrer.
    """

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        if self.token and self._matches(query.get("token")) and scope["type"] == "http":
            await self._with_cookie(scope, query)(scope, receive, send)
        elif status := self._refusal(scope, headers):
            await _refuse(status, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.token is None and urlsplit(f"//{host}").hostname not in LOOPBACK:
            return 403, "this address is not a name of this machine; open http://127.0.0.1 with the port"
        if self.token and not self._matches(_cookie(headers.get("cookie", ""))):
            return 401, "a token is needed; open the address that `customdiff app` printed"
        if (origin := headers.get("origin")) and urlsplit(origin).netloc != host:
            return 403, "the request comes from the page of another site"
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = headers.get("content-length", "")
            if not length.isdecimal() and "/_nicegui/" in scope["path"]:
                return 411, "the length of the request is missing"
            if length.isdecimal() and int(length) > MAX_BODY:
                return 413, f"larger than {MAX_PHOTO_MEGABYTES} MB"
        return None

    def _matches(self, given: str | None) -> bool:
        return secrets.compare_digest((given or "").encode(), (self.token or "").encode())

    def _with_cookie(self, scope: Scope, query: dict[str, str]) -> RedirectResponse:
        """The same address without the token."""
        rest = urlencode({key: value for key, value in query.items() if key != "token"})
        response = RedirectResponse(scope["path"] + (f"?{rest}" if rest else ""), status_code=303)
        response.set_cookie(COOKIE, self.token or "", httponly=True, samesite="strict")
        return response


def _cookie(header: str) -> str | None:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return None
    return found.value if found else None


async def _refuse(status: tuple[int, str], scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    await PlainTextResponse(f"{status[1]}\n", status_code=status[0])(scope, receive, send)
