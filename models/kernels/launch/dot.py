"""Products of matrices, which on a GPU the tensor cores make."""

import triton
import triton.language as tl

# The interpreter holds bfloat16 as integers, and computes with them as such.
if triton.knobs.runtime.interpret:

    @triton.jit
    def dot(a, b, acc):
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)

else:

    @triton.jit
    def dot(a, b, acc):
        """acc [M, N] plus a [M, K] times b [K, N], float32 not rounded to fewer bits."""
        return tl.dot(a, b, acc, input_precision="ieee")
