"""Who and what may come in to the web page: its own hosts, small requests, nothing to upload, clients that read."""

from __future__ import annotations

import fnmatch
import ipaddress
import json
import re
import time
from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse

MOST_BYTES = 1 << 20  # of a request's body; the longest prompt takes a quarter of it
PATIENCE = 5.0  # seconds from a client's question until it comes to read the answer


def door(hosts: Sequence[str]) -> list[Middleware]:
    """For a FastAPI application. `hosts`: names that it answers to, such as *.example.com; * stands for all."""
    return [Middleware(Door, hosts=hosts)]


class Door:
    """ASGI middleware that refuses what the page has no use for, before anything of it is kept."""

    def __init__(self, app, hosts: Sequence[str]):
        self.app = app
        self.hosts = [host_name(host) for host in hosts]
        self.read: list[str] = []  # sessions whose answers are being read; one may stand here twice

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        refusal = self.refuse_name(request)
        if not refusal:
            body = await read_body(receive)
            refusal = refuse_body(request, body)
        if refusal:
            await refusal(scope, receive, send)
            return
        request.state.came = time.monotonic()
        request.state.read = self.read
        session = session_read(request)
        self.read.append(session)
        try:
            await self.app(scope, read_again(body, receive), send)
        finally:
            self.read.remove(session)

    def refuse_name(self, request: Request) -> JSONResponse | None:
        """The answer to a request that was sent to somebody else's name."""
        host = host_name(request.headers.get("host", ""))
        if self.answers_to(host):
            return None
        remedy = f"start app.py with --allow_host {host} if it should"
        return refused(400, f"This page doesn't answer to the name {host!r}: {remedy}.")

    def answers_to(self, host: str) -> bool:
        """A page of somebody else can have its own name lead to this machine, and would then be let read the answers
        (DNS rebinding). It can't do so with an address, so any is right. Starlette's TrustedHostMiddleware knows
        names alone, and who listens on all addresses, as in a container, doesn't know them."""
        return is_address(host) or any(fnmatch.fnmatchcase(host, pattern) for pattern in self.hosts)


def host_name(header: str) -> str:
    """Of a Host header, without port and brackets: [::1]:7860 -> ::1."""
    return re.sub(r":\d*$", "", header).strip("[]").lower()


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# ---- what a request brings ----


async def read_body(receive) -> bytes:
    """All of it; of a long one, a little over MOST_BYTES."""
    body = b""
    goes_on = True
    while goes_on and len(body) <= MOST_BYTES:
        message = await receive()
        body += message.get("body", b"")
        goes_on = message.get("more_body", False)
    return body


def read_again(body: bytes, receive):
    """An ASGI `receive` that gives a body which was read before, and then what comes after it."""
    messages = [{"type": "http.request", "body": body}]

    async def receive_again():
        return messages.pop() if messages else await receive()

    return receive_again


def refuse_body(request: Request, body: bytes) -> JSONResponse | None:
    """The answer to a request that brings too much, or files."""
    if len(body) > MOST_BYTES:
        return refused(413, f"A request may have {MOST_BYTES:,} bytes at most: send a shorter prompt.")
    if writes_files(request) or names_files(body):
        return refused(403, "Nothing is uploaded here: send texts and numbers.")
    return None


def refused(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)


def writes_files(request: Request) -> bool:
    """Would Gradio keep a file for this request? It does for uploads, and for a link to the page as it is now."""
    kind = request.headers.get("content-type", "").strip().lower()
    return kind.startswith("multipart/") or request.url.path.rstrip("/").endswith(("/upload", "/deep_link"))


def names_files(body: bytes) -> bool:
    """Does it hold what Gradio takes for a file? That would be fetched from whatever address it gives, and be kept."""
    try:
        text = json.dumps(json.loads(body))  # JSON may spell a character in many ways: here in one
    except RecursionError:
        return True
    except ValueError:  # no JSON: nothing is read from it
        return False
    return '"gradio.FileData"' in text


# ---- clients that read ----


def session_read(request: Request) -> str:
    """Whose answers a request comes to read, "" for none: .../queue/data?session_hash=SESSION or .../call/NAME/SESSION.
    These are the addresses by which Gradio's clients ask; what its queue knows of them, it keeps to itself."""
    path = request.url.path
    if path.endswith("/queue/data"):
        return request.query_params.get("session_hash", "")
    return path.rpartition("/")[2] if request.method == "GET" and "/call/" in path else ""


def is_read(client) -> bool:
    """Waits until somebody reads what this gradio.Request is answered. False if nobody comes.

    Gradio stops for a client that goes away, but not for one that never came to read: a few of those would fill the
    queue, and the model would write for nobody. They all wait from when they asked, so many take no longer than one."""
    while client.session_hash not in client.state.read:
        if time.monotonic() - client.state.came > PATIENCE:
            return False
        time.sleep(0.05)
    return True
