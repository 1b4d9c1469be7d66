"""The methods of an artifact for CUDA, each with its example inputs by name.

Shapes: B rows, T tokens of a packed chunk, E what `embed` gives of a token, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tokenloop.export.launches.embedded import Tables, split
from tokenloop.export.methods import Select, integers, mask_bytes
from tokenloop.models.decoder import Backbone
from tokenloop.models.kernels import cuda
from tokenloop.sampler.kernels import operator

Method = tuple[nn.Module, dict[str, Tensor]]

EMBEDDING = {
    "greedy": operator.greedy_embed,
    "sample": operator.sample_embed,
    "sample_unfiltered": partial(operator.sample_embed, restricted=False),
}


# Of how many tokens a request may give a bias (runner/request.py).
MOST_BIASES = 1024


class Change(nn.Module):
    """What sampler.kernels.operator's mask or adjust takes. Writes logits."""

    def __init__(self, function: Callable[..., None]):
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, *changes: Tensor) -> None:
        self.function(logits, *changes)


class SelectEmbed(Tables):
    """What Select takes, and then hidden [B, 1, E], which is written as well. `hidden` is the
    embedding of next_id."""

    def __init__(self, backbone: Backbone, function: Callable[..., None]):
        super().__init__(backbone)
        self.function = function

    def forward(self, logits: Tensor, *sampling_and_outputs: Tensor) -> None:
        *sampling, next_id, hidden = sampling_and_outputs
        table = self.embed_tokens.weight
        if self.own is None:
            self.function(logits, *sampling, table, next_id, hidden, scale=self.scale)
            return
        x, own = split(hidden, table.shape[1])
        self.function(logits, *sampling, table, next_id, x[:, None], scale=self.scale)
        cuda.embed_into(next_id[:, 0], self.own, own, scale=self.own_scale)


class Lookup(Tables):
    """token int64 [B, 1] -> hidden [B, 1, E], which decode_embedded takes."""

    def forward(self, token: Tensor) -> Tensor:
        return self.look_up(token)


class NextPositions(nn.Module):
    """lines int64 [N, B], next_line int64 [1] and position int64 [B]. The last two are written."""

    def forward(self, lines: Tensor, next_line: Tensor, position: Tensor) -> None:
        cuda.next_positions(lines, next_line, position)


def choice_inputs(name: str, rows: int, vocab_size: int) -> dict[str, Tensor]:
    """What the choice `name` of so many rows' tokens takes, a key of operator.SELECTION."""
    numbers, counts = torch.ones(rows), integers(rows)
    sampling = {
        "temperature": numbers, "top_k": counts, "top_p": numbers.clone(), "seed": counts.clone(),
        "position": counts.clone(),
    }  # fmt: skip
    given = {"logits": torch.zeros(rows, vocab_size)} | ({} if name == "greedy" else sampling)
    return given | {"next_id": integers(rows, 1)}


def selection_methods(
    backbone: Backbone, batch: int, vocab_size: int, max_seq_len: int
) -> dict[str, Method]:
    """What is between a step's logits and the next step: the lookup, the positions, what changes
    logits, and selection, with the lookup, without it, and of one row of several."""
    dtype = backbone.embed_tokens.weight.dtype
    positions = integers(max_seq_len, batch), integers(1), integers(batch)
    methods: dict[str, Method] = {
        "embed": (Lookup(backbone), {"token": integers(batch, 1)}),
        "next_positions": (
            NextPositions(),
            dict(zip(("lines", "next_line", "position"), positions)),
        ),
    }
    for rows, suffix in {batch: "", 1: "_row" if batch > 1 else ""}.items():
        given = {"logits": torch.zeros(rows, vocab_size)}
        # At most the tokens of a sequence, and those with a bias.
        most = min(vocab_size, max_seq_len + MOST_BIASES)
        scales = torch.ones(rows, most)
        adjusted = {"ids": integers(rows, most), "scale": scales, "bias": scales.clone()}
        allowed = torch.zeros(rows, mask_bytes(vocab_size), dtype=torch.uint8)
        # Of one row both are the same.
        for end in sorted({suffix, "_row"} if rows == 1 else {suffix}):
            methods[f"mask{end}"] = Change(operator.mask), given | {"allowed": allowed}
            methods[f"adjust{end}"] = Change(operator.adjust), given | adjusted
        hidden = {"hidden": torch.zeros(rows, 1, backbone.embedded_size, dtype=dtype)}
        for name, function in operator.SELECTION.items():
            inputs = choice_inputs(name, rows, vocab_size)
            methods[name + suffix] = Select(function), inputs
            if not suffix:
                method = SelectEmbed(backbone, EMBEDDING[name])
                methods[f"{name}_embed"] = method, inputs | hidden
    return methods


def prefill_inputs(tokens: int, batch: int) -> dict[str, Tensor]:
    """What CudaPrefill takes for a packed chunk of up to `tokens` tokens."""
    sizes = {
        "starts": batch + 1, "rows": batch, "first": batch,
        "last_starts": batch + 1, "last_first": batch,
    }  # fmt: skip
    return {"tokens": integers(tokens)} | {
        name: torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()
    }
