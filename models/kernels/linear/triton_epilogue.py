"""What kernels of linear layers do with float32 outputs before they store them."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh from an exponential that does not overflow."""
    e = tl.exp(-2 * tl.abs(x))
    y = (1 - e) / (1 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x / (1 + tl.exp(-x))
    # GELU by tanh (arXiv:1606.08415): sqrt(2 / pi) is 0.7978845608.
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """See models.layers.gated."""
    if ACTIVATION == "clamped_swiglu":
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        return (up + 1) * (gate / (1 + tl.exp(-1.702 * gate)))
    return activate(gate, ACTIVATION) * up


@triton.jit
def finish(y, up, bias_ptr, n, N, soft_cap, ACTIVATION: tl.constexpr, SOFT_CAP: tl.constexpr):
    """Bias, activation times `up`, and soft cap of outputs n, [len(n), ...]; n broadcasts with
    them."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        if bias_ptr is not None:
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
        y = activate(y, ACTIVATION) * up
    if SOFT_CAP:
        y = soft_cap * tanh(y / soft_cap)
    return y
