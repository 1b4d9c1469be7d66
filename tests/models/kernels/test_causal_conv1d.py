"""The causal convolution against what it means, one sequence at a time: in torch, and as Triton
kernels."""

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl

from tests.models.kernels.checking import DEVICE, ON_GPU, on_device
from tokenloop.models.kernels.causal_conv1d import operator, reference, triton_sequences

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
BOTH = pytest.mark.parametrize("operators", [reference, operator], ids=["torch", "triton"])
# NumPy's, of what masks leave out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let short sequences and few channels take several programs as well."""
    if not ON_GPU:
        monkeypatch.setattr(operator, "ROLLING", (8, 2, 4, 1, 1))
        monkeypatch.setattr(operator, "PROGRAMS", 4)
        monkeypatch.setattr(operator, "UPDATE_DIM", 4)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x [D, T] with other strides."""
    if layout == "adjacent channels":
        return x.T.contiguous().T
    if layout == "neither":
        larger = x.new_zeros(3 * x.shape[0] + 1, 2 * x.shape[1] + 1)
        larger[1::3, 1::2] = x
        return larger[1::3, 1::2]
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
        """(output float64 [D, T] of the sequences, states [S, D, W - 1] afterwards)."""
        state, outs, keep = self.state.clone(), [], self.weight.shape[1] - 1
        pieces = self.x[:, : sum(self.lengths)].split(self.lengths, 1)
        for n, piece in enumerate(pieces):
            slot = self.indices[n].item()
            known = slot != PAD and self.started[n]
            before = state[slot] if known else torch.zeros_like(state[0])
            whole = torch.cat([before, piece], 1)
            if not piece.shape[1]:
                continue
            if slot != PAD:
                state[slot] = whole[:, -keep:]
            windows = whole.double().unfold(1, keep + 1, 1)  # [D, T, W]
            outs.append((windows * self.weight.double()[:, None]).sum(-1))
        out = torch.cat(outs, 1) if outs else self.x[:, :0].double()
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
        out = out[:, : sum(self.lengths)].cpu().double()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(state.cpu(), expected_state)


@BOTH
@pytest.mark.parametrize("width", reference.WIDTHS)
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
        monkeypatch.setattr(triton_sequences, "SEARCH", tl.constexpr(2))
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
def test_a_sequence_without_a_slot_begins_with_zeros(operators, layout):
    case = Convolution([6, 2, 5, 1], 3, layout, rest=7)
    case.indices[0] = case.indices[3] = PAD
    case.check(operators)


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("lengths", [[6, 13, 0, 0], [16, 0], [0]], ids=str)
def test_unused_sequences_and_what_follows_the_last_change_nothing(operators, layout, lengths):
    case = Convolution(lengths, 4, layout, rest=40)
    case.x[:, sum(lengths) :] = torch.nan
    case.indices[torch.tensor(lengths) == 0] = PAD
    case.check(operators, "silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cuts", [[64, 64, 5], [128, 5], [64, 69]], ids=str)
def test_a_token_does_not_know_its_chunk(dtype, cuts):
    """Of a projection that has other outputs too, of which nothing is copied."""
    dim, tokens = 6, sum(cuts)
    case = Convolution([tokens, 29], 4, dim=dim)
    weight, bias, table, case_x = (
        y.to(DEVICE, dtype) for y in (case.weight, case.bias, case.state, case.x)
    )
    x = torch.full((tokens + 29 + 50, 2 * dim), torch.nan, device=DEVICE, dtype=dtype)
    x[: tokens + 29, :dim] = case_x.T

    def convolve(x, bounds, rows, first):
        numbers = (torch.tensor(y, dtype=torch.int32) for y in (bounds, rows, first))
        bounds, rows, first = on_device(*numbers)
        given = x.T, weight, bias, bounds, table, rows, first, "silu"
        return operator.causal_conv1d(*given).T

    whole = convolve(x[:, :dim], [0, tokens, tokens + 29, tokens + 29], [3, 5, PAD], [0, 64, 0])
    left, begin = table[3].clone(), 0
    for cut in cuts:
        # Behind another sequence, and before room that is not used.
        chunk = torch.cat([x[-71:-50], x[begin : begin + cut], x[-50:]])
        out = convolve(chunk[:, :dim], [0, 21, 21 + cut], [0, 3], [0, begin])
        assert torch.equal(out[21 : 21 + cut], whole[begin : begin + cut])
        begin += cut
    assert torch.equal(table[3], left)


@BOTH
@pytest.mark.parametrize("pad", [-1, -7])
def test_an_update_is_a_convolution_of_one_token_each(operators, pad):
    for width in reference.WIDTHS:
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
        case.check(operator)


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
@pytest.mark.parametrize("width", reference.WIDTHS)
def test_numbers_of_16_bits_may_be_read_by_twos(operators, width, dtype):
    """Of an even number of channels at even places; and elsewhere none of them are."""
    case = Convolution([9, 2, 1, 30], width, dim=6)
    case.x, case.weight, case.state = (
        y.to(dtype) for y in (case.x, case.weight, case.state)
    )  # fmt: skip
    wider = torch.zeros(case.x.shape[1], 9, dtype=dtype)
    wider[:, 1:7] = case.x.T
    for x in (case.x.T.contiguous().T, wider[:, 1:7].T):
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


def test_positions_say_as_well_whether_a_row_has_begun():
    generator = torch.Generator().manual_seed(1)
    x, weight, states = (
        torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((3, 8), (8, 4), (3, 8, 3))
    )
    positions = torch.tensor([0, 1, 300], device=DEVICE)
    results = []
    for started in (positions, positions > 0):
        state = states.clone()
        out = operator.causal_conv1d_update(x, weight, None, state, None, started, "silu")
        results.append((out, state))
    for got, expected in zip(*results):
        assert torch.equal(got, expected)
