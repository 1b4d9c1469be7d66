"""The operators of linear attention against what they mean, one sequence and one token at a time:
in torch, and as Triton kernels, on a GPU or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

ON_GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from tokenloop.models.delta_net import RMSNormGated  # noqa: E402
from tokenloop.models.operators import conv1d, cuda, delta_rule, triton_conv1d  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
# Of sequences; blocks of 4 tokens in the interpreter cut them everywhere.
LENGTHS = [
    [1],
    [19],
    [3, 0, 5],
    [2, 1, 3, 1],
    [0, 9, 0, 0, 7],
    [1, 1, 1, 1, 1],
    [0, 0],
    [40, 3, 37],
]
LAYOUTS = ["adjacent channels", "adjacent tokens", "neither"]
SLOTS, PAD = 8, -1
BOTH = pytest.mark.parametrize("operators", [conv1d, cuda], ids=["torch", "triton"])
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # NumPy's, of what masks leave out.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let short sequences and narrow heads take several programs as well."""
    if not ON_GPU:
        monkeypatch.setattr(cuda, "ROLLING", (8, 2, 4, 1, 1))
        monkeypatch.setattr(cuda, "PROGRAMS", 4)
        monkeypatch.setattr(cuda, "WHOLE", (4, 4, 1))
        monkeypatch.setattr(cuda, "UPDATE_DIM", 4)
        monkeypatch.setattr(cuda, "COLUMNS", (4, 4))


