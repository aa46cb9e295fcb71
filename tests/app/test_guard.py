"""Who the page answers: this machine by its own names, the holder of the token, and no page of another site."""

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from customdiff.app.guard import Guard

TOKEN = "secret-" + "x" * 20


async def greet(request):
    return PlainTextResponse(f"hello {request.url.query}")


async def talk(socket):
    await socket.accept()
    await socket.send_text("hello")
    await socket.close()


def client(token: str | None = None, host: str = "127.0.0.1:8080") -> TestClient:
    routes = [Route("/{path:path}", greet, methods=["GET", "POST"]), WebSocketRoute("/ws", talk)]
    guarded = Guard(Starlette(routes=[routes[1], routes[0]]), token)
    return TestClient(guarded, base_url=f"http://{host}", follow_redirects=False)


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:8080", "[::1]:8080", "127.0.0.1"])
def test_this_machine_is_answered(host):
    assert client(host=host).get("/").text == "hello "


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.7:8080", "localhost.evil.example"]
)
def test_a_name_that_leads_here_is_refused(host):
    assert client(host=host).get("/").status_code == 403
    with pytest.raises(WebSocketDisconnect), client(host=host).websocket_connect("/ws"):
        pass


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:9999", "null"])
def test_the_page_of_another_site_is_refused(origin):
    assert client().post("/x", headers={"origin": origin}).status_code == 403
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("/ws", headers={"origin": origin}):
        pass


def test_our_own_page_is_answered():
    own = {"origin": "http://127.0.0.1:8080"}
    assert client().post("/x", headers=own).status_code == 200
    with client().websocket_connect("ws://127.0.0.1:8080/ws", headers=own) as socket:
        assert socket.receive_text() == "hello"


def test_a_request_that_is_too_large_is_refused_before_it_is_read():
    headers = {"content-length": "400000000"}
    assert client().post("/_nicegui/client/1/upload/2", headers=headers, content=b"x").status_code == 413


def test_a_request_of_unknown_length_is_refused():
    assert client().post("/_nicegui/client/1/upload/2", content=iter([b"x"])).status_code == 411


def test_without_the_token_nothing_is_answered():
    for path in ("/", "/_nicegui/x", "/?token=", "/?token=wrong"):
        answer = client(TOKEN, "192.168.0.7:8080").get(path)
        assert answer.status_code == 401
        assert TOKEN not in answer.text
    with pytest.raises(WebSocketDisconnect), client(TOKEN).websocket_connect(f"/ws?token={TOKEN}"):
        pass


def test_the_token_becomes_a_cookie():
    known = client(TOKEN, "192.168.0.7:8080")
    answer = known.get(f"/?token={TOKEN}&a=1")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?a=1")
    assert "httponly" in answer.headers["set-cookie"].lower()
    assert known.get("/").text == "hello "
    with known.websocket_connect("ws://192.168.0.7:8080/ws") as socket:
        assert socket.receive_text() == "hello"
    assert known.post("/x", headers={"origin": "http://evil.example"}).status_code == 403
