"""The kernels' logarithms and masses have the reference's bits, and their bounds of noise hold."""

import math

import torch
import triton
import triton.language as tl

from tests.sampler.kernels.drawing import DEVICE, ON_GPU
from tokenloop.sampler import philox
from tokenloop.sampler import sample as reference
from tokenloop.sampler.kernels import triton_exact, triton_noise

INF = math.inf


@triton.jit
def functions_kernel(x_ptr, log_ptr, scaled_ptr, mass_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(log_ptr + offsets, triton_exact.log(tl.load(x_ptr + offsets)))
    scaled = tl.load(scaled_ptr + offsets)
    tl.store(mass_ptr + offsets, triton_exact.mass(scaled, 0.0, 1.0))


def test_logarithms_and_masses_have_the_reference_s_bits():
    block, size = 1024, 2**20 if ON_GPU else 2**14
    x = philox.uniform(torch.randint(2**23, (size,)).float())
    x[::2] = -torch.log(x[::2])
    scaled = torch.rand(size) * -30
    scaled[:4] = torch.tensor([0.0, -INF, -1e-40, -26.34])
    x, scaled = x.to(DEVICE), scaled.to(DEVICE)
    log, mass = torch.empty_like(x), torch.empty_like(x, dtype=torch.int64)
    functions_kernel[(size // block,)](x, log, scaled, mass, BLOCK=block)
    assert torch.equal(log.cpu(), philox.log(x.cpu()))
    assert torch.equal(mass.cpu(), reference.weights(scaled.cpu()))


@triton.jit
def rate_kernel(words_ptr, rate_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(rate_ptr + offsets, triton_noise.log2_double_rate(tl.load(words_ptr + offsets)))


def test_the_bound_of_noise_is_one_and_a_close_one_where_tokens_win():
    block, size = 1024, 2**23
    values = torch.arange(size)
    if not ON_GPU:
        size = 2**17
        values = torch.cat([values[: size // 2], values[-size // 2 :]])
    words = (values << 9).to(torch.uint32).to(DEVICE)
    rate = torch.empty(size, device=DEVICE)
    rate_kernel[(size // block,)](words, rate, BLOCK=block)
    u = (values.double() + 0.5) * 2.0**-23
    expected = (-u.log()).log() / math.log(2)
    below = expected + 1 - rate.cpu()
    # The tolerance of a score of 0 is more than four times as much.
    assert below.min() > -5e-5
    # r counts from 0 in steps of 2^-23, half a step too low: at its least the bound says nothing.
    assert below[-1] == INF
    assert below[:-1].max() < 3.5
    for rate, most in ((0, 0.27), (-1.5, 0.05)):
        half_a_step = 2.0**-24 / -u.log() / math.log(2)
        is_meant = (expected < rate) & (half_a_step < 1e-3)
        assert (below - 1.1 * half_a_step)[is_meant].max() < most
