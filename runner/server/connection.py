"""A client's connection, which ends if the client only holds it."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# A connection that nothing is done for is looked at so often. At the second look it is ended.
LOOK_SECONDS = 60
NOT_DONE = object()  # no request, and not none


class Connection(H11Protocol):
    """uvicorn's, which waits for ever for a request's head, for the rest of a body that has been
    answered, and for a client to read what is left when it closes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._next_look = self.loop.call_later(LOOK_SECONDS, self._look, NOT_DONE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self, done: object) -> None:
        """End the connection if its newest request, or none, is `done`, as it was before."""
        cycle = self.cycle
        waits = cycle is None or cycle.response_complete or self.transport.is_closing()
        if waits and cycle is done:
            # What is left is not waited for, as close() would.
            self.transport.abort()
            return
        # A request that is under way is not done, whichever comes next.
        self._next_look = self.loop.call_later(
            LOOK_SECONDS, self._look, cycle if waits else NOT_DONE
        )

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless it follows an answer."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()
