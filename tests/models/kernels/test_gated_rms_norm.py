"""The norm and gate after the delta rule give what the network's own give."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE, ON_GPU, on_device
from tokenloop.models.delta_net import RMSNormGated
from tokenloop.models.kernels.gated_rms_norm import operator, reference


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
        got = operator.gated_rms_norm(x, gate, weight, norm.eps)
        # The interpreter cuts bfloat16 off where a GPU rounds.
        rtol = 1e-5 if dtype == torch.float32 else 2**-8 if ON_GPU else 2**-5
        torch.testing.assert_close(got, norm(x, gate), rtol=rtol, atol=1e-5)
        assert torch.equal(reference.gated_rms_norm(x, gate, weight, norm.eps), norm(x, gate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [24, 128])
@pytest.mark.parametrize("count", [0, 3, 8, 9])
def test_rows_of_a_chunk_are_the_same_in_chunks_of_any_size(normal, dtype, size, count):
    heads, rows = 5, 9
    x, weight = normal(rows, heads, size, dtype=dtype), normal(size, dtype=dtype)
    projected = normal(rows, 2 * heads * size + 8, dtype=dtype)
    gate = projected[:, 8 : 8 + heads * size].unflatten(1, (heads, size))
    x[count:] = torch.nan
    number = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    got = operator.gated_rms_norm(x, gate, weight, 1e-6, number)[:count]
    expected = reference.gated_rms_norm(x, gate, weight, 1e-6, number)[:count]
    rtol = 1e-5 if dtype == torch.float32 else 2**-7 if ON_GPU else 2**-5
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-5)
    for begin in range(count):
        # Alone, and as the second row.
        one = operator.gated_rms_norm(x[begin:], gate[begin:], weight, 1e-6, number.fill_(1))
        assert torch.equal(one[0], got[begin])
        one = operator.gated_rms_norm(
            x[[0, begin]], gate[[0, begin]], weight, 1e-6, number.fill_(2)
        )
        assert torch.equal(one[1], got[begin])


def test_heads_that_are_not_contiguous_are_refused():
    x = torch.ones(2, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"^strides of x and gate are .* must be contiguous$"):
        operator.gated_rms_norm(torch.ones(2, 4, 3, device=DEVICE).mT, x, x[0, 0], 1e-6)
