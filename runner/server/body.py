"""A request's body, of a limited size, and whether the client is still there."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from tokenloop.runner.server.errors import ApiError

Done = TypeVar("Done")

# A context of a million tokens is about 4 million characters.
MOST_BYTES = 8 << 20
# For the whole body, so that one that never ends holds nothing for ever.
SECONDS = 60
# Of a body that is too large so much is read and dropped: whoever still sends does not see the
# answer.
MOST_DROPPED = 1 << 30


class HungUp(Exception):
    """The client has gone: there is nobody to answer."""


async def read_body(request: Request) -> bytes:
    """The body, which says that it is JSON. Browsers ask first before a page of another site may
    send that. Errors: ApiError, HungUp."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type is {kind!r}; it must be application/json")
    try:
        body = await asyncio.wait_for(_read(request), SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body did not come within {SECONDS} s", headers={"connection": "close"}
        ) from None
    except ClientDisconnect:
        raise HungUp from None
    if body is None:
        raise ApiError(
            413, f"the body is too large; {MOST_BYTES} bytes are the most",
            headers={"connection": "close"},
        )  # fmt: skip
    return body


async def _read(request: Request) -> bytes | None:
    """The body, or None for one that is too large."""
    length = request.headers.get("content-length", "0")
    if "expect" in request.headers and length.isdecimal() and int(length) > MOST_BYTES:
        return None  # The client waits for leave to send it.
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size <= MOST_BYTES:
            pieces.append(piece)
        elif size > MOST_DROPPED:
            return None
        else:
            pieces.clear()
    return b"".join(pieces) if size <= MOST_BYTES else None


async def unless_gone(receive: Receive, work: Coroutine[None, None, Done]) -> Done:
    """What `work` gives. Errors: HungUp if the client hangs up before, and work is then cancelled.
    `receive` is that of a request whose body was read."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(receive))
    try:
        first = asyncio.FIRST_COMPLETED
        await asyncio.wait({working, gone}, return_when=first)
        if working.done():
            return working.result()
        raise HungUp
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.wait({working, gone})


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
