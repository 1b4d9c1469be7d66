"""What the loop drives: the methods of a loaded artifact, whichever engine runs them.

Arrays are NumPy's or torch's, as the engine computes. B are the rows of a batch, V is the
vocabulary, D the width of hidden, T the length of a chunk of a prompt.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from tokenloop.runner.logprobs import Logprobs, logprobs_of
from tokenloop.runner.request import Request
from tokenloop.runner.transfers import Transfers

# What selection takes between the logits and the positions where it samples, each [B].
PARAMETERS = {
    "temperature": np.float32, "top_k": np.int64, "top_p": np.float32, "seed": np.int64,
}  # fmt: skip
# The state by the last part of its names: caches with a slot for each position, what goes on with
# every token, and what is no row's.
CACHES, RUNNING = {"k", "v"}, {"conv", "recurrent"}
OF_NO_ROW = {"kernel_semaphores", "draft_k", "draft_v", "peers", "epochs"}


class Change(NamedTuple):
    """What changes the logits of some rows before tokens are chosen: "mask" or "adjust", and of
    each such row what the method takes after the logits, arrays of one row."""

    method: str
    rows: dict[int, tuple]


class Choice(NamedTuple):
    """How tokens are chosen: a method, and what it takes after the logits. "greedy" takes nothing;
    "sample", and "sample_unfiltered" where no row has a top_k or a top_p, take the arrays of
    PARAMETERS and the positions int64 [B] of the newest tokens that were fed. Before that the
    logits are changed in place, by one of `changes` after the other."""

    method: str = "greedy"
    inputs: tuple = ()
    changes: tuple[Change, ...] = ()


GREEDY = Choice()


class Step(NamedTuple):
    """What one step is given beside the tokens: positions int64 [B] on the device, and how the next
    tokens are chosen. `line` is the positions' number among the lines that the device has: those of
    `step_inputs`, or for one row the position table. It is None for positions that the host has
    just uploaded."""

    positions: Any
    line: int | None
    choice: Choice


class Selected(NamedTuple):
    """The chosen token int64 [B, 1], and what the next step is fed: the same memory, or the token's
    embedding [B, 1, D]."""

    token: Any
    fed: Any


class Packing(NamedTuple):
    """What prefill_packed takes: up to `capacity` tokens of up to `parts` prompts, each of which is
    cut at positions that `multiple` divides."""

    capacity: int
    parts: int
    multiple: int


class Program(Protocol):
    """The loaded methods of one artifact.

    What a method gives lies in the program's memory and is valid until the same method runs again;
    selection has two next_id buffers, 0 and 1, that take turns. Inputs are used where they are.

    `manifest` is the artifact's; `transfers` copies to, from and within the memory that methods
    take. `embeds` says whether a step can be fed embeddings, `has_graphs` whether it can be one
    launch of a captured graph. Such a graph reads the same memory every time: `step_inputs` are the
    arrays that uploads have to go to, by name, those of PARAMETERS and "lines" int64 [N, B] of
    positions; and what changes take, "allowed" uint8 [B, W], and "ids", "scale" and "bias" [B, K].
    Where there is none of a name, an upload makes an array.
    """

    manifest: dict[str, Any]
    transfers: Transfers
    embeds: bool = False
    # Whether a step of greedy selection that is fed tokens is one method, so that embeddings, which
    # take two, are not fed by themselves.
    fuses: bool = False
    has_graphs: bool = False
    # Whether methods return before they are done.
    is_asynchronous: bool = False
    # How prompts are packed, or None where each is prefilled by itself.
    packing: Packing | None = None
    step_inputs: dict[str, Any] = {}
    # How many drafts a round can try, 0 where there are no rounds; how long a round with drafts
    # takes, in rounds without; how many seconds one of the latter takes; and whether drafts can be
    # given.
    draft_tokens: int = 0
    draft_cost: float = 1.0
    round_s: float = 0.0
    verifies: bool = False
    # The logits float32 [B, V] of the newest `decode`, where there are log probabilities.
    has_logits: bool = False
    logits: Any = None
    # What outlives a method's run, by the manifest's names: for each tensor its pieces [B, S, ...],
    # which lie one behind the other along S. None where the runner cannot reach it.
    state: dict[str, list[Any]] | None = None
    # The ranks that compute together (engines/ranks.py), or None where this process does alone.
    ranks: Any = None
    # Whether steps are fed embeddings, as the newest run has it. Before any run it is tokens.
    embedding: bool = False

    def capture(self, table: Any) -> None:
        """Capture the steps of greedy selection, if the engine can, once the position table int64
        [N] is there. Errors: RunnerError where memory is short."""

    def load_sampling(self, method: str, embed: bool) -> None:
        """Load `method`, "sample" or "sample_unfiltered", for a run that feeds embeddings or does
        not. Errors: RunnerError for an artifact that cannot sample."""

    def load_change(self, method: str) -> None:
        """Load "mask" or "adjust", which the artifact has."""

    def begin(self, embed: bool, graph: bool = True, overlap: bool = True) -> None:
        """Begin a run of the loop. With `embed` its steps are fed embeddings, otherwise tokens.
        Where there are graphs, a step is one launch with `graph`, and with `overlap` the kernels
        of a launch begin while the ones ahead of them end."""
        self.embedding = embed

    def prefill(self, tokens: Any, positions: Any, *row: Any) -> Any:
        """Logits float32 [1, V] after tokens int64 [1, T] at positions int64 [T], and in a batch of
        several in the row int64 [1]."""

    def pool(self, tokens: Any, positions: Any) -> Any:
        """The pooled output float32 [1, P] of what `prefill` takes of the only row, where the
        artifact has one."""

    def prefill_packed(self, chunk: list[Any]) -> Any:
        """Logits float32 [B, V] of whose rows the first ones are those after each of the chunk's
        Parts (prefill.py), where there is `packing`."""

    def step(self, fed: Any, step: Step, buffer: int) -> Selected:
        """One more token of each row, in the next_id buffer 0 or 1: `decode`, then `select`."""
        return self.select(self.decode(fed, step.positions), buffer, step.choice)

    def begin_step(self, fed: Any, step: Step, buffer: int) -> Any:
        """The first part of `step`, for a choice that is not known yet: `decode`. Gives what
        `end_step` takes."""
        return self.decode(fed, step.positions)

    def end_step(self, logits: Any, step: Step, buffer: int) -> Selected:
        """The second part: `select`."""
        return self.select(logits, buffer, step.choice)

    def decode(self, fed: Any, positions: Any) -> Any:
        """Logits float32 [B, V] after what is fed, token int64 [B, 1] or its embedding [B, 1, D],
        at positions int64 [B]."""

    def select(self, logits: Any, buffer: int, choice: Choice = GREEDY) -> Selected:
        """The next tokens of logits float32 [B, V], in the next_id buffer 0 or 1."""

    def select_row(self, logits: Any, choice: Choice) -> Any:
        """The next token int64 [1, 1] of the logits [1, V] of one row of several, in memory of its
        own."""

    def copied(self, logits: Any) -> Any:
        """A copy of logits, which stays as they are now."""
        return np.array(logits)

    def logprobs(
        self, logits: Any, token: Any, wanted: list[tuple[int, int]]
    ) -> list[Callable[[], Logprobs]]:
        """What gives the log probabilities of some rows' tokens, which is asked for later: `wanted`
        are rows of logits float32 [B, V] and token int64 [B, 1], each with its number of
        alternatives. Both may be overwritten by what is submitted next."""
        found = []
        for row, count in wanted:
            (token_id,) = self.transfers.download(token[row])
            value = logprobs_of(logits[row], token_id, count)
            found.append(lambda value=value: value)
        return found

    def begin_rounds(self, ids: list[int], token: Any, request: Request) -> None:
        """Begin rounds of one sequence, whose prompt `ids` is prefilled, and after which the token
        int64 [1, 1] was chosen: what the request asks for chooses the tokens after it."""

    def submit_round(
        self, drafted: bool, method: str, buffer: int, drafts: list[int] | None = None
    ) -> Any:
        """Submit the sequence's next step, which with `drafted` tries draft_tokens drafts of the
        tokens that follow it: those that are given, once all rounds before have been read, or what
        the text suggests. `method` chooses all tokens. Gives memory int64 [1 + N], 0 or 1 of two:
        how many of the tokens that were chosen are the sequence's, at least 1, and those N,
        1 + draft_tokens or 1. They are the tokens of as many steps without drafts."""

    def feed(self, token: Any, buffer: int) -> Any:
        """What the next step is fed of the tokens int64 [B, 1] in a next_id buffer."""
        return token

    def next_id(self, buffer: int) -> Any:
        """The next_id buffer int64 [B, 1] that greedy selection writes, and anyone may."""

    def empty(self, *shape: int) -> Any:
        """Memory int64 of that shape, for tokens."""

    def mark(self) -> Any:
        """A mark behind all that was submitted until now."""
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float | None:
        """The time between two marks, or None as long as what is before the second is not done."""
        return end - begin


def selection_method(requests: Iterable[Request], manifest: dict[str, Any]) -> str:
    """The method that chooses the next tokens of these requests: the cheapest that the artifact has
    of those that give all of them what they ask for."""
    sampled = [request for request in requests if request.temperature > 0]
    if not sampled:
        return "greedy"
    vocab_size = manifest["vocab_size"]
    filtered = any(0 < r.top_k < vocab_size or r.top_p < 1 for r in sampled)
    unfiltered = "sample_unfiltered" in manifest["methods"]
    return "sample_unfiltered" if unfiltered and not filtered else "sample"
