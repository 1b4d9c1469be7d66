"""From a request's fields to tokens of the engine, and on to the answer."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenloop.runner.engine import Engine, EngineClosed, QueueFull
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.request import Request
from tokenloop.runner.result import Token
from tokenloop.runner.server.answers import END, Answer, as_event, as_json
from tokenloop.runner.server.body import unless_gone
from tokenloop.runner.server.chat import Chats
from tokenloop.runner.server.errors import ApiError
from tokenloop.runner.server.fields import ChatFields, CompletionFields
from tokenloop.runner.server.metrics import Metrics
from tokenloop.runner.ticket import EngineError, Ticket

LOG = logging.getLogger(__name__)

# The number of a choice, and more of its tokens, or None at its end.
Piece = tuple[int, list[Token] | None]


def json_response(value: object, status: int = 200, headers: dict | None = None) -> Response:
    return Response(as_json(value), status, headers, "application/json")


class Generating:
    """The requests that are generated for."""

    def __init__(
        self, engine: Engine, metrics: Metrics, name: str, timeout_s: float, log_prompts: bool
    ):
        """`name` is the model's. A request ends `timeout_s` after it came. With `log_prompts`
        prompts and outputs are logged."""
        self._engine, self._model, self._metrics = engine, engine.model, metrics
        self._name, self._timeout_s, self._log_prompts = name, timeout_s, log_prompts
        self.chats = Chats(self._model.tokenizer)
        self._fingerprint = f"fp_{self._model.manifest['sha256'][:12]}"

    async def answer(self, request: HttpRequest, fields: ChatFields | CompletionFields) -> Response:
        """Generate what the fields of a request ask for. Errors: ApiError, HungUp."""
        start = time.perf_counter()
        param = "messages" if isinstance(fields, ChatFields) else "prompt"
        try:
            # A template may take seconds.
            prompts, is_open, grammar = await asyncio.to_thread(self._encode, fields)
            tickets = self._submit(fields, prompts, grammar, param)
        except RunnerError as error:
            raise ApiError(400, str(error), param) from None
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None
        is_chat = isinstance(fields, ChatFields)
        answer = Answer(
            self._name, self._fingerprint, tickets, self._model.tokenizer,
            [self.chats.reader(fields, is_open) for _ in tickets] if is_chat else None,
            self._echoes(fields, prompts), fields.n, fields.only_echoes,
        )  # fmt: skip
        prompt_tokens = sum(map(len, prompts))
        pieces = self._pieces(tickets, start)
        with ExitStack() as given_up:
            for ticket in tickets:
                given_up.enter_context(ticket)
            if fields.stream:
                # What goes wrong before the first token has a status of its own.
                first = await unless_gone(request.receive, anext(pieces))
                with_usage = (
                    fields.stream_options is not None and fields.stream_options.include_usage
                )
                return EventStream(
                    answer, first, pieces, prompt_tokens if with_usage else None,
                    given_up.pop_all(),
                )  # fmt: skip
            await unless_gone(request.receive, exhaust(pieces))
        return json_response(answer.whole(prompt_tokens))

    def _encode(
        self, fields: ChatFields | CompletionFields
    ) -> tuple[list[list[int]], bool, str | None]:
        """The ids of each prompt, whether a chat's begins the reasoning, and the grammar that its
        answer follows. Errors: ApiError, and RunnerError for text that cannot be a prompt."""
        self._check_restrictions(fields)
        if isinstance(fields, ChatFields):
            ids, is_open, grammar = self.chats.encode(fields)
            if grammar is not None:
                param = "tool_choice" if fields.must_call else "response_format"
                try:
                    # It is compiled here, and kept for when the request is submitted.
                    self._model.grammars.matcher(Request(ids, grammar=grammar))
                except RunnerError as error:
                    raise ApiError(400, f"{param}: {error}", param) from None
            return [ids], is_open, grammar
        encode = self._model.tokenizer.encode
        return [encode(p) if isinstance(p, str) else p for p in fields.prompt], False, None

    def _check_restrictions(self, fields: ChatFields | CompletionFields) -> None:
        """Errors: ApiError for what this artifact has no method for, and ids that there are not."""
        methods = self._model.manifest["methods"]
        asked = dict.fromkeys(Request([], **fields.adjustments).adjusts, "adjust_row")
        if isinstance(fields, ChatFields):
            if fields.wanted_schema is not None:
                asked["response_format"] = "mask_row"
            if fields.must_call:
                asked["tool_choice"] = "mask_row"
        for name, method in asked.items():
            if method not in methods:
                raise ApiError(
                    400, f"{name}: this artifact has no method {method}: export it again", name,
                    "unsupported_parameter",
                )  # fmt: skip
        beyond = [i for i in map(int, fields.logit_bias) if i >= self._model.vocab_size]
        if beyond:
            reason = f"the token id {beyond[0]} is beyond {self._model.vocab_size - 1}, the last"
            raise ApiError(400, f"logit_bias: {reason}", "logit_bias")

    def _echoes(self, fields: ChatFields | CompletionFields, prompts: list[list[int]]) -> list[str]:
        """The prompt's text for each choice, if it is asked for."""
        if not fields.echoes:
            return []
        decode = self._model.tokenizer.decode
        texts = [p if isinstance(p, str) else decode(ids) for p, ids in zip(fields.prompt, prompts)]
        return [text for text in texts for _ in range(fields.n)]

    def _submit(
        self, fields: ChatFields | CompletionFields, prompts: list[list[int]],
        grammar: str | None, param: str,
    ) -> list[Ticket]:  # fmt: skip
        """A ticket for each choice, in their order. Errors: ApiError, RunnerError."""
        most = self._model.max_seq_len
        for ids in prompts:
            if len(ids) >= most:
                raise ApiError(
                    400, f"the prompt has {len(ids)} tokens; {most - 1} are the most, for one of "
                    "the context is for the output", param, "context_length_exceeded",
                )  # fmt: skip
        if fields.alternatives is not None and not self._model.loop.program.has_logits:
            raise ApiError(
                400, "logprobs: this artifact's engine gives none", "logprobs",
                "unsupported_parameter",
            )  # fmt: skip
        packs = self._model.loop.program.packing is not None
        if fields.echoes and fields.alternatives is not None and packs:
            raise ApiError(
                400, "echo with logprobs: an artifact for a GPU gives none of a prompt's tokens",
                "echo", "unsupported_parameter",
            )  # fmt: skip
        requests: list[Request] = []
        is_chat = isinstance(fields, ChatFields)
        shown_tokens = self.chats.shown_tokens(fields) if is_chat else ()
        for ids in prompts:
            requests += fields.requests(ids, fields.limit or most, shown_tokens, grammar)
        room = self._engine.rows + self._engine.max_queue
        if len(requests) > room:
            reason = f"{len(requests)} choices are asked for; {room} are the most"
            raise ApiError(400, reason, "n" if len(prompts) == 1 else param)
        try:
            return self._engine.submit_all(requests, self._timeout_s)
        except QueueFull as error:
            again = {"retry-after": "1"}
            raise ApiError(429, str(error), code="queue_full", headers=again) from None
        except EngineClosed:
            raise ApiError(503, "the server is shutting down", code="shutting_down") from None

    async def _pieces(self, tickets: list[Ticket], start: float) -> AsyncIterator[Piece]:
        """The choices' tokens as they come, of all requests together. Errors: ApiError."""
        if len(tickets) == 1:
            async for piece in self._pieces_of(0, tickets[0], start):
                yield piece
            return
        # Of one piece: what nobody has read yet is kept by its ticket, and comes as one.
        queue: asyncio.Queue[Piece | ApiError] = asyncio.Queue(1)

        async def pump(index: int, ticket: Ticket) -> None:
            try:
                async for piece in self._pieces_of(index, ticket, start):
                    await queue.put(piece)
            except ApiError as error:
                await queue.put(error)

        pumps = [asyncio.ensure_future(pump(*numbered)) for numbered in enumerate(tickets)]
        try:
            left = len(tickets)
            while left:
                piece = await queue.get()
                if isinstance(piece, ApiError):
                    raise piece
                left -= piece[1] is None
                yield piece
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.wait(pumps)

    async def _pieces_of(self, index: int, ticket: Ticket, start: float) -> AsyncIterator[Piece]:
        before = None
        try:
            async for token in ticket:
                now = time.perf_counter()
                if before is None:
                    self._metrics.first_token.observe(now - start)
                else:
                    self._metrics.next_token.observe(now - before)
                before = now
                tokens = [token, *ticket.arrived()]
                if any(one.text or one.logprobs for one in tokens):
                    yield index, tokens
        except EngineError as error:
            raise ApiError(500, str(error)) from None
        except RunnerError as error:
            # The artifact cannot sample, or the grammar cannot be followed any further.
            param = "temperature" if ticket.request.grammar is None else "response_format"
            raise ApiError(400, str(error), param) from None
        if ticket.finish_reason == "timeout":
            raise ApiError(504, f"it took more than {self._timeout_s:g} s", code="timeout")
        if ticket.finish_reason == "cancelled":
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if self._log_prompts:
            prompt = self._model.tokenizer.decode(ticket.prompt_ids)
            LOG.info("prompt %r gave %r", prompt, ticket.text)
        yield index, None


