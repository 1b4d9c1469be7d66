"""The gated delta rule against what it means, one token at a time: in torch, and as a Triton
kernel."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.kernels.checking import DEVICE, ON_GPU, needs_gpu, on_device
from tokenloop.models.kernels import cuda  # noqa: F401  (registers the operators)
from tokenloop.models.kernels.gated_delta_rule import operator, reference

PAD = -1
BOTH = pytest.mark.parametrize("operators", [reference, operator], ids=["torch", "triton"])
# NumPy's, of what masks leave out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let narrow heads take several programs as well."""
    if not ON_GPU:
        monkeypatch.setattr(operator, "COLUMNS", (4, 4))


class Delta:
    """Inputs of the rule over T tokens of 3 sequences, and what comes of them by hand."""

    def __init__(self, tokens, key_heads=2, seed=0, alike=False):
        generator = torch.Generator().manual_seed(seed)
        batch, heads, keys, values = 3, 4, 6, 10

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        self.q = randn(batch, tokens, key_heads, keys)
        self.k = randn(batch, tokens, key_heads, keys)
        self.v = randn(batch, tokens, heads, values)
        self.a, self.b = randn(batch, tokens, heads), 2 * randn(batch, tokens, heads)
        self.A_log, self.dt_bias = randn(heads), randn(heads)
        if alike:
            # One key, written whole and never forgotten.
            self.k[:] = self.k[:, :1].clone()
            self.a -= 40.0
            self.b += 40.0
        self.state = randn(5, heads, keys, values)
        self.indices = torch.tensor([4, 0, 2], dtype=torch.int32)
        self.started = torch.tensor([True, False, True])

    def by_hand(self):
        """(output float64 [B, T, H, V], states [S, H, K, V] afterwards)."""
        state = self.state.double()
        batch, tokens, heads = self.v.shape[:3]
        shared = heads // self.q.shape[2]
        g = -self.A_log.double().exp() * F.softplus(self.a.double() + self.dt_bias.double())
        beta = self.b.double().sigmoid()
        out = torch.empty(self.v.shape, dtype=torch.float64)
        for n in range(batch):
            for head in range(heads):
                slot = state[self.indices[n], head]
                matrix = slot.clone() if self.started[n] else torch.zeros_like(slot)
                for t in range(tokens):
                    q, k = (x[n, t, head // shared].double() for x in (self.q, self.k))
                    q, k = (x / (x.square().sum() + 1e-6).sqrt() for x in (q, k))
                    matrix *= g[n, t, head].exp()
                    delta = beta[n, t, head] * (self.v[n, t, head].double() - k @ matrix)
                    matrix += torch.outer(k, delta)
                    out[n, t, head] = q @ matrix / q.shape[0] ** 0.5
                if self.indices[n] != PAD:
                    slot.copy_(matrix)
        return out, state

    def inputs(self, token=None):
        """All that is given before the state."""
        inputs = (x if token is None else x[:, token] for x in (self.q, self.k, self.v, self.a))
        b = self.b if token is None else self.b[:, token]
        return on_device(*inputs, b, self.A_log, self.dt_bias)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 130])
