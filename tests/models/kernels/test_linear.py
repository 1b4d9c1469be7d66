"""The Triton kernels of linear layers give what their references give."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES, EPS, ON_GPU, assert_close, quantized
from tokenloop.models.kernels.linear import operator, reference
from tokenloop.models.kernels.linear.linear_tiles import LinearTiles, linear_tiles
from tokenloop.models.kernels.linear.packing import pack_float8, quantize_int4

PLAIN = LinearTiles(False, 8, 512 if ON_GPU else 32)
DOT = LinearTiles(True, 64 if ON_GPU else 16, 64 if ON_GPU else 32, stages=2)
SPLIT = DOT._replace(splits=3)
INPUTS = [2048, 5376, 1000] if ON_GPU else [72]
OUTPUTS = 1537 if ON_GPU else 19


def test_what_the_kernels_cannot_read_is_refused(normal, semaphores):
    x, weight = normal(3, 256, dtype=torch.bfloat16), normal(8, 256, dtype=torch.bfloat16)
    words, scale = quantize_int4(weight)
    for message, arguments in (
        ("weight of strides", (x[:, :8].contiguous(), weight.T, None)),
        ("activations are torch.float32", (x.float(), words, scale)),
        ("scale of shape None: 8 rows of 4 bits need", (x, words, None)),
        ("128 bytes are not 256 inputs of float8", (x, pack_float8(every_float8()), None)),
    ):
        with pytest.raises(ValueError, match=message):
            operator.linear(*arguments, None, semaphores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [PLAIN, DOT, SPLIT], ids=["plain", "dot", "split"])
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
def test_linear_is_the_reference(normal, semaphores, dtype, tiles, activation):
    for inputs in INPUTS:
        x = normal(3, inputs, dtype=dtype)
        weight = normal(2 * OUTPUTS, inputs, dtype=dtype, scale=inputs**-0.5)
        for bias, soft_cap, out_float32 in ((None, 0.0, False), (normal(2 * OUTPUTS), 3.0, True)):
            arguments = (x, weight, None, bias, semaphores)
            options = {"activation": activation, "soft_cap": soft_cap, "out_float32": out_float32}
            expected = reference.linear(*arguments, **options)
            got = operator.launch_linear(*arguments, **options, tiles=tiles)[1]
            assert_close(got, expected, dtype)


def test_scales_of_a_checkpoint_may_be_float16(normal, semaphores):
    x, weight = normal(3, 384, dtype=torch.bfloat16), normal(OUTPUTS, 384, scale=384**-0.5)
    words, scale = quantized(weight, 4, 128)
    arguments = x, words, (scale.float() * 1.003).half(), None, semaphores
    got = operator.linear(*arguments, out_float32=True)
    expected = reference.linear(*arguments, out_float32=True)
    assert_close(got, expected, torch.float32)
    assert not torch.equal(expected, reference.linear(x, words, scale, None, semaphores))


def every_float8() -> torch.Tensor:
    """[2, 127]: all finite values, of either sign, subnormal ones and zeros among them."""
    positive = torch.arange(127, dtype=torch.uint8)
    return torch.stack([positive, positive + 128]).view(torch.float8_e4m3fn)


def test_every_float8_is_exact(semaphores):
    codes = every_float8().to(DEVICE)
    scale = torch.ones(1, 2, device=DEVICE)
    # A row for each input: the weight itself is the result.
    x = torch.eye(127, dtype=torch.bfloat16, device=DEVICE)
    got = operator.linear(x, pack_float8(codes), scale, None, semaphores, out_float32=True)
    assert torch.equal(got, codes.float().T)


@pytest.mark.parametrize(
    "bits, group_size",
    [
        (8, 0), (8, 32), (8, 64), (8, 128), (4, 32), (4, 64), (4, 128), (4, 256),
        ("fp8", 0), ("fp8", 64), ("fp8", 128),
    ],
)  # fmt: skip
@pytest.mark.parametrize("activation, splits", [(None, 1), ("silu", 2)])
def test_linear_of_packed_weights_is_the_reference_s_in_float32(
    normal, semaphores, bits, group_size, activation, splits
):
    inputs = 5376 if ON_GPU else 512 if group_size == 256 else 384
    x = normal(3, inputs, dtype=torch.bfloat16)
    weight = normal(2 * OUTPUTS, inputs, scale=inputs**-0.5)
    arguments = (x, *quantized(weight, bits, group_size), None, semaphores)
    options = {"activation": activation, "out_float32": True}
    expected = reference.linear(*arguments, **options)
    got = operator.launch_linear(*arguments, **options, tiles=DOT._replace(splits=splits))[1]
    assert_close(got, expected, torch.float32)


@pytest.mark.parametrize(
    "bits, tiles",
    # Tiles of packed weights are other ones for few rows and for many: the operator's own.
    [(0, PLAIN), (0, DOT), (0, SPLIT), (8, None), (4, None), ("fp8", None)],
    ids=["plain", "dot", "split", "int8", "int4", "fp8"],
)
@pytest.mark.parametrize("rows", [9, 33] if ON_GPU else [18])
def test_a_row_of_a_batch_is_that_row_alone(normal, semaphores, bits, tiles, rows):
    inputs = 5376 if ON_GPU else 384
    x = normal(rows, inputs, dtype=torch.bfloat16)
    weight, scale = normal(OUTPUTS, inputs, scale=inputs**-0.5), None
    if bits:
        weight, scale = quantized(weight, bits)
    else:
        weight = weight.bfloat16()
    options = {"out_float32": True, "tiles": tiles}
    together = operator.launch_linear(x, weight, scale, None, semaphores, **options)[1]
    for i in (0, rows // 2, rows - 1):
        row = x[i : i + 1]
        alone = operator.launch_linear(row, weight, scale, None, semaphores, **options)[1]
        # NumPy's products, the interpreter's, depend on the company.
        difference = (alone[0] - together[i]).abs().max()
        assert difference == 0 if ON_GPU else difference < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_within_a_linear_layer_is_the_norm_alone(normal, semaphores, monkeypatch, dtype):
    size, rows = (640, 4) if ON_GPU else (40, 3)
    x, branch = normal(rows, size, dtype=dtype), normal(rows, size, dtype=dtype)
    post, weight = normal(size, dtype=dtype), normal(size, dtype=dtype)
    scalar, matrix = normal(1, dtype=dtype), normal(48, size, dtype=dtype)
    options = {"eps": EPS, "offset": 1.0, "activation": "silu"}

    def both():
        last = (matrix, None, None, semaphores)
        total, y = operator.add_norm_linear(x, branch, post, scalar, weight, *last, **options)
        return total, y, operator.norm_linear(x, weight, *last, **options)

    within = both()
    monkeypatch.setattr(operator, "SHARED_NORM", 0)
    for got, expected in zip(within, both()):
        assert torch.equal(got, expected)
    last = (matrix, None, None, semaphores)
    expected = reference.add_norm_linear(x, branch, post, scalar, weight, *last, **options)
    expected = *expected, reference.norm_linear(x, weight, *last, **options)
    for got, right in zip(within, expected):
        assert_close(got, right, dtype)


@pytest.mark.parametrize(
    "outputs, inputs, warps", [(2048, 640, 4), (640, 2048, 4), (1024, 2048, 2)]
)
def test_what_orders_a_sum_does_not_depend_on_the_rows(outputs, inputs, warps):
    cuts = {linear_tiles(rows, outputs, inputs, 0, torch.bfloat16) for rows in (1, 4, 5, 32)}
    assert [cut.warps for cut in cuts] == [warps]
