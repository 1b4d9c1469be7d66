"""The HTTP server around the application: when it is ready, and how it ends."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable

import uvicorn

from tokenloop.runner.engine import Engine
from tokenloop.runner.server.app import Server
from tokenloop.runner.server.connection import Connection

# After what runs has ended, for clients to read it.
READING_SECONDS = 5


class Listening(uvicorn.Server):
    """Serves until SIGINT or SIGTERM. What runs then has `grace_s` to end by itself. A second
    SIGINT ends all at once."""

    def __init__(
        self,
        server: Server,
        engine: Engine,
        grace_s: float,
        ready: Callable[[], None] = lambda: None,
        closed: Callable[[], None] = lambda: None,
    ):
        """`ready` is called once connections are taken, `closed` when the engine is."""
        config = uvicorn.Config(
            server.app, loop="asyncio", http=Connection, ws="none", lifespan="off", log_config=None,
            log_level="warning", access_log=False, server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=round(grace_s + READING_SECONDS),
        )  # fmt: skip
        super().__init__(config)
        self._engine, self._grace_s = engine, grace_s
        self._ready, self._closed = ready, closed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.ensure_future(asyncio.to_thread(self._engine.close, self._grace_s))
        await super().shutdown(sockets)
        # Whoever still runs has no client any more.
        await asyncio.to_thread(self._engine.close)
        await closing
        self._closed()


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches that address."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback
