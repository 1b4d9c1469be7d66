"""Rounds of drafts on CUDA, by the decode step's own kernels: a step whose rows are the newest
token of one sequence and drafts of those after it.

Shapes: R rows of a round, N places of the sequence's history, V vocabulary. A token at place p of
the history is at position p.
"""

import torch
from torch import Tensor, nn

from tokenloop.export.errors import ExportError
from tokenloop.export.launches.cuda_step import CudaStep
from tokenloop.export.launches.embedded import Tables
from tokenloop.export.launches.methods import Method, choice_inputs
from tokenloop.export.methods import Select, integers
from tokenloop.export.packed_weights import PackedAttention
from tokenloop.models.decoder import Backbone
from tokenloop.models.kernels import cuda
from tokenloop.sampler.kernels import operator


class Drafts(nn.Module):
    """Keys and values [R, 1, G, Dh] of a round's rows, which a cache may not have yet."""

    def __init__(self, cache: nn.Module, rows: int):
        super().__init__()
        for name, of in ("draft_k", cache.k), ("draft_v", cache.v):
            buffer = torch.zeros(rows, 1, *of.shape[2:], dtype=of.dtype, device=of.device)
            self.register_buffer(name, buffer, persistent=False)


class Round(Tables):
    """history int64 [N], position int64 [1], tokens and positions int64 [R] -> logits float32
    [R, V] after each of the tokens. tokens and positions are written: the newest token, which is at
    `position`, and drafts.

    Row i's logits have the bits of `step` after the tokens before it, if those are the sequence's.
    So that they can be, no row writes to a ring: `Accept` does, when it is known which of them may.
    """

    def __init__(self, step: CudaStep, backbone: Backbone, drafts: nn.ModuleList | None):
        """`drafts` are for each layer, and None for rounds of one row."""
        super().__init__(backbone)
        self.step, self.drafts = step, drafts

    def forward(
        self, history: Tensor, position: Tensor, tokens: Tensor, positions: Tensor
    ) -> Tensor:
        cuda.next_drafts(history, position, tokens, positions)
        return self.logits(tokens, positions)

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Those after each of a round's tokens."""
        x = cuda.embed_chunk(tokens, self.embed_tokens.weight, scale=self.scale)
        return self.step.run(x, positions, drafts=self.drafts)


class Verify(Round):
    """As `Round`, with drafts int64 [R - 1] that are given: those of another model."""

    def forward(
        self, history: Tensor, position: Tensor, drafts: Tensor, tokens: Tensor, positions: Tensor
    ) -> Tensor:
        cuda.take_drafts(history, position, drafts, tokens, positions)
        return self.logits(tokens, positions)


class Accept(nn.Module):
    """What a round has, the tokens chosen after its rows int64 [R, 1], history int64 [N], position
    int64 [1], and accepted int64 [1 + R]: as models/kernels/drafts has it. The last three are
    written, and the rings."""

    def __init__(self, step: CudaStep, drafts: nn.ModuleList | None):
        super().__init__()
        self.step, self.drafts = step, drafts

    def forward(
        self, tokens: Tensor, positions: Tensor, chosen: Tensor, history: Tensor,
        position: Tensor, accepted: Tensor,
    ) -> None:  # fmt: skip
        cuda.accept(tokens, chosen[:, 0], history, position, accepted)
        for layer, drafts in zip(self.step.layers, self.drafts or ()):
            cache = layer.cache
            if cache.is_ring:
                rows = drafts.draft_k, drafts.draft_v, positions, accepted
                cuda.store_drafts(*rows, cache.k, cache.v)


def draft_methods(
    step: CudaStep, backbone: Backbone, count: int, vocab_size: int, max_seq_len: int
) -> dict[str, Method]:
    """Rounds of `count` drafts, found or given, and of none; selection after the former, and what
    follows it.

    Errors: ExportError for a layer whose state cannot be taken back, and for more drafts than a
    layer's ring or the caches have room for.
    """
    rows = count + 1
    if step.per_layer is not None or not all(layer.has_keys for layer in step.layers):
        raise ExportError(
            f"--draft-tokens is {count}; this network's layers have inputs of their own or see "
            "others' keys, which rounds cannot do: leave it out"
        )
    for layer in step.layers:
        if not isinstance(layer, PackedAttention):
            raise ExportError(
                f"--draft-tokens is {count}; this network's delta nets have a state that goes on "
                "with every token and cannot be taken back: leave it out"
            )
        if layer.cache.slots < rows:
            raise ExportError(
                f"--draft-tokens is {count}; a layer of this network sees the last "
                f"{layer.cache.slots} tokens: at most {layer.cache.slots - 1} are possible"
            )
    drafts = nn.ModuleList(Drafts(layer.cache, rows) for layer in step.layers)
    history, position = integers(max_seq_len + rows), integers(1)
    methods: dict[str, Method] = {}
    for size, own in (1, None), (rows, drafts):
        tokens, positions = integers(size), integers(size)
        given = {
            "history": history, "position": position, "tokens": tokens, "positions": positions,
        }  # fmt: skip
        methods[f"round_{size}"] = Round(step, backbone, own), given
        chosen, accepted = integers(size, 1), integers(1 + size)
        given = {
            "tokens": tokens, "positions": positions, "chosen": chosen, "history": history,
            "position": position, "accepted": accepted,
        }  # fmt: skip
        methods[f"accept_{size}"] = Accept(step, own), given
    given = {
        "history": history, "position": position, "drafts": integers(count),
        "tokens": integers(rows), "positions": integers(rows),
    }  # fmt: skip
    methods[f"verify_{rows}"] = Verify(step, backbone, drafts), given
    for name, function in operator.SELECTION.items():
        methods[f"{name}_round"] = Select(function), choice_inputs(name, rows, vocab_size)
    return methods
