"""The benchmarks of the linear-attention operators measure what they say: their ways agree with the
reference, on small inputs in Triton's interpreter, and their flags are checked."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import causal_conv1d, experts_chunk, gated_delta, packed_step  # noqa: E402
from tokenloop.models.kernels.causal_conv1d import reference as conv1d  # noqa: E402
from tokenloop.models.kernels.gated_delta_rule import reference as delta_rule  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Two roundings to bfloat16, which Triton's interpreter does towards zero.
ERROR = 2**-6
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.parametrize("sequences", [1, 8, 64])
@pytest.mark.parametrize("skewed", [False, True])
def test_lengths_add_up_and_are_even_or_skewed(sequences, skewed):
    lengths = causal_conv1d.lengths_of(2048, sequences, skewed)
    assert sum(lengths) == 2048 and len(lengths) == sequences and min(lengths) > 0
    if skewed:
        assert max(lengths) > 2048 - 8 * sequences
    else:
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("lengths", [[11], [1, 2, 9, 3], [5, 0, 4]], ids=str)
def test_both_grids_of_the_convolution_give_the_reference_s_output_and_states(lengths):
    work = causal_conv1d.make_work(10, lengths, DEVICE)
    state = work.state.clone()
    with causal_conv1d.cut_into((8, 2, 8, 1, 1)):
        assert work.error(work.ours) < ERROR
    assert work.error(lambda x: work.by_sequence(x, (4, 8, 1))) < ERROR
    assert torch.equal(work.state, state)


def test_a_sweep_names_the_best_cut_of_each_size_first(monkeypatch, capsys):
    cuts = (8, 2, 8, 1, 1), (4, 2, 8, 1, 0)
    for name, value in (("DIMS", (10,)), ("TOKENS", (40,)), ("SWEPT", cuts), ("COLD_BYTES", 1)):
        monkeypatch.setattr(causal_conv1d, name, value)
    monkeypatch.setattr(causal_conv1d, "SWEPT_LENGTHS", ((1, False), (4, True)))
    monkeypatch.setattr(causal_conv1d, "PEER_CUTS", [(4, 8, 1)])
    # What the operator uses takes 3, the cuts 2 and 1, and the other grid 4, for each size.
    times = iter([3.0, 2.0, 1.0, 4.0] * 2)
    monkeypatch.setattr(causal_conv1d, "median_us", lambda calls, repeats: next(times))
    with causal_conv1d.cut_into((16, 2, 8, 1, 1), 1):
        rows = causal_conv1d.sweep(1, DEVICE)
    lines = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 and all(row["peer_us"] == 4.0 for row in rows)
    assert all("| 4/2/8/1/0 1.0  8/2/8/1/1 2.0  rule 3.0" in line for line in lines[:2])
    assert all(float(line.split("error")[1]) <= 0.02 for line in lines[:2])
    assert "0.750" in lines[3] and "0.250" in lines[5]


def test_a_wrong_convolution_is_found_out():
    work = causal_conv1d.make_work(10, [6, 3], DEVICE)
    with causal_conv1d.cut_into((8, 2, 8, 1, 1)):
        assert work.error(lambda x: work.ours(x) * 1.1) > ERROR
        assert work.error(lambda x: work.ours(x.flip(1)).flip(1)) == torch.inf


def test_the_step_and_its_convolution_give_the_reference_s_outputs_and_states():
    work = gated_delta.make_work(2, 2, 1, 8, DEVICE, 1)
    for cut in ((4, 4), (8, 1)):
        with gated_delta.cut_into(cut):
            assert work.error(work.step, delta_rule, work.states[0]) < ERROR
    assert work.error(work.convolve, conv1d, work.convs[0]) < ERROR


def test_experts_over_a_chunk_and_their_peer_give_the_reference_s_output(monkeypatch):
    given = experts_chunk.Work(experts_chunk.DRY, DEVICE).chunk(9)
    errors = dict(experts_chunk.check(given, []))
    assert errors["reference"] < ERROR and errors["alone"] == errors["with room"] == 0
    expected = experts_chunk.reference.experts_chunk(**given)
    torch.testing.assert_close(experts_chunk.peer(**given), expected, rtol=0.05, atol=0.05)
    right = experts_chunk.operator.experts_chunk
    monkeypatch.setattr(experts_chunk.operator, "experts_chunk", lambda **x: right(**x) * 1.1)
    assert dict(experts_chunk.check(given, []))["reference"] > ERROR


@pytest.mark.parametrize("benchmark", [causal_conv1d, experts_chunk, gated_delta])
def test_what_cannot_be_measured_is_one_line_and_status_2(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in ((["--repeats", "0"], "--repeats is 0"), ([], "no CUDA GPU")):
        with pytest.raises(SystemExit) as exit_:
            benchmark.parse(arguments)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 32])
def test_ways_of_packed_products_begin_with_the_operators_own(bits, rows):
    for matrix in packed_step.GEMMA4_31B:
        own, *others = packed_step.ways(matrix, rows, bits)
        shape = matrix.outputs, matrix.inputs
        assert own == packed_step.linear_tiles(rows, *shape, bits, torch.bfloat16, matrix.gated)
        assert len(others) >= 2 and own not in others
        assert matrix.name in packed_step.COUNTS


def test_the_bound_of_packed_products_reads_every_word():
    words = torch.randint(-(2**15), 2**15, (8, 3 * 64), dtype=torch.int16, device=DEVICE)
    seen = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    packed_step.read_kernel[(2, 1)](words, seen, 3 * 64, 3, BLOCK_N=4, STAGES=2)
    spans = words.view(2, 4, 3, 64).unbind(2)
    assert torch.equal(seen, (spans[0] ^ spans[1] ^ spans[2]).int().sum((1, 2)).int())