def on_device(*values):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in values]


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x [D, T] with other strides."""
    if layout == "adjacent channels":
        return x.T.contiguous().T
    if layout == "neither":
        wide = x.new_zeros(3 * x.shape[0] + 1, 2 * x.shape[1] + 1)
        wide[1::3, 1::2] = x
        return wide[1::3, 1::2]
    return x.contiguous()


class Convolution:
    """Inputs of causal_conv1d, and what comes of them by hand."""

    def __init__(
        self, lengths, width, layout="adjacent channels", bias=True, rest=0, seed=0, slots=SLOTS,
        dim=5,
    ):  # fmt: skip
        generator, count = torch.Generator().manual_seed(seed), len(lengths)
        ends = torch.tensor(lengths).cumsum(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        self.lengths = lengths
        self.x = laid_out(randn(dim, int(ends[-1]) + rest), layout)
        self.weight, self.bias = randn(dim, width), randn(dim) if bias else None
        self.loc = F.pad(ends, (1, 0)).int()
        self.state = randn(slots, dim, width - 1)
        self.indices = torch.randperm(slots, generator=generator)[:count].int()
        self.started = torch.arange(count) % 3 != 1

    def by_hand(self, activation=None):
        """(output float64 [D, T], states [S, D, W - 1] afterwards)."""
        state, outs, keep = self.state.clone(), [], self.weight.shape[1] - 1
        pieces = self.x.split([*self.lengths, self.x.shape[1] - sum(self.lengths)], 1)
        for n, piece in enumerate(pieces):
            slot = self.indices[n].item() if n < len(self.lengths) else PAD
            known = slot != PAD and self.started[n]
            before = state[slot] if known else torch.zeros_like(state[0])
            whole = torch.cat([before, piece], 1)
            if not piece.shape[1]:
                continue
            if slot != PAD:
                state[slot] = whole[:, -keep:]
            windows = whole.double().unfold(1, keep + 1, 1)  # [D, T, W]
            outs.append((windows * self.weight.double()[:, None]).sum(-1))
        out = torch.cat(outs, 1) if outs else self.x.double()
        if self.bias is not None:
            out = out + self.bias.double()[:, None]
        return (F.silu(out) if activation else out), state

    def check(self, operators, activation=None):
        state = self.state.clone().to(DEVICE)
        given = on_device(self.x, self.weight, self.bias, self.loc)
        out = operators.causal_conv1d(
            *given, state, *on_device(self.indices, self.started), activation
        )
        expected, expected_state = self.by_hand(activation)
        torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(state.cpu(), expected_state)


@BOTH
@pytest.mark.parametrize("width", conv1d.WIDTHS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_sequences_give_what_each_gives_alone_and_leave_their_last_inputs(
    operators, lengths, width
):
    Convolution(lengths, width).check(operators, "silu" if width > 2 else None)


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_may_have_any_strides(operators, layout):
    Convolution([3, 0, 6, 1], 4, layout, bias=False).check(operators, "silu")


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_short_sequences_may_begin_with_states_or_zeros_in_any_order(operators, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (6,), generator=generator).tolist()
    case = Convolution(lengths, 4, LAYOUTS[seed % 2], seed=seed)
    case.started = torch.rand(6, generator=generator) < 0.5
    case.check(operators)


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_there_may_be_more_sequences_than_are_searched_at_once(operators, layout, monkeypatch):
    count = 300
    if not ON_GPU:
        monkeypatch.setattr(triton_conv1d, "SEARCH", tl.constexpr(2))
        count = 19
    lengths = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    Convolution(lengths, 4, layout, slots=count, rest=2).check(operators, "silu")


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_state_reaches_no_further_than_its_sequence(operators, layout):
    # Of blocks of 4 and of 16 tokens: two begin one token before an end and have one more.
    case = Convolution([3, 2, 10, 2, 4], 4, layout)
    case.started = torch.tensor([False, True, False, True, False])
    case.check(operators)


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_sequence_without_a_slot_and_what_follows_the_last_begin_with_zeros(operators, layout):
    case = Convolution([6, 2, 5, 1], 3, layout, rest=7)
    case.indices[0] = case.indices[3] = PAD
    case.check(operators)


@BOTH
@pytest.mark.parametrize("pad", [-1, -7])
def test_an_update_is_a_convolution_of_one_token_each(operators, pad):
    for width in conv1d.WIDTHS:
        case = Convolution([1] * 5, width)
        expected, expected_state = case.by_hand("silu")
        state, indices = case.state.to(DEVICE), case.indices.clone()
        expected_state[case.indices[2]] = state[case.indices[2]]
        indices[2] = pad
        out = operators.causal_conv1d_update(
            *on_device(case.x.T, case.weight, case.bias), state,
            *on_device(indices, case.started), "silu", pad,
        ).cpu()  # fmt: skip
        known = [0, 1, 3, 4]
        expected = expected.T[known]
        torch.testing.assert_close(out[known].double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(state.cpu(), expected_state)


@BOTH
def test_without_indices_slots_are_the_sequences_own(operators):
    case = Convolution([2, 0, 5], 4)
    case.state, case.indices = case.state[:3], torch.arange(3).int()
    (expected, expected_state), state = case.by_hand(), case.state.to(DEVICE)
    given = on_device(case.x, case.weight, case.bias, case.loc)
    out = operators.causal_conv1d(*given, state, None, case.started.to(DEVICE))
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.cpu(), expected_state)


@pytest.mark.skipif(ON_GPU, reason="a GPU has its own order")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_programs_may_run_in_any_order(monkeypatch, layout):
    """A slot is read by no other program than that which replaces it."""
    from triton.runtime.interpreter import interpreter_builder

    forwards = interpreter_builder.set_grid_idx

    def backwards(x, y, z):
        along_x, along_y, _ = interpreter_builder.grid_dim
        forwards(along_x - 1 - x, along_y - 1 - y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    # Begins one, two and three tokens before the end of a block.
    for before in (1, 2, 3):
        case = Convolution([before, 3, 20 - before], 4, layout)
        case.started[:] = True
        case.check(cuda)


@BOTH
def test_bfloat16_is_summed_in_float32(operators):
    case = Convolution([9, 2], 4)
    case.x, case.weight, case.state = (
        y.bfloat16() for y in (case.x, case.weight, case.state)
    )  # fmt: skip
    expected, _ = case.by_hand("silu")
    given = on_device(case.x, case.weight, case.bias, case.loc, case.state)
    out = operators.causal_conv1d(*given, *on_device(case.indices, case.started), "silu")
    assert out.dtype == torch.bfloat16
    # One rounding, that of the result, which Triton's interpreter does towards zero.
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2**-7, atol=1e-6)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", conv1d.WIDTHS)
def test_numbers_of_16_bits_may_be_read_by_twos(operators, width, dtype):
    """Of an even number of channels at even places; and elsewhere none of them are."""
    case = Convolution([9, 2, 1, 30], width, dim=6)
    case.x, case.weight, case.state = (
        y.to(dtype) for y in (case.x, case.weight, case.state)
    )  # fmt: skip
    wide = torch.zeros(case.x.shape[1], 9, dtype=dtype)
    wide[:, 1:7] = case.x.T
    for x in (case.x.T.contiguous().T, wide[:, 1:7].T):
        case.x, state = x, case.state.to(DEVICE)
        expected, expected_state = case.by_hand("silu")
        given = on_device(x, case.weight, case.bias, case.loc, state)
        out = operators.causal_conv1d(*given, *on_device(case.indices, case.started), "silu")
        # As above, of the fewer bits.
        torch.testing.assert_close(out.cpu().double(), expected, rtol=2**-7, atol=1e-4)
        assert torch.equal(state.cpu(), expected_state)


@BOTH
def test_another_width_or_activation_is_refused_with_its_value(operators):
    case = Convolution([3], 4)
    rest = case.loc, case.state, case.indices, case.started
    with pytest.raises(ValueError, match="width 5"):
        operators.causal_conv1d(case.x, torch.ones(5, 5), None, *rest)
    with pytest.raises(ValueError, match="activation = 'gelu'"):
        operators.causal_conv1d(case.x, case.weight, None, *rest, "gelu")


# The gated delta rule


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
    out = delta_rule.gated_delta_rule(*case.inputs(), state, indices, started)
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
        outs.append(delta_rule.gated_delta_rule(*case.inputs(piece), state, indices, started))
        begin, started = begin + cut, torch.ones_like(started)
    outs = torch.cat(outs, 1).cpu().double()
    torch.testing.assert_close(outs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.cpu().double(), expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operators", [delta_rule, cuda], ids=["torch", "triton"])
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
    out = cuda.gated_delta_rule_update(*given, state, *on_device(case.indices, case.started))
    torch.testing.assert_close(out.cpu().double(), expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.cpu().double(), expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operators", [delta_rule, cuda], ids=["torch", "triton"])
def test_a_state_that_is_not_float32_is_refused(operators):
    case = Delta(1)
    rest = case.state.bfloat16().to(DEVICE), *on_device(case.indices, case.started)
    with pytest.raises(ValueError, match="torch.bfloat16"):
        operators.gated_delta_rule_update(*case.inputs(0), *rest)


def test_heads_that_do_not_divide_are_refused():
    case = Delta(1, key_heads=3)
    with pytest.raises(ValueError, match="4 value heads .* 3 key heads"):
        delta_rule.gated_delta_rule(*case.inputs(), case.state, case.indices, case.started)


def test_gates_of_bfloat16_are_float32_and_near_what_transformers_rounds():
    a, b, A_log, dt_bias = torch.randn(4, 1000, generator=torch.Generator().manual_seed(9))
    g, beta = delta_rule.gates(a.bfloat16(), 4 * b.bfloat16(), A_log, dt_bias)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_and_gate_of_a_step_are_the_network_s(dtype):
    generator = torch.Generator().manual_seed(0)
    x, projected = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 24), (3, 150)))
    gate = projected[:, 7:103].unflatten(1, (4, 24))
    norm = RMSNormGated(24, 1e-6)
    torch.nn.init.normal_(norm.weight, generator=generator)
    with torch.no_grad():
        x, gate, weight = on_device(*(t.to(dtype) for t in (x, gate, norm.weight)))
        norm.to(DEVICE, dtype)
        got = cuda.gated_rms_norm(x, gate, weight, norm.eps)
        # The interpreter cuts bfloat16 off where a GPU rounds.
        rtol = 1e-5 if dtype == torch.float32 else 2**-8 if ON_GPU else 2**-5
        torch.testing.assert_close(got, norm(x, gate), rtol=rtol, atol=1e-5)


def test_positions_say_as_well_whether_a_row_has_begun():
    generator = torch.Generator().manual_seed(1)
    x, weight, states = (
        torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((3, 8), (8, 4), (3, 8, 3))
    )
    positions = torch.tensor([0, 1, 300], device=DEVICE)
    results = []
    for started in (positions, positions > 0):
        state = states.clone()
        out = cuda.causal_conv1d_update(x, weight, None, state, None, started, "silu")
        results.append((out, state))
    for got, expected in zip(*results):
        assert torch.equal(got, expected)