def test_chunks_give_what_the_recurrence_gives(tokens, alike):
    case = Delta(tokens, alike=alike)
    expected, expected_state = case.by_hand()
    state, indices, started = on_device(case.state.clone(), case.indices, case.started)
    out = reference.gated_delta_rule(*case.inputs(), state, indices, started)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(state.cpu().double(), expected_state, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("cuts", [[1, 64], [63, 1, 1], [70, 30]])
def test_a_prompt_in_pieces_gives_what_it_gives_whole(cuts):
    case = Delta(sum(cuts))
    expected, expected_state = case.by_hand()
    state, indices, started = on_device(case.state.clone(), case.indices, case.started)
    outs, begin = [], 0
    for cut in cuts:
        piece = slice(begin, begin + cut)
        outs.append(reference.gated_delta_rule(*case.inputs(piece), state, indices, started))
        begin, started = begin + cut, torch.ones_like(started)
    outs = torch.cat(outs, 1).cpu().double()
    torch.testing.assert_close(outs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.cpu().double(), expected_state, rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("key_heads", [1, 4])
def test_a_step_is_one_of_the_recurrence(operators, key_heads):
    case = Delta(1, key_heads)
    case.indices[2] = PAD
    case.started[2] = False
    case.a[0, 0, 0] = 30.0  # beyond softplus's threshold
    expected, expected_state = case.by_hand()
    state = case.state.to(DEVICE)
    indices, started = on_device(case.indices, case.started)
    out = operators.gated_delta_rule_update(*case.inputs(0), state, indices, started)
    torch.testing.assert_close(out.cpu().double(), expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.cpu().double(), expected_state, rtol=1e-5, atol=1e-5)


def test_steps_of_strided_heads_are_those_of_contiguous_ones():
    case = Delta(1, key_heads=4)
    mixed = torch.cat([x[:, 0].flatten(1) for x in (case.q, case.k, case.v)], 1).to(DEVICE)
    ba = torch.stack([case.b[:, 0], case.a[:, 0]], -1).to(DEVICE)
    q, k, v = mixed.split([24, 24, 40], 1)
    given = q.unflatten(1, (4, 6)), k.unflatten(1, (4, 6)), v.unflatten(1, (4, 10))
    given = *given, ba[..., 1], ba[..., 0], *on_device(case.A_log, case.dt_bias)
    expected, expected_state = case.by_hand()
    state = case.state.to(DEVICE)
    out = operator.gated_delta_rule_update(*given, state, *on_device(case.indices, case.started))
    torch.testing.assert_close(out.cpu().double(), expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.cpu().double(), expected_state, rtol=1e-5, atol=1e-5)


@BOTH
def test_a_state_that_is_not_float32_is_refused(operators):
    case = Delta(1)
    rest = case.state.bfloat16().to(DEVICE), *on_device(case.indices, case.started)
    with pytest.raises(ValueError, match="torch.bfloat16"):
        operators.gated_delta_rule_update(*case.inputs(0), *rest)


def test_heads_that_do_not_divide_are_refused():
    case = Delta(1, key_heads=3)
    with pytest.raises(ValueError, match="4 value heads .* 3 key heads"):
        reference.gated_delta_rule(*case.inputs(), case.state, case.indices, case.started)


def test_gates_of_bfloat16_are_float32_and_near_what_transformers_rounds():
    a, b, A_log, dt_bias = torch.randn(4, 1000, generator=torch.Generator().manual_seed(9))
    g, beta = reference.gates(a.bfloat16(), 4 * b.bfloat16(), A_log, dt_bias)
    assert g.dtype == beta.dtype == torch.float32
    rounded = (4 * b.bfloat16()).sigmoid().float()
    assert 0 < (beta - rounded).abs().max() <= 2**-9


@needs_gpu
def test_the_operators_can_be_captured_in_a_graph_and_exported():
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("conv", torch.zeros(3, 24, 3, device=DEVICE))
            self.register_buffer("recurrent", torch.zeros(3, 2, 4, 4, device=DEVICE))
            self.weight = torch.nn.Parameter(torch.ones(24, 4, device=DEVICE))

        def forward(self, x, gates, started):
            ops = torch.ops.tokenloop
            x = ops.causal_conv1d_update(x, self.weight, None, self.conv, None, started, "silu")
            q, k, v = x.unflatten(1, (3, 2, 4)).unbind(1)
            rest = gates, gates, gates[0], gates[0], self.recurrent, None, started
            return ops.gated_delta_rule_update(q, k, v, *rest)

    generator = torch.Generator().manual_seed(3)
    x, gates = (torch.randn(3, size, generator=generator).to(DEVICE) for size in (24, 2))
    inputs = x, gates, torch.tensor([True, True, False], device=DEVICE)
    step = Step().requires_grad_(False)
    expected = [step(*inputs) for _ in range(3)]
    step.conv.zero_()
    step.recurrent.zero_()
    program = torch.export.export(Step().requires_grad_(False), inputs).module()
    for output in expected:
        torch.testing.assert_close(program(*inputs), output)
    step(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*inputs)
    step.conv.zero_()
    step.recurrent.zero_()
    for output in expected:
        graph.replay()
        torch.testing.assert_close(out, output)
