"""Programmatic dependent launch: a kernel of a captured step begins before those ahead of it end.

A kernel of the list below first asks for weights, which no kernel of a step writes. Then it calls
`wait`, which ends when all that the kernels ahead of it do is done and can be seen. So launching a
kernel, and fetching what it reads first, costs little where the ones ahead of it leave room.
Launched in any other way a kernel waits for nothing. Only kernels of the list overlap one another:
what any other writes, such as a step's positions, is there before those after it begin.

The next kernel may begin as soon as every program of this one has said so: at once, by `wait`; or,
with `wait_alone` and then `release`, when it has read what it reads. That is for programs that fill
a processor: the next ones would be placed beside them, where room is left, and then not evenly.

See "Programmatic Dependent Launch" in NVIDIA's CUDA C++ programming guide; runner/step_graphs.py
makes a graph's dependencies such.
"""

import torch
import triton
import triton.language as tl

# Kernels that wait before they read or write what other kernels of a step write.
WAITING = (
    "attend_kernel", "dot_kernel", "norm_kernel", "rows_kernel",
    "causal_conv1d_update_kernel", "gated_delta_rule_update_kernel", "gated_rms_norm_kernel",
    "route_kernel", "gate_up_kernel", "down_kernel", "tile_maxima_kernel", "token_kernel",
)  # fmt: skip

# Elements: whatever a pointer points to, with so many more it is aligned as it was.
ALIGNMENT = tl.constexpr(16)
# None has effects as far as Triton knows, for torch takes an operation with effects for one that
# may write to any argument. So each gives its argument, which is to be used.
_RELEASE, _WAIT = "griddepcontrol.launch_dependents;", "griddepcontrol.wait;"
# Thread t asks for the bytes from $1 + t * $2 on, if t is below $3: $4 of them.
_PREFETCH = """{
    .reg .pred is_row;
    .reg .b32 thread;
    .reg .b64 address;
    mov.u32 thread, %tid.x;
    setp.lt.u32 is_row, thread, $3;
    mul.wide.u32 address, thread, $2;
    add.s64 address, address, $1;
    @is_row cp.async.bulk.prefetch.L2.global [address], $4;
    mov.b32 $0, 0;
}"""
# Before Hopper there are no such instructions.
if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
    _RELEASE, _WAIT, _PREFETCH, WAITING = "", "", "mov.b32 $0, 0;", ()
RELEASE = tl.constexpr(f"{_RELEASE} mov.b32 $0, $1;")
WAIT = tl.constexpr(f"{_WAIT} mov.b32 $0, $1;")
RELEASE_WAIT = tl.constexpr(f"{_RELEASE} {_WAIT} mov.b32 $0, $1;")
# On one line: torch's compiler copies it into a string with its escapes processed.
PREFETCH = tl.constexpr(" ".join(_PREFETCH.split()))

if triton.knobs.runtime.interpret:

    @triton.jit
    def wait(zero):
        return zero * ALIGNMENT

    @triton.jit
    def wait_alone(zero):
        return zero * ALIGNMENT

    @triton.jit
    def release(zero):
        return zero * ALIGNMENT

    @triton.jit
    def prefetch(pointers):
        return tl.zeros(pointers.shape, tl.int32)

    @triton.jit
    def prefetch_rows(ptr, stride, rows, size):
        return 0

else:

    @triton.jit
    def wait(zero):
        """int32 0, given 0, once the kernels ahead are done; the next one may begin before.

        It is to be added to each pointer to what they may write: that is what keeps a load, or
        what is stored, behind it.
        """
        return ALIGNMENT * tl.inline_asm_elementwise(
            RELEASE_WAIT, "=r,r", [zero], dtype=tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def wait_alone(zero):
        """As `wait`, but that the next kernel may not begin yet."""
        return ALIGNMENT * tl.inline_asm_elementwise(
            WAIT, "=r,r", [zero], dtype=tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def release(zero):
        """int32 0, given 0, and the next kernel may begin."""
        return ALIGNMENT * tl.inline_asm_elementwise(
            RELEASE, "=r,r", [zero], dtype=tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def prefetch(pointers):
        """int32 zeros, having asked for the lines of L2 that `pointers` are in."""
        return tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip

    @triton.jit
    def prefetch_rows(ptr, stride, rows, size):
        """int32 0, having asked L2 for `size` bytes of each of as many rows, `stride` bytes apart,
        as the program has threads at most. ptr, stride and size are multiples of 16 bytes."""
        return tl.inline_asm_elementwise(
            PREFETCH, "=r,l,r,r,r", [ptr.to(tl.int64), stride, rows, size],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
