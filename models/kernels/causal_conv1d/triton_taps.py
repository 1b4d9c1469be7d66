"""The arithmetic of the convolution: taps, bias and activation."""

import triton
import triton.language as tl

# With tl.exp and a division, SiLU would be half of all instructions, most of them for numbers that
# the hardware's two take as well: exp2 of a large number is inf, and 1 / inf is 0.
if triton.knobs.runtime.interpret:

    @triton.jit
    def sigmoid(x):
        return 1.0 / (1.0 + tl.exp(-x))

else:

    @triton.jit
    def sigmoid(x):
        """float32, to 2 units in the last place."""
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def activated(x, SILU: tl.constexpr):
    if SILU:
        x = x * sigmoid(x)
    return x


@triton.jit
def convolved(inputs, weights, bias, WIDTH: tl.constexpr, SILU: tl.constexpr):
    """float32 outputs of WIDTH inputs each."""
    sums = bias
    for tap in tl.static_range(WIDTH):
        sums = tl.fma(weights[tap], inputs[tap], sums)
    return activated(sums, SILU)


@triton.jit
def load_bias(bias_ptr, channels, in_dim, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=in_dim, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros(channels.shape, tl.float32)
    return bias


@triton.jit
def halves(pair, dtype: tl.constexpr):
    """float32 of the two numbers of 16 bits in an int32, the lower half first."""
    if dtype == tl.bfloat16:
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = pair.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def load_weights(weight_ptrs, stride, in_dim, WIDTH: tl.constexpr):
    """The taps, float32 [BLOCK_DIM] each, the tap of the oldest input first."""
    weights = ()
    for tap in tl.static_range(WIDTH):
        weight = tl.load(weight_ptrs + tap * stride, mask=in_dim, other=0.0)
        weights = weights + (weight.to(tl.float32),)
    return weights


@triton.jit
def load_packed_taps(weight_ptr, channels, in_dim):
    """As load_weights, where 4 taps of 16 bits are adjacent."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    taps = tl.load(weight_ptr.to(tl.pointer_type(tl.int64)) + channels, mask=in_dim, other=0)
    low, high = taps.to(tl.int32), (taps >> 32).to(tl.int32)
    return halves(low, dtype) + halves(high, dtype)
