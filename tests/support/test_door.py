"""Who and what comes in to the page: hosts, sizes, files, clients that read."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from support import door


async def echo(request) -> Response:
    """The request's body, and the sessions that are read while it is answered."""
    body = await request.body()
    return Response(body, headers={"read": ",".join(request.state.read)})


METHODS = ["GET", "POST"]


@pytest.fixture
def client():
    routes = [Route("/{path:path}", echo, methods=METHODS)]
    app = Starlette(routes=routes, middleware=door.door(["localhost", "*.example.com"]))
    return TestClient(app, base_url="http://localhost")


# ---- hosts ----


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:7860", "LocalHost", "127.0.0.1:7860", "192.168.0.9", "[::1]:7860", "a.example.com:80"],
)
def test_it_answers_to_its_names_and_to_addresses(client, host):
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.com", "localhost.evil.com", "127.0.0.1.evil.com", "example.com.evil.com:7860", ""]
)
def test_a_name_of_somebody_else_is_refused_with_what_to_do(client, host):
    answer = client.post("/", headers={"host": host}, content=b"{}")
    assert answer.status_code == 400
    assert "--allow_host" in answer.json()["detail"]


def test_a_star_stands_for_every_name():
    app = Starlette(routes=[Route("/", echo)], middleware=door.door(["*"]))
    assert TestClient(app, base_url="http://any.thing").get("/").status_code == 200


# ---- sizes ----


def in_pieces(size: int):
    """A body without a length in its header."""
    while size > 0:
        yield b"x" * min(size, 1 << 16)
        size -= 1 << 16


def test_a_body_of_the_largest_size_comes_in_whole(client):
    assert client.post("/", content=in_pieces(door.MOST_BYTES)).content == b"x" * door.MOST_BYTES


def test_a_larger_body_is_refused_with_or_without_its_length(client):
    for content in (b"x" * (door.MOST_BYTES + 1), in_pieces(door.MOST_BYTES + 1)):
        answer = client.post("/", content=content)
        assert answer.status_code == 413
        assert "1,048,576 bytes at most" in answer.json()["detail"]


def test_of_a_body_without_end_no_more_is_read():
    taken = []

    async def receive():
        taken.append(1 << 16)
        return {"type": "http.request", "body": b"x" * (1 << 16), "more_body": True}

    reading = door.read_body(receive)
    with pytest.raises(StopIteration):
        reading.send(None)
    assert sum(taken) <= door.MOST_BYTES + (1 << 16)


# ---- files ----


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/gradio_api/upload/", "/upload?upload_id=1", "/gradio_api/deep_link"]
)
def test_what_would_write_files_is_refused(client, path):
    answer = client.post(path, content=b"{}")
    assert answer.status_code == 403
    assert "Nothing is uploaded here" in answer.json()["detail"]


def test_a_form_with_files_is_refused_wherever_it_goes(client):
    assert client.post("/component_server", files={"a": b"1"}).status_code == 403


FILE = '{"path": "http://example.com/a", "meta": {"_type": "gradio.FileData"}}'


@pytest.mark.parametrize(
    "body", [f'{{"data": [{FILE}]}}', f'{{"data": [[{{"a": {FILE}}}]]}}', FILE.replace("g", "\\u0067"), "[" * 100_000]
)
def test_a_value_that_gradio_would_fetch_is_refused_however_it_is_written(client, body):
    assert client.post("/queue/join", content=body).status_code == 403


@pytest.mark.parametrize("body", ["no JSON", "", json.dumps({"data": [FILE, '"gradio.FileData"', "x" * 20_000]})])
def test_a_text_about_files_comes_in(client, body):
    assert client.post("/queue/join", content=body).text == body


# ---- clients that read ----


@pytest.mark.parametrize(
    "path", ["/gradio_api/queue/data?session_hash=abc", "/gradio_api/call/write/abc", "/gradio_api/call/v2/write/abc"]
)
def test_a_session_is_read_while_somebody_asks_for_its_answers(client, path):
    assert client.get(path).headers["read"] == "abc"


def test_to_ask_is_not_to_read(client):
    for path in ("/gradio_api/call/write", "/gradio_api/queue/join?session_hash=abc"):
        assert client.post(path, content=b'{"session_hash": "abc"}').headers["read"] == ""


def test_a_session_is_not_read_any_more_when_its_reader_has_gone(client):
    client.get("/queue/data?session_hash=abc")
    assert client.get("/queue/data?session_hash=def").headers["read"] == "def"


def asker(read, age=0.0):
    """What is_read looks at in a gradio.Request."""
    state = SimpleNamespace(came=time.monotonic() - age, read=read)
    return SimpleNamespace(session_hash="abc", state=state)


def test_who_reads_is_not_kept_waiting():
    start = time.monotonic()
    assert door.is_read(asker(["def", "abc"], age=1000))
    assert time.monotonic() - start < 0.05


def test_who_never_comes_is_waited_for_once_from_when_it_asked(monkeypatch):
    monkeypatch.setattr(door, "PATIENCE", 0.3)
    start = time.monotonic()
    assert not door.is_read(asker(["def"]))
    assert time.monotonic() - start >= 0.3
    start = time.monotonic()
    assert not door.is_read(asker(["def"], age=0.3))
    assert time.monotonic() - start < 0.05