async def exhaust(pieces: AsyncIterator[Piece]) -> None:
    async for _ in pieces:
        pass


class EventStream(Response):
    """An answer as server-sent events, while it is generated."""

    def __init__(
        self, answer: Answer, first: Piece, pieces: AsyncIterator[Piece], prompt_tokens: int | None,
        given_up: ExitStack,
    ):  # fmt: skip
        """`first` has come, and `pieces` are the others. With `prompt_tokens` usage ends it. When
        it is over, however it is, `given_up` ends what runs."""
        super().__init__(headers={"cache-control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._answer, self._first, self._pieces = answer, first, pieces
        self._prompt_tokens, self._given_up = prompt_tokens, given_up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Errors: HungUp."""
        with self._given_up:
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        answer = self._answer
        beginning = answer.first_chunks() + self._chunks(self._first)
        yield b"".join(map(self._event, beginning))
        try:
            async for piece in self._pieces:
                if chunks := self._chunks(piece):
                    yield b"".join(map(self._event, chunks))
        except ApiError as error:
            yield as_event(error.as_dict())
            return
        if self._prompt_tokens is not None:
            yield as_event(answer.usage_chunk(self._prompt_tokens))
        yield END

    def _chunks(self, piece: Piece) -> list[dict]:
        index, tokens = piece
        if tokens is None:
            return self._answer.last_chunks(index)
        return self._answer.text_chunks(index, tokens)

    def _event(self, chunk: dict) -> bytes:
        # Usage comes last, and before that it is said that it comes.
        return as_event(chunk if self._prompt_tokens is None else chunk | {"usage": None})
