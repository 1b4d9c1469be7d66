"""Integer weights come back from the words that they are packed into."""

import pytest
import torch

from tokenloop.models.kernels.linear.packing import (
    FLOAT8,
    pack,
    pack_float8,
    quantize_float8,
    quantize_int4,
    unpack,
    unpack_float8,
    words_of,
)
from tokenloop.models.kernels.linear.reference import dequantize


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [129, 256, 384])
def test_packed_values_come_back(bits, inputs):
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, inputs), dtype=torch.int32)
    words = pack(values, bits)
    assert words.dtype == torch.int16 and words.shape[1] % 64 == 0
    assert torch.equal(unpack(words, bits, inputs), values)


@pytest.mark.parametrize("inputs", [1, 128, 200])
def test_packed_float8_comes_back_and_lies_as_integers_do(inputs):
    codes = torch.randint(-128, 128, (3, inputs), dtype=torch.int8)
    packed = pack_float8(codes.view(FLOAT8))
    assert torch.equal(unpack_float8(packed, inputs).view(torch.int8), codes)
    assert torch.equal(words_of(packed), pack(codes, 8))


def test_float8_weights_are_the_nearest_to_their_row_s_scale():
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    packed, scale = quantize_float8(weight)
    values = unpack_float8(packed, 300).float()
    assert torch.equal(values.abs().amax(1), torch.tensor([448.0, 448.0, 448.0, 0.0, 448.0]))
    every = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
    nearest = (weight.abs()[..., None] / scale.T[..., None] - every).abs().amin(-1)
    difference = (weight / scale.T - values).abs()
    torch.testing.assert_close(difference, nearest, rtol=0, atol=1e-4)
    assert torch.equal(dequantize(packed, scale, 300), values * scale.T)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="bits = 3"):
        pack(torch.zeros(1, 256, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="128 inputs of 4 bits"):
        pack(torch.zeros(1, 128, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="group_size = 96 .* 256 inputs"):
        quantize_int4(torch.zeros(1, 256), 96)
    with pytest.raises(ValueError, match="63 words are not 256 inputs"):
        dequantize(torch.zeros(1, 63, dtype=torch.int16), None, 256)
