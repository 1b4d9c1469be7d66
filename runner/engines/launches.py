"""Launch lists on a CUDA GPU: a step is one launch of a graph, and so is a chunk of prompts."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tokenloop.runner.engines.device_logprobs import DeviceLogprobs
from tokenloop.runner.engines.draft_rounds import DraftRounds
from tokenloop.runner.engines.graph_capture import captured
from tokenloop.runner.engines.launch_list import LaunchList, Method
from tokenloop.runner.engines.staging import Staging
from tokenloop.runner.engines.step_graphs import CHOICE, NETWORK, StepGraphs
from tokenloop.runner.engines.tensors import ALONE, explained, find_device, load_tensors
from tokenloop.runner.engines.torch_memory import Aligned, TorchMemory
from tokenloop.runner.logprobs import Logprobs
from tokenloop.runner.manifest import Artifact
from tokenloop.runner.prefill import LAYOUT, Part, layout
from tokenloop.runner.program import (
    GREEDY,
    PARAMETERS,
    Choice,
    Packing,
    Program,
    Selected,
    Step,
)
from tokenloop.runner.ranks import Place
from tokenloop.runner.request import Request
from tokenloop.runner.restriction import ADJUSTED
from tokenloop.runner.transfers import Transfers

PREFILL = "prefill_"
# What the methods that change logits take of step_inputs.
TAKEN = {"mask": ("allowed",), "adjust": tuple(ADJUSTED)}
# Kernels of longer chunks fill the processors by themselves. Those that begin early beside them
# cost 3 % of 8,192 tokens' time, and save 2 % of 1,024 tokens'.
OVERLAPPING_TOKENS = 1024


class LaunchProgram(Program):
    """The methods of a launch list. Weights and state are there once, for all. A step finds its
    positions by itself, and selection looks the embedding up."""

    embeds = has_graphs = is_asynchronous = has_logits = True

    def __init__(self, artifact: Artifact, threads: int | None = None, place: Place = ALONE):
        """Load weights and kernels. `threads` changes nothing: a GPU computes. Of several ranks
        this is the one of `place`, on the GPU of its number.

        Errors: RunnerError for a package of another device or processor, weights that do not fit
        it, a device without enough memory, and fewer GPUs than ranks.
        """
        self._artifact, self.manifest = artifact, artifact.manifest
        if place.count > 1:
            # torch.distributed takes time to import.
            from tokenloop.runner.engines.mailboxes import Mailboxes, choose_device
            from tokenloop.runner.engines.ranks import Ranks

            choose_device(place)
        self._device = find_device(artifact)
        memory = TorchMemory(self._device)
        self.transfers, self._stream, self._memory = Transfers(memory), memory.stream, memory
        self._aligned = Aligned(self.transfers, True)
        if place.count > 1:
            # The host's words go by gloo. What GPUs tell one another goes by mailboxes.
            self.ranks = Ranks(place, self.transfers.between_ranks, "cpu:gloo,cuda:nccl")
        batch = self.manifest["batch"]
        with self._on_stream(), explained(artifact):
            self.tensors = load_tensors(artifact, self._device, place)
            self.state = {e["name"]: [self.tensors[e["name"]]] for e in self.manifest["state"]}
            self._list = LaunchList(artifact, self.tensors, self._device)
            if self.ranks is not None:
                boxes = self.manifest["tensor_parallel"]["mailboxes"]
                self._mailboxes = Mailboxes(boxes, self.ranks, self.tensors, self._device)
                self.ranks.watch()
            self._chunks = self._list.keep_what_fits(PREFILL, self.ranks)
            self._methods: dict[str, Method] = {}
            # The two buffers: next_id, and hidden beside it. Rows without a sequence are fed what
            # is there, which must be a token.
            shape, dtype = (batch, 1, self.manifest["hidden_size"]), self.manifest["dtype"]
            hidden = torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)
            self._buffers = [(self.empty(batch, 1).zero_(), hidden.clone()) for _ in range(2)]
            self._row_id = self.empty(1, 1)
            self.step_inputs = {
                name: memory.new(np.zeros(batch, dtype)) for name, dtype in PARAMETERS.items()
            }
            if "mask" in self.manifest["methods"]:
                # Every row has a place.
                places = self._list.inputs("mask") | self._list.inputs("adjust")
                for name in ("allowed", *ADJUSTED):
                    shape, dtype = places[name]
                    place = torch.zeros(shape, dtype=dtype, device=self._device)
                    self.step_inputs[name] = place
            if batch > 1:
                lines = self.empty(self.manifest["max_seq_len"], batch).zero_()
                self.step_inputs["lines"] = lines
        self.packing = Packing(self._chunks[-1], batch, self.manifest["chunk_multiple"])

    def capture(self, table: Tensor) -> None:
        lines = self.step_inputs.get("lines", table[:, None])
        with self._on_stream(), explained(self._artifact):
            parameters = [self.step_inputs[name] for name in PARAMETERS]
            self._graphs = StepGraphs(
                self._run, partial(self._call, "next_positions"), lines, table, parameters,
                self.transfers, self._stream, self.manifest["waiting_kernels"],
            )  # fmt: skip
            self.begin(embed=True)
            # At position 0, which every sequence overwrites.
            for buffer in (0, 1):
                self.next_id(1 - buffer).zero_()
                self.step(self._fed(1 - buffer), Step(lines[0], 0, GREEDY), buffer)
            self.begin(embed=False)
            self._capture_prefill()
            self.draft_tokens = self.manifest.get("draft_tokens", 0)
            if self.draft_tokens:
                self._rounds = DraftRounds(
                    self._call, self.draft_tokens, self.manifest["max_seq_len"], self._memory,
                    self.transfers, self.manifest["waiting_kernels"],
                )  # fmt: skip
                self.draft_cost, self.round_s = self._rounds.cost, self._rounds.plain_s
                name = f"verify_{1 + self.draft_tokens}"
                self.verifies = name in self.manifest["methods"]

    def begin_rounds(self, ids: list[int], token: Tensor, request: Request) -> None:
        self._rounds.begin(ids, token, request)

    def submit_round(
        self, drafted: bool, method: str, buffer: int, drafts: list[int] | None = None
    ) -> Tensor:
        how = self._graph, self._overlap
        return self._rounds.submit(drafted, method, buffer, *how, drafts)

    def _capture_prefill(self) -> None:
        """Capture a graph for each number of tokens that a chunk is rounded up to. Those whose
        kernels do not overlap are captured when they are asked for."""
        # What a chunk is told lies in one memory, which goes up in one copy: numbers of 64 bits,
        # the last of which are the tokens.
        inputs = self._list.inputs(f"{PREFILL}{self._chunks[-1]}")
        places: dict[str, slice] = {}
        size = 0
        for name, (shape, _) in inputs.items():
            if name != "tokens":
                places[name] = slice(2 * size, 2 * size + shape[0])
                size += -(-shape[0] // 4) * 2  # each begins where 16 bytes do
        self._told = size
        self._prompt = torch.zeros(size + self._chunks[-1], dtype=torch.int64, device=self._device)
        words = self._prompt.view(torch.int32)
        given = {name: words[place] for name, place in places.items()}
        self._staging = Staging(self._prompt, self._stream)
        # What a method is not told goes nowhere.
        parts = self.packing.parts
        self._layouts = [
            {name: np.zeros(parts + 1, np.int32) for name in LAYOUT}
            | {name: array.view(np.int32)[place] for name, place in places.items()}
            for array in self._staging.arrays
        ]
        self._prefills: dict[int, tuple[Callable[[], tuple[Tensor, ...]], Tensor]] = {}
        self._prefill_graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        for count in self._chunks:
            tokens = self._prompt[size : size + count]
            names = self._list.inputs(f"{PREFILL}{count}")
            values = [(given | {"tokens": tokens})[name] for name in names]
            method = self._list.method(f"{PREFILL}{count}")
            self._prefills[count] = partial(method, *values), method.outputs[0]
            self._prefill_graph(count, overlap=True)

    def _prefill_graph(self, count: int, overlap: bool) -> torch.cuda.CUDAGraph:
        overlap = overlap and count <= OVERLAPPING_TOKENS
        if (count, overlap) not in self._prefill_graphs:
            names = self.manifest["waiting_kernels"] if overlap else []
            run = self._prefills[count][0]
            graph = captured(run, self._pool, self._stream, names)
            self._prefill_graphs[count, overlap] = graph
        return self._prefill_graphs[count, overlap]

    def prefill_packed(self, chunk: list[Part]) -> Tensor:
        buffer = self._staging.take()
        layout(chunk, self._layouts[buffer])
        told, end = self._staging.arrays[buffer], self._told
        for part in chunk:
            begin, end = end, end + len(part.ids)
            told[begin:end] = np.fromiter(part.ids, np.int64, end - begin)
        self.transfers.send(self._staging, end)
        count = next(size for size in self._chunks if size >= end - self._told)
        with self._on_stream():
            self._prefill_graph(count, self._overlap).replay()
        return self._prefills[count][1]

    def load_sampling(self, method: str, embed: bool) -> None:
        for name in self._artifact.sampling_methods(self.manifest["methods"], method, embed):
            self._method(name)

    def load_change(self, method: str) -> None:
        for name in (method, f"{method}_row"):
            self._method(name)

    def begin(self, embed: bool, graph: bool = True, overlap: bool = True) -> None:
        self.embedding, self._graph, self._overlap = embed, graph, overlap

    def step(self, fed: Tensor, step: Step, buffer: int) -> Selected:
        if not self._graph:
            return super().step(fed, step, buffer)
        # A captured step reads the buffer itself. A token that the host fed is in it as well.
        assert fed.data_ptr() == self._fed(1 - buffer).data_ptr()
        self._graphs.submit(step, buffer, self.embedding, self._overlap)
        return Selected(self.next_id(buffer), self._fed(buffer))

    def begin_step(self, fed: Tensor, step: Step, buffer: int) -> Tensor:
        if not self._graph:
            return super().begin_step(fed, step, buffer)
        assert fed.data_ptr() == self._fed(1 - buffer).data_ptr()
        self._graphs.submit(step, buffer, self.embedding, self._overlap, NETWORK)
        return self.logits

    def end_step(self, logits: Tensor, step: Step, buffer: int) -> Selected:
        if not self._graph:
            return super().end_step(logits, step, buffer)
        self._graphs.submit(step, buffer, self.embedding, self._overlap, CHOICE)
        return Selected(self.next_id(buffer), self._fed(buffer))

    def _run(self, step: Step, buffer: int, part: str) -> None:
        """A step, or a part of one, as it is captured."""
        if part == CHOICE:
            self.select(self.logits, buffer, step.choice)
        elif part == NETWORK:
            self.decode(self._fed(1 - buffer), step.positions)
        else:
            super().step(self._fed(1 - buffer), step, buffer)

    def decode(self, fed: Tensor, positions: Tensor) -> Tensor:
        hidden = fed if self.embedding else self._call("embed", fed)
        return self._call("decode_embedded", hidden, positions)

    def select(self, logits: Tensor, buffer: int, choice: Choice = GREEDY) -> Selected:
        for method, _ in choice.changes:
            self._call(method, logits, *(self.step_inputs[name] for name in TAKEN[method]))
        out = self._buffers[buffer]
        name = choice.method + "_embed" * self.embedding
        self._call(name, logits, *choice.inputs, *out[: 1 + self.embedding])
        return Selected(out[0], out[self.embedding])

    def select_row(self, logits: Tensor, choice: Choice) -> Tensor:
        # Changes are made in place, and what is chosen from must be what was changed: a copy too.
        (logits,) = self._aligned(logits)
        for method, rows in choice.changes:
            self._call(f"{method}_row", logits, *rows[0])
        self._call(f"{choice.method}_row", logits, *choice.inputs, self._row_id)
        return self._row_id

    @property
    def logits(self) -> Tensor:
        """Those of the newest step, captured or not."""
        return self._method("decode_embedded").outputs[0]

    def copied(self, logits: Tensor) -> Tensor:
        with self._on_stream():
            return logits.clone()

    def logprobs(
        self, logits: Tensor, token: Tensor, wanted: list[tuple[int, int]]
    ) -> list[Callable[[], Logprobs]]:
        with self._on_stream():
            return DeviceLogprobs(self.transfers, logits, token, wanted).readers()

    def feed(self, token: Tensor, buffer: int) -> Tensor:
        if not self.embedding:
            return token
        self.transfers.copy(self._call("embed", token), self._buffers[buffer][1])
        return self._buffers[buffer][1]

    def next_id(self, buffer: int) -> Tensor:
        return self._buffers[buffer][0]

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=self._device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return begin.elapsed_time(end) / 1e3 if end.query() else None

    def _fed(self, buffer: int) -> Tensor:
        """What a step is fed that follows `select` into this buffer."""
        return self._buffers[buffer][self.embedding]

    def _method(self, name: str) -> Method:
        if name not in self._methods:
            # Its outputs are cleared on the stream that writes them, not at some later time.
            with self._on_stream():
                self._methods[name] = self._list.method(name)
        return self._methods[name]

    def _call(self, name: str, *inputs: Tensor) -> Tensor | None:
        method = self._method(name)
        with self._on_stream():
            outputs = method(*self._aligned(*inputs))
        return outputs[0] if outputs else None

    def _on_stream(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._stream)
