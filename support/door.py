"""Who and what may come in to the web page: its own hosts, small requests, nothing to upload, clients that read."""

from __future__ import annotations

import fnmatch
import ipaddress
import re
import time
from collections.abc import Iterator, Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

MOST_BYTES = 1 << 20  # of a request's body; the longest prompt takes a quarter of it
PATIENCE = 5.0  # seconds in which a client has to take what was sent to it


def door(hosts: Sequence[str]) -> list[Middleware]:
    """For a FastAPI application. `hosts`: names that it answers to, such as *.example.com; * stands for all."""
    return [Middleware(Door, hosts=hosts)]


class Door:
    """ASGI middleware that refuses what the page has no use for, before anything of it is kept."""

    def __init__(self, app, hosts: Sequence[str]):
        self.app = app
        self.hosts = [host_name(host) for host in hosts]

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = host_name(headers.get("host", ""))
        if not self.answers_to(host):
            remedy = f"start app.py with --allow_host {host} if it should"
            refusal = JSONResponse({"detail": f"This page doesn't answer to the name {host!r}: {remedy}."}, 400)
        elif writes_files(scope["path"], headers):
            refusal = JSONResponse({"detail": "Nothing is uploaded here: send texts and numbers."}, 403)
        else:
            await self.app(scope, bounded(receive), send)
            return
        await refusal(scope, receive, send)

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


def writes_files(path: str, headers: Headers) -> bool:
    """Would Gradio keep a file for this request? It does for uploads, and for a link to the page as it is now."""
    uploads = headers.get("content-type", "").strip().lower().startswith("multipart/")
    return uploads or path.rstrip("/").endswith(("/upload", "/deep_link"))


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


def while_read(updates: Iterator, request) -> Iterator:
    """Yields the updates as long as the client of this gradio.Request takes them.

    Gradio notices a client that goes away, but not one that never came to read: such ones would fill the queue, and
    the model would write for nobody. The patience begins when the request is queued, so that many of them together
    cost no more time than one."""
    queue = request.request.app.get_blocks()._queue
    session = request.session_hash
    taken = queued_at(queue, session)
    while not has_taken_all(queue, session):
        if time.monotonic() - taken > PATIENCE:
            return
        time.sleep(0.05)
    for update in updates:
        now = time.monotonic()
        if has_taken_all(queue, session):
            taken = now
        elif now - taken > PATIENCE:
            return
        yield update


def queued_at(queue, session: str) -> float:
    """When the session's oldest request was queued."""
    times = [event.enqueue_time for event in list(queue.event_ids_to_events.values()) if event.session_hash == session]
    return min(times, default=time.monotonic())


def has_taken_all(queue, session: str) -> bool:
    messages = queue.pending_messages_per_session.get(session)
    return messages is not None and messages.empty()
