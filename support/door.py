"""Who and what may come in to the web page: its own hosts, small requests, nothing to upload, clients that read."""

from __future__ import annotations

import fnmatch
import ipaddress
import re
import time
from collections.abc import Sequence

from starlette.exceptions import HTTPException
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
        refusal = self.refusal(request)
        if refusal:
            await refusal(scope, receive, send)
            return
        request.state.came = time.monotonic()
        request.state.read = self.read
        session = session_read(request)
        self.read.append(session)
        try:
            await self.app(scope, bounded(receive), send)
        finally:
            self.read.remove(session)

    def refusal(self, request: Request) -> JSONResponse | None:
        """The answer to a request that may not come in."""
        host = host_name(request.headers.get("host", ""))
        if not self.answers_to(host):
            remedy = f"start app.py with --allow_host {host} if it should"
            return JSONResponse({"detail": f"This page doesn't answer to the name {host!r}: {remedy}."}, 400)
        if writes_files(request):
            return JSONResponse({"detail": "Nothing is uploaded here: send texts and numbers."}, 403)
        return None

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


def writes_files(request: Request) -> bool:
    """Would Gradio keep a file for this request? It does for uploads, and for a link to the page as it is now."""
    kind = request.headers.get("content-type", "").strip().lower()
    return kind.startswith("multipart/") or request.url.path.rstrip("/").endswith(("/upload", "/deep_link"))


def bounded(receive):
    """The same, up to MOST_BYTES. Raises HTTPException for more, which FastAPI turns into its answer."""
    size = 0

    async def receive_bounded():
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MOST_BYTES:
            raise HTTPException(413, f"A request may have {MOST_BYTES:,} bytes at most: send a shorter prompt.")
        return message

    return receive_bounded


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
