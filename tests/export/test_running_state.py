"""The delta rule in XNNPACK's calls gives what it gives in plain torch."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tokenloop.export.pte.running_state import DeltaRule, RunningState
from tokenloop.models.kernels.gated_delta_rule import reference

ROWS, KEY_HEADS, HEADS, KEY_SIZE, VALUE_SIZE = 2, 2, 6, 16, 32


class Chunk(nn.Module):
    """A chunk of row 1, in which heads forget nothing, all at once, and in between."""

    def __init__(self):
        super().__init__()
        cache = nn.Module()
        cache.register_buffer("recurrent", torch.zeros(ROWS, HEADS, KEY_SIZE, VALUE_SIZE))
        net = SimpleNamespace(
            key_heads=KEY_HEADS, value_heads=HEADS, key_size=KEY_SIZE, value_size=VALUE_SIZE,
            A_log=torch.tensor([9.0, -9.0, 5.0, 1.0, 12.0, 0.0]), dt_bias=torch.ones(HEADS),
        )  # fmt: skip
        self.net, self.state, self.rule = net, RunningState(cache), DeltaRule({0: net}, True)

    def forward(self, q, k, v, a, b, positions):
        row, started = torch.ones(1, dtype=torch.int64), positions[:1] > 0
        return self.rule.chunk(0, self.state, q, k, v, a, b, positions, row, started)


@pytest.mark.parametrize("most", [1, 70])
def test_a_chunk_of_any_length_gives_what_the_reference_gives(as_method, most):
    def inputs(count: int) -> tuple[torch.Tensor, ...]:
        draw = torch.Generator().manual_seed(count)
        shapes = (count, KEY_HEADS, KEY_SIZE), (count, KEY_HEADS, KEY_SIZE)
        shapes += (count, HEADS, VALUE_SIZE), (1, count, HEADS), (1, count, HEADS)
        q, k, *rest = (torch.randn(shape, generator=draw) for shape in shapes)
        q, k = (reference.normalized(x, KEY_HEADS) for x in (q, k))
        return q * KEY_SIZE**-0.5, k, *rest, torch.arange(count)

    length = torch.export.Dim("T", min=1, max=most) if most > 1 else None
    axes = 0, 0, 0, 1, 1, 0
    shapes = [{axis: length} for axis in axes] if length is not None else None
    chunk = Chunk()
    run = as_method(chunk, inputs(min(3, most)), shapes)
    for count in {1, min(33, most), most}:
        *given, positions = inputs(count)
        state = torch.zeros(1, HEADS, KEY_SIZE, VALUE_SIZE)
        right = reference.gated_delta_rule(
            *(x[None] for x in given[:3]), *given[3:], chunk.net.A_log, chunk.net.dt_bias,
            state, None, torch.zeros(1, dtype=torch.bool),
        )  # fmt: skip
        (got,) = run(*given, positions)[-1:]
        torch.testing.assert_close(got, right.flatten(2), rtol=1e-4, atol=1e-5)
