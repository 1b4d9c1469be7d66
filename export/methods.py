"""The methods that both engines lower, and what they are traced with.

Shapes: B rows, T tokens of a prompt's chunk, E what the network's `embed` gives of a token, V
vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim

from tokenloop.models.decoder import Backbone
from tokenloop.sampler.restrict import adjust, mask

# Any length but 0 and 1, which torch.export takes for constants.
TRACED_LENGTH = 3


class Prefill(nn.Module):
    """tokens int64 [1, T], positions int64 [T] (and row int64 [1], where there are several) ->
    logits float32 [1, V] after the last token."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, positions: Tensor, row: Tensor | None = None) -> Tensor:
        return self.network.prefill(tokens, positions, row)


class Pool(Prefill):
    """tokens int64 [1, T], positions int64 [T] -> the pooled output float32 [1, D]."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.network.pool(tokens, positions)


class DecodeEmbedded(Prefill):
    """hidden [B, 1, E], position int64 [B] -> logits float32 [B, V]."""

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        return self.network.decode_embedded(hidden, position)


class Decode(Prefill):
    """token int64 [B, 1], position int64 [B] -> logits float32 [B, V]."""

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        return self.network.decode(token, position)


class Embed(nn.Module):
    """token int64 [B, 1] -> hidden [B, 1, E], which decode_embedded takes. The module holds only
    the network's tables of embeddings."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.embed_tokens, self.embed = backbone.embed_tokens, backbone.embed
        self.per_layer = nn.Module()
        if backbone.per_layer is not None:
            self.per_layer.embed_tokens = backbone.per_layer.embed_tokens

    def forward(self, token: Tensor) -> Tensor:
        return self.embed(token)


class Select(nn.Module):
    """logits float32 [B, V], for sampler.sample temperature float32 [B], top_k int64 [B], top_p
    float32 [B], seed and position int64 [B], and next_id int64 [B, 1]. Writes next_id."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, *sampling_and_next_id: Tensor) -> None:
        *sampling, next_id = sampling_and_next_id
        next_id.copy_(self.function(logits, *sampling))


class MaskRow(nn.Module):
    """What sampler.restrict.mask takes, of one row. Writes logits."""

    def forward(self, logits: Tensor, allowed: Tensor) -> None:
        logits.copy_(mask(logits, allowed))


class AdjustRow(nn.Module):
    """What sampler.restrict.adjust takes, of one row. Writes logits."""

    def forward(self, logits: Tensor, ids: Tensor, scale: Tensor, bias: Tensor) -> None:
        logits.copy_(adjust(logits, ids, scale, bias))


def mask_bytes(vocab_size: int) -> int:
    """How many bytes have a bit for each token: whole words of 32 bits, as llguidance writes."""
    return -(-vocab_size // 32) * 4


def mask_example(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Example inputs of mask for one row."""
    allowed = torch.zeros(1, mask_bytes(vocab_size), dtype=torch.uint8)
    return torch.zeros(1, vocab_size), allowed


def adjust_example(vocab_size: int) -> tuple[tuple[Tensor, ...], list]:
    """Example inputs of adjust for one row, and their dynamic shapes: up to V tokens."""
    count = min(TRACED_LENGTH, vocab_size)
    numbers = torch.ones(1, count)
    size = {1: Dim("K", min=2, max=vocab_size)}
    example = torch.zeros(1, vocab_size), integers(1, count), numbers, numbers.clone()
    return example, [None, size, size, size]


def prompt_length(max_prefill: int) -> tuple[Dim | None, int]:
    """A chunk's number of tokens as a dynamic size, None where `max_prefill` is 1, and the number
    that is traced."""
    length = Dim("T", min=1, max=max_prefill) if max_prefill > 1 else None
    return length, min(TRACED_LENGTH, max_prefill)


def prompt_chunk(batch: int, max_prefill: int) -> tuple[tuple[Tensor, ...], list | None]:
    """Prefill's example inputs and their dynamic shapes."""
    length, traced = prompt_length(max_prefill)
    example = integers(1, traced), torch.arange(traced)
    shapes = [{1: length}, {0: length}]
    if batch > 1:
        example, shapes = (*example, integers(1)), [*shapes, None]
    return example, shapes if length is not None else None


def integers(*shape: int) -> Tensor:
    """int64 zeros."""
    return torch.zeros(shape, dtype=torch.int64)


def processor(device: torch.device) -> str:
    """What compiled code needs of a device: "sm_90" for a GPU, "AVX512" for a CPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return torch.backends.cpu.get_cpu_capability()
