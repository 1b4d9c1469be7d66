"""The loop: tokens go from method to method in place, and the host only reads them."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokenloop.runner.decisions import Decisions
from tokenloop.runner.draft_model import DraftModel
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.held_state import HeldStates
from tokenloop.runner.logprobs import Logprobs, logprobs_of
from tokenloop.runner.pace import Pace, Stall
from tokenloop.runner.prefill import ChunkedPrefill, PackedPrefill, Prefill
from tokenloop.runner.prefix_cache import PrefixCache
from tokenloop.runner.program import Choice, Program, Selected, Step
from tokenloop.runner.request import is_integer, shown
from tokenloop.runner.sequence import Sequence
from tokenloop.runner.slots import Slots
from tokenloop.runner.speculation import SPECULATIONS, DraftCounts, Rounds, can_speculate
from tokenloop.runner.turn import Turn

FEEDS = ("auto", "embed", "alias", "host")
POSITIONS = ("device", "host")


@dataclass(frozen=True)
class LoopOptions:
    """Variants of the loop, for comparison: all of them give the same tokens.

    - `feed`: "alias" hands a token, a method's output, to the next method as its input. "embed"
      hands on the token's embedding, which selection has looked up. "host" uploads the tokens that
      the host has read. "auto" is "embed" where the artifact has the methods for it and none
      that chooses a step's token at once, else "alias".
    - `positions`: "device" takes them from what went up when the program was loaded or a sequence
      joined. "host" uploads them for each call.
    - `double_buffering`: the next steps are submitted before the newest tokens are read.
    - `run_ahead`: so many steps are submitted at once. Their tokens are gathered on the device and
      read together. This and double buffering need a token that the host does not feed.
    - `graph`: a step is one launch of a captured graph, where the program can be captured.
    - `overlap`: the graph's kernels begin while the ones ahead of them end, where the artifact has
      kernels that can.
    - `speculate`: "lookup" lets steps try tokens that followed the newest ones earlier in the text,
      where the artifact was exported with --draft-tokens; "draft" lets them try those of another
      model (Model.use_draft). None is without.
    """

    feed: str = "auto"
    positions: str = "device"
    double_buffering: bool = True
    run_ahead: int = 1
    graph: bool = True
    overlap: bool = True
    speculate: str | None = None

    def __post_init__(self):
        if self.feed not in FEEDS:
            raise RunnerError(f"feed is {self.feed!r}; it must be one of {', '.join(FEEDS)}")
        if self.positions not in POSITIONS:
            names = " or ".join(POSITIONS)
            raise RunnerError(f"positions is {self.positions!r}; it must be {names}")
        for name in ("double_buffering", "graph", "overlap"):
            if not isinstance(value := getattr(self, name), bool):
                raise RunnerError(f"{name} is {value!r}; it must be True or False")
        if not is_integer(self.run_ahead) or self.run_ahead < 1:
            raise RunnerError(f"run_ahead is {self.run_ahead!r}; it must be at least 1")
        if self.run_ahead > 1 and self.feed == "host":
            raise RunnerError(
                f"run_ahead is {self.run_ahead} and feed 'host': each step would wait for the host"
            )
        if self.speculate is None:
            return
        if self.speculate not in SPECULATIONS:
            names = " or ".join(SPECULATIONS)
            raise RunnerError(f"speculate is {shown(self.speculate)}; it must be {names}, or None")
        # Rounds take tokens and positions from the device, and give several tokens by themselves.
        plain = {"feed": "host", "positions": "host"}
        for name, value in plain.items():
            if getattr(self, name) == value:
                raise RunnerError(
                    f"speculate is {self.speculate!r} and {name} {value!r}: how many tokens a step "
                    "gives is known on the device alone"
                )
        if self.run_ahead > 1:
            raise RunnerError(
                f"speculate is {self.speculate!r} and run_ahead {self.run_ahead}; it must be 1"
            )


class Loop:
    """Drives one program, in each of whose rows one sequence runs at a time, from position 0 on.

    Nothing has to be reset between sequences: a method sees only what was written in its row at
    the positions before its own.
    """

    def __init__(self, program: Program):
        self.program, self.transfers = program, program.transfers
        self.batch: int = program.manifest["batch"]
        # Since the program was loaded: decode steps, seconds until first tokens were computed, and
        # what became of drafts.
        self.steps, self.prefill_s = 0, 0.0
        self.drafts = DraftCounts()
        # The model whose drafts are tried, if there is one.
        self.draft: DraftModel | None = None
        # The program's state is one generation's at a time.
        self.turn = Turn()
        # Prefill takes the rows' numbers from it as well.
        count = max(program.manifest["max_seq_len"], self.batch)
        self._table = self.transfers.upload(range(count))
        program.capture(self._table)
        self._held = HeldStates(program)
        self._pace = Pace(program)
        self.decisions = Decisions()
        self._default = self.variant(LoopOptions())

    def variant(self, options: LoopOptions | None) -> LoopOptions:
        """The variant that `options` mean here, with its feed decided. Errors: RunnerError for one
        that the program lacks the methods for."""
        if options is None:
            return self._default
        if not isinstance(options, LoopOptions):
            raise RunnerError(f"options is {shown(options)}; it must be LoopOptions")
        if options.speculate is not None and not self.program.draft_tokens:
            raise RunnerError(
                f"speculate is {options.speculate!r}, and the artifact has no rounds for it: "
                "export it with --device cuda and --draft-tokens 7"
            )
        if options.speculate == "draft" and self.draft is None:
            raise RunnerError("speculate is 'draft', and there is no draft model: call use_draft")
        if options.speculate is not None and self.program.ranks is not None:
            raise RunnerError(
                f"speculate is {options.speculate!r}; several ranks may each find other drafts "
                "worth their time: it must be None"
            )
        if options.feed == "auto":
            embeds = self.program.embeds and not self.program.fuses
            return replace(options, feed="embed" if embeds else "alias")
        if options.feed == "embed" and not self.program.embeds:
            raise RunnerError(
                "feed is 'embed', and the artifact lacks the methods for it: take 'alias', or "
                "export it again"
            )
        return options

    def tokens(
        self, sequences: Iterable[Sequence], used: int, options: LoopOptions,
        stall: Stall | None = None, cache: PrefixCache | None = None,
        have_come: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[Sequence, int]]:  # fmt: skip
        """The ids that follow the sequences' prompts, as they come, `used` sequences at a time.

        A sequence is taken when a row is free for it. `sequences` may be an iterator that has none
        now and some later: it is asked before each step, and the run ends when no row has one. A
        sequence leaves when `limit` ids have come or it has a `finish_reason`, which may be given
        to it in any thread. Surplus steps may have been submitted by then; their results are
        dropped. The caller keeps len(prompt_ids) + limit within max_seq_len, both being at least 1,
        and has `options` from `variant`.

        With `stall` a step does not wait longer than that for the prompts of sequences that join,
        or than one chunk takes. Where no byte depends on its size, a chunk has no more tokens than
        take so long. The rest of a prompt is prefilled after the step, where the state can be
        reached; otherwise a step waits for a whole prompt. It changes no token. Neither does the
        `cache`, where beginnings of prompts are taken from and kept.

        `have_come` is called when all ids of a step have come: at once where a call computes, and
        where the device computes by itself once it has been given the next step, or before prompts
        are prepared for it. Until then whoever is told would only hold the host up. The ids at the
        very end are those of no call.
        """
        if options.speculate is not None:
            for found in self._speculated(sequences, options, cache):
                yield found
                have_come()
            return
        decisions, read = self.decisions, [0] * self.batch
        waiting = decisions.run(sequences, used, options, stall, cache)
        ahead = options.double_buffering and options.feed != "host"
        from_host = options.positions == "host"
        slots = Slots(self.program, used, self._table, from_host, decisions)
        steps = Steps(self.program, slots, options)
        prefill = self._prefill(from_host, cache)
        while True:
            # 1. Sequences join: their first tokens lie beside the others' newest ones.
            start = time.perf_counter()
            for row, sequence in slots.join(waiting):
                prefill.add(row, sequence.prompt_ids, sequence.request.prompt_logprobs)
            decisions.tell()
            if not slots.occupied():
                return
            prefills = bool(prefill.prompts)
            if prefills:
                # The device has the newest step to compute while the host prepares prompts.
                have_come()
            joined = self._first_tokens(slots, steps, prefill, stall)
            for row in joined:
                read[row] = 0
            if prefills and not self.program.is_asynchronous:
                self.prefill_s += time.perf_counter() - start
            if not slots.begun():
                have_come()
                continue
            # 2. The next steps are submitted, and then the tokens before them are read. Where a row
            # is restricted that comes between a step's network and its choice of tokens.
            unread = steps.unread()
            self.transfers.prefetch(unread)
            restricted = slots.restricted()
            # A step is measured where it is asked how long rows may stand still.
            begin = self.program.mark() if prefills and stall is not None else None
            count = 0
            if ahead and restricted:
                count = steps.begin_step()
            elif ahead:
                self._submit(steps, begin)
            have_come()
            ids = self.transfers.download(unread)
            # The same numbers have the same hash in every process.
            decisions.agree(hash(tuple(ids)))
            if prefills and self.program.is_asynchronous:
                # The first tokens are there, whether the next step is or not.
                self.prefill_s += time.perf_counter() - start
            arrived = [
                (row, sequence, ids[line + row])
                for line in range(0, len(ids), self.batch)
                for row, sequence in slots.begun()
                # The first token of a row that joined is in the last line.
                if row not in joined or line + self.batch == len(ids)
            ]
            if restricted:
                for row, _, token_id in arrived:
                    slots.see(row, token_id)
                if ahead:
                    decisions.tell()
                    steps.end_step()
                    self._note_steps(count, begin)
            # 3. Sequences that are finished leave.
            for row, sequence, token_id in arrived:
                if slots.sequence(row) is not sequence:
                    continue
                read[row] += 1
                if not decisions.ended(sequence):
                    if sequence.request.logprobs is not None:
                        sequence.logprobs.append(steps.logprobs[row].popleft()())
                    yield sequence, token_id
                if decisions.ended(sequence) or read[row] == sequence.limit:
                    slots.leave(row)
            if not self.program.is_asynchronous:
                have_come()
            if not ahead:
                decisions.tell()
                begin = None if begin is None else self.program.mark()
                self._submit(steps, begin, ids if options.feed == "host" else None)

    def _submit(self, steps: "Steps", begin: Any, ids: list[int] | None = None) -> None:
        self._note_steps(steps.submit(ids), begin)

    def _note_steps(self, count: int, begin: Any) -> None:
        """So many steps were submitted, and are measured if there is a mark before them."""
        self.steps += count
        if begin is not None:
            self._pace.add_steps(count, begin, self.program.mark())

    def _speculated(
        self, sequences: Iterable[Sequence], options: LoopOptions, cache: PrefixCache | None
    ) -> Iterator[tuple[Sequence, int]]:
        """`tokens` in rounds that may try drafts, one sequence after the other. Those whose tokens
        rounds cannot give come from steps: they are the same."""
        plain = replace(options, speculate=None)
        for sequence in sequences:
            if not can_speculate(sequence):
                yield from self.tokens([sequence], 1, plain, None, cache)
                continue
            start, steps, drafts = time.perf_counter(), self.steps, self.drafts
            slots = Slots(self.program, 1, self._table, False, self.decisions)
            first, prefill = Steps(self.program, slots, plain), self._prefill(False, cache)
            for row, _ in slots.join(iter([sequence])):
                prefill.add(row, sequence.prompt_ids, False)
            self._first_tokens(slots, first, prefill, None)
            if not slots.begun():
                continue
            ahead = options.double_buffering
            draft = self.draft if options.speculate == "draft" else None
            rounds = Rounds(self.program, sequence, first.unread(), ahead, draft)
            for number, token_id in enumerate(rounds.tokens()):
                if number == 0:
                    self.prefill_s += time.perf_counter() - start
                self.steps = steps + rounds.submitted
                self.drafts = drafts.plus(rounds.counts)
                yield sequence, token_id

    def _prefill(self, from_host: bool, cache: PrefixCache | None) -> Prefill:
        """What prefills prompts as the program takes them."""
        if self.program.packing is None:
            return ChunkedPrefill(self.program, self._table, from_host, cache)
        return PackedPrefill(self.program, cache)

    def _first_tokens(
        self, slots: Slots, steps: "Steps", prefill: Prefill, stall: Stall | None
    ) -> set[int]:
        """Prefill the prompts that wait, as long as rows that have begun may stall; the rows that
        begin now."""
        begun: set[int] = set()
        decisions = self.decisions
        stalled_since = time.perf_counter() if slots.begun() else None
        max_stall_s = most = None
        if stall is not None:
            max_stall_s = self._pace.seconds(stall)
            # Where a prompt cannot wait between its chunks, fewer tokens would only take longer.
            can_wait = self._held.can_wait and self.program.packing
            if stalled_since is not None and prefill.prompts and can_wait:
                most = decisions.made(self._pace.tokens(max_stall_s))
        self._held.put([prompt.row for prompt in prefill.part_done()])
        while prefill.prompts:
            given_up = [row for row, s in slots.waiting() if decisions.ended(s)]
            for row in given_up:
                prefill.drop(row)
                slots.leave(row)
            if given_up:
                continue
            decisions.tell()
            start = time.perf_counter()
            begin = None if most is None else self.program.mark()
            for prompt, logits in prefill.advance(most):
                if prompt.is_done:
                    slots.sequence(prompt.row).cached_tokens = prompt.cached
                    slots.begin(prompt.row)
                    steps.begin(prompt.row, logits)
                    begun.add(prompt.row)
                else:
                    sequence, next_id = slots.sequence(prompt.row), prompt.ids[prompt.first]
                    found = logprobs_of(logits[0], next_id, sequence.request.logprobs)
                    sequence.prompt_logprobs.append(found)
            if begin is not None:
                self._pace.add_chunk(prefill.taken, begin, self.program.mark())
            now = time.perf_counter()
            if stalled_since is None and begun:
                stalled_since = now
            if max_stall_s is None or stalled_since is None:
                continue
            # The next chunk takes as long as this one. A program that returns before it is done
            # does not say how long that is.
            ends = self.program.is_asynchronous or 2 * now - stalled_since - start > max_stall_s
            if decisions.made(ends):
                part_done = prefill.part_done()
                if part_done:
                    can_wait = self._held.can_wait
                    kept = can_wait and self._held.keep([prompt.row for prompt in part_done])
                    decisions.agree(int(kept))
                    if not kept:
                        most = None
                        continue
                for prompt in part_done:
                    slots.wait(prompt.row, prompt.first)
                break
        decisions.tell()
        return begun


class Steps:
    """The steps of one run of the loop. Each is fed what the one before it gave, and writes the
    other next_id buffer."""

    def __init__(self, program: Program, slots: Slots, options: LoopOptions):
        self._program, self._slots = program, slots
        program.begin(options.feed == "embed", options.graph, options.overlap)
        self._buffer, token = 0, program.next_id(0)
        self._newest = Selected(token, token)
        # No row needs more steps than it has positions.
        self._run_ahead = min(options.run_ahead, program.manifest["max_seq_len"])
        self._gathered = Gathered(program, self._run_ahead) if options.run_ahead > 1 else None
        # Of a step that has begun: what it is given, the logits, and of which rows log
        # probabilities are asked for.
        self._begun: tuple[Step, Any, list[tuple[int, int]]] | None = None
        # What gives those of each row's tokens that are not read yet, where they are asked for.
        count = program.manifest["batch"]
        self.logprobs: list[deque[Callable[[], Logprobs]]] = [deque() for _ in range(count)]

    def begin(self, row: int, logits: Any) -> None:
        """Choose the row's first token from its prompt's logits [1, V], and put it beside the
        newest ones. In a batch of one row it is the newest one, without a copy."""
        program, choice = self._program, self._slots.first_choice(row)
        alternatives = self._slots.sequence(row).request.logprobs
        given = self._before(choice, logits, alternatives is not None)
        if program.manifest["batch"] == 1:
            self._newest = program.select(logits, self._buffer, choice)
        else:
            chosen, token = program.select_row(logits, choice), self._newest.token
            program.transfers.copy(chosen, token[row : row + 1])
            self._newest = Selected(token, program.feed(token, self._buffer))
        if self._gathered:
            self._gathered.join(row, self._newest.token)
        self.logprobs[row].clear()
        if alternatives is not None:
            token = self._newest.token[row : row + 1]
            self.logprobs[row] += program.logprobs(given, token, [(0, alternatives)])

    def unread(self) -> Any:
        """The tokens int64 [N, B] or [B, 1] of the newest steps, in memory that the steps which are
        submitted next leave alone."""
        if self._gathered:
            return self._gathered.lines(self._newest.token)
        return self._newest.token

    def submit(self, ids: list[int] | None = None) -> int:
        """Submit the next step, or as many as run ahead and the rows need, but one where a row is
        restricted; how many. With `ids` the host feeds it the tokens that it has read."""
        if self._slots.restricted():
            count = self.begin_step(ids)
            self.end_step()
            return count
        if self._gathered:
            self._gathered.clear()
        for count in range(self._run_ahead):
            if not self._slots.need_a_step():
                return count
            fed = self._feed(ids)
            wanted = self._slots.want_logprobs()
            self._newest = self._program.step(fed, self._slots.next_step(), self._buffer)
            self._note(self._program.logits if wanted else None, wanted)
            if self._gathered:
                self._gathered.add(self._newest.token)
        return self._run_ahead

    def begin_step(self, ids: list[int] | None = None) -> int:
        """Submit the network of the next step, if the rows need one; how many steps that are. The
        newest tokens may be seen before `end_step` follows."""
        if self._gathered:
            self._gathered.clear()
        if not self._slots.need_a_step():
            return 0
        fed, wanted = self._feed(ids), self._slots.want_logprobs()
        step = self._slots.next_positions()
        self._begun = step, self._program.begin_step(fed, step, self._buffer), wanted
        return 1

    def end_step(self) -> None:
        """Submit the choice of the next tokens, if a step has begun."""
        if self._begun is None:
            return
        (step, logits, wanted), self._begun = self._begun, None
        step = step._replace(choice=self._slots.next_choice(step.positions))
        given = self._before(step.choice, logits, bool(wanted))
        self._newest = self._program.end_step(logits, step, self._buffer)
        self._note(given, wanted)
        if self._gathered:
            self._gathered.add(self._newest.token)

    def _feed(self, ids: list[int] | None) -> Any:
        """What the next step is fed; it writes the other buffer."""
        fed = self._newest.fed
        if ids is not None:
            out = self._program.next_id(self._buffer)
            fed = self._program.transfers.upload([[i] for i in ids], out=out)
        self._buffer = 1 - self._buffer
        return fed

    def _before(self, choice: Choice, logits: Any, are_wanted: bool) -> Any:
        """The logits as they are before a choice, which changes them in place, if they are wanted
        after it."""
        return self._program.copied(logits) if are_wanted and choice.changes else logits

    def _note(self, logits: Any, wanted: list[tuple[int, int]]) -> None:
        """Keep what gives the log probabilities of some rows' newest tokens, before the logits are
        gone."""
        if wanted:
            found = self._program.logprobs(logits, self._newest.token, wanted)
            for (row, _), read in zip(wanted, found):
                self.logprobs[row].append(read)


class Gathered:
    """Tokens of the steps that run ahead, one line [B] for each, in one of two memories that take
    turns: one is written while the other is read."""

    def __init__(self, program: Program, run_ahead: int):
        self._copy = program.transfers.copy
        self._memories = [program.empty(run_ahead, program.manifest["batch"]) for _ in range(2)]
        self._count = 0

    def clear(self) -> None:
        """Begin with no lines, in the other memory."""
        self._memories.reverse()
        self._count = 0

    def add(self, token: Any) -> None:
        """Add a line: token int64 [B, 1]."""
        self._copy(token[:, 0], self._memories[0][self._count])
        self._count += 1

    def join(self, row: int, token: Any) -> None:
        """Put a row's first token, of token int64 [B, 1], into the last line, if there is one."""
        if self._count:
            last = self._memories[0][self._count - 1]
            self._copy(token[row], last[row : row + 1])

    def lines(self, token: Any) -> Any:
        """The lines int64 [N, B]; if there are none, one with token int64 [B, 1]."""
        if not self._count:
            self.add(token)
        return self._memories[0][: self._count]
