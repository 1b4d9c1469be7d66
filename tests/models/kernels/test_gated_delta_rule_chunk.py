"""The gated delta rule over a packed chunk: against its reference and against single steps, and the
same bit for bit however a prompt is cut and packed."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES, ON_GPU
from tokenloop.models.kernels import cuda  # noqa: F401  (registers the operators)
from tokenloop.models.kernels.gated_delta_rule import operator, reference

BOTH = pytest.mark.parametrize("operators", [reference, operator], ids=["torch", "triton"])
# Of the largest value, how far outputs and states may be from those of single steps. In bfloat16
# the products round the state and what is written to it. Measured on normal inputs: 2.7e-6 in
# float32, and 1.3e-2 in bfloat16 in the interpreter, which cuts off where a GPU rounds.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
# (key heads, value heads, key size, value size)
SHAPES = [(1, 3, 16, 32), (2, 2, 32, 16), (1, 1, 128, 128), (2, 6, 64, 16), (1, 2, 256, 32)]
if ON_GPU:
    SHAPES += [(16, 32, 128, 128), (3, 9, 16, 256), (2, 2, 256, 256)]
# NumPy's, of what masks leave out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_near(got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert got.shape == expected.shape
    assert (got.float() - expected.float()).abs().max() <= bound * expected.float().abs().max()


class Tokens:
    """Inputs of the rule over T tokens, as views of two projections that have other outputs too."""

    def __init__(self, tokens, shape=(1, 2, 16, 32), dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        groups, heads, keys, values = self.shape = shape
        widths = [groups * keys, groups * keys, heads * values, 16]
        # Keys have something in common, as those of networks do.
        mixed = torch.randn(tokens, sum(widths), generator=generator)
        mixed[:, widths[0] : 2 * widths[0]] += torch.randn(widths[0], generator=generator) / 2
        gates = torch.randn(tokens, 2 * heads, generator=generator)
        self.mixed, self.gates = (x.to(DEVICE, dtype) for x in (mixed, gates))
        self.widths = widths
        self.A_log, self.dt_bias = torch.randn(2, heads, generator=generator).to(DEVICE)
        # Heads forget at different speeds.
        self.A_log -= torch.arange(heads, device=DEVICE)
        self.table = torch.randn(6, heads, keys, values, generator=generator).to(DEVICE)

    def given(self, *pieces: slice, room: int = 0):
        """All that is given before the state, for these tokens one piece after the other, and
        `room` tokens of garbage behind them."""
        groups, heads, keys, values = self.shape
        garbage = torch.full_like(self.mixed[:1], torch.nan).expand(room, -1)
        mixed = torch.cat([*(self.mixed[piece] for piece in pieces), garbage])
        gates = torch.cat([*(self.gates[piece] for piece in pieces), garbage[:, : 2 * heads]])
        q, k, v, _ = mixed.split(self.widths, 1)
        q, k = (x.unflatten(1, (groups, keys)) for x in (q, k))
        b, a = gates.split(heads, 1)
        return q, k, v.unflatten(1, (heads, values)), a, b, self.A_log, self.dt_bias

    def steps(self, tokens: slice, row: int, first: int):
        """What single steps give, and the state they leave."""
        state, outs = self.table[row : row + 1].clone(), []
        for t in range(tokens.start, tokens.stop):
            started = torch.tensor([first + t - tokens.start > 0], device=DEVICE)
            given = self.given(slice(t, t + 1))
            outs.append(reference.gated_delta_rule_update(*given, state, None, started))
        return torch.cat(outs), state[0]


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sequences_of_a_chunk_give_what_single_steps_give(operators, shape, dtype):
    case = Tokens(64 + 70 + 3, shape, dtype)
    table = case.table.clone()
    packed = (
        integers(0, 64, 64, 134, 134, 137),
        integers(4, -1, 0, 2, 3),
        integers(64, 0, 0, 0, 128),
    )
    given = case.given(slice(0, 137), room=70)
    out = operators.gated_delta_rule_chunk(*given, table, *packed)
    assert out.dtype == dtype and out.is_contiguous()
    untouched = [1, 2, 5]
    assert torch.equal(table[untouched], case.table[untouched])
    for tokens, row, first in (
        (slice(0, 64), 4, 64),
        (slice(64, 134), 0, 0),
        (slice(134, 137), 3, 128),
    ):
        expected, state = case.steps(tokens, row, first)
        assert_near(out[tokens], expected, BOUND[dtype])
        assert_near(table[row], state, BOUND[dtype])


def test_heads_may_forget_all_at_once_and_then_nothing():
    """Where a difference of float32 sums of logarithms would be wrong by 1e-4."""
    case = Tokens(150, (1, 2, 32, 32))
    case.gates *= 15.0
    case.A_log[:], case.dt_bias[:] = 2.7, 0.0
    table = case.table.clone()
    packed = integers(0, 150), integers(1), integers(64)
    out = operator.gated_delta_rule_chunk(*case.given(slice(0, 150)), table, *packed)
    expected, state = case.steps(slice(0, 150), 1, 64)
    assert_near(out, expected, BOUND[torch.float32])
    assert_near(table[1], state, BOUND[torch.float32])


@BOTH
def test_the_tokens_that_outputs_choose_are_those_of_single_steps(operators):
    """In float32, of 500 tokens."""
    case = Tokens(150, (1, 2, 32, 32))
    table = case.table.clone()
    packed = integers(0, 150), integers(1), integers(0)
    out = operators.gated_delta_rule_chunk(*case.given(slice(0, 150)), table, *packed)
    expected, _ = case.steps(slice(0, 150), 1, 0)
    head = torch.randn(64, 500, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    chosen, others = ((x.flatten(1) @ head).argmax(-1) for x in (out, expected))
    assert torch.equal(chosen, others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [[64, 64, 64, 21], [128, 85], [64, 149]], ids=str)
def test_a_prompt_does_not_know_how_it_is_cut_and_packed(dtype, cuts):
    case = Tokens(213 + 90, dtype=dtype)
    prompt, other = slice(0, 213), slice(213, 303)
    case.table[:] = torch.nan  # of rows that begin anew
    table = case.table.clone()
    whole = case.given(prompt), table, integers(0, 213), integers(5), integers(0)
    expected = operator.gated_delta_rule_chunk(*whole[0], *whole[1:])
    assert not expected.isnan().any()
    pieces, begin = case.table.clone(), 0
    for number, cut in enumerate(cuts):
        piece = slice(begin, begin + cut)
        # Behind another prompt that is no multiple of a block, and before unused sequences and
        # room; the first piece alone.
        if number == 0:
            parts = [piece]
            packed = integers(0, cut), integers(2), integers(0)
            offset = 0
        else:
            parts = [other, piece]
            packed = integers(0, 90, 90, 90 + cut, 90 + cut), integers(0, -1, 2, -1)
            packed = *packed, integers(0, 0, begin, 0)
            offset = 90
        given = case.given(*parts, room=65 * number)
        out = operator.gated_delta_rule_chunk(*given, pieces, *packed)
        assert torch.equal(out[offset : offset + cut], expected[piece])
        begin += cut
    assert torch.equal(pieces[2], table[5])
    untouched = [1, 3, 4, 5]
    assert pieces[untouched].isnan().all()


def test_a_sequence_without_a_row_begins_with_zeros_and_leaves_nothing():
    case = Tokens(70)
    table = case.table.clone()
    packed = integers(0, 70), integers(-1), integers(64)
    out = operator.gated_delta_rule_chunk(*case.given(slice(0, 70)), table, *packed)
    assert torch.equal(table, case.table)
    packed = integers(0, 70), integers(0), integers(0)
    expected = operator.gated_delta_rule_chunk(*case.given(slice(0, 70)), table, *packed)
    assert torch.equal(out, expected)


def test_there_may_be_256_sequences_and_no_tokens_at_all():
    case = Tokens(200)
    bounds = torch.arange(257, dtype=torch.int32).clamp(max=5).mul(40).to(DEVICE)
    rows = torch.full((256,), -1, dtype=torch.int32, device=DEVICE)
    rows[:5] = integers(4, 2, 0, 1, 3)
    table, few = case.table.clone(), case.table.clone()
    given = case.given(slice(0, 200), room=20)
    out = operator.gated_delta_rule_chunk(*given, table, bounds, rows, torch.zeros_like(rows))
    packed = bounds[:6], rows[:5], integers(0, 0, 0, 0, 0)
    expected = operator.gated_delta_rule_chunk(*given, few, *packed)
    assert torch.equal(out[:200], expected[:200]) and torch.equal(table, few)
    empty = torch.zeros_like(bounds), rows, torch.zeros_like(rows)
    operator.gated_delta_rule_chunk(*given, table, *empty)
    assert torch.equal(table, few)


@BOTH
def test_sizes_that_no_kernel_has_are_refused(operators):
    case = Tokens(3)
    q, k, v, *rest = case.given(slice(0, 3))
    packed = integers(0, 3), integers(0), integers(0)
    with pytest.raises(ValueError, match=r"^heads of 12 and 32; each must be one of \(16, "):
        operators.gated_delta_rule_chunk(q[..., :12], k[..., :12], v, *rest, case.table, *packed)
    packed = torch.zeros(258, dtype=torch.int32), integers(0), integers(0)
    with pytest.raises(ValueError, match="^257 sequences; at most 256"):
        operators.gated_delta_rule_chunk(q, k, v, *rest, case.table, *packed)
