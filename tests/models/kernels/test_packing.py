"""Integer weights come back from the words that they are packed into."""

import pytest
import torch

from tokenloop.models.kernels.linear.packing import pack, quantize_int4, unpack
from tokenloop.models.kernels.linear.reference import dequantize


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [129, 256, 384])
def test_packed_values_come_back(bits, inputs):
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, inputs), dtype=torch.int32)
    words = pack(values, bits)
    assert words.dtype == torch.int16 and words.shape[1] % 64 == 0
    assert torch.equal(unpack(words, bits, inputs), values)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="bits = 3"):
        pack(torch.zeros(1, 256, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="128 inputs of 4 bits"):
        pack(torch.zeros(1, 128, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="group_size = 96 .* 256 inputs"):
        quantize_int4(torch.zeros(1, 256), 96)
    with pytest.raises(ValueError, match="63 words are not 256 inputs"):
        dequantize(torch.zeros(1, 63, dtype=torch.int16), None, 256)
