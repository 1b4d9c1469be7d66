"""Programmatic dependent launch: a kernel of a captured step begins before those ahead of it end.

A kernel that is marked with `waits` first asks for weights, which no kernel of a step writes. Then
it calls `wait`, which returns when the kernels ahead of it are done and what they wrote can be
seen. So launching a kernel, and fetching what it reads first, costs little where the kernels ahead
leave room. A kernel that is launched in any other way waits for nothing. Only kernels that wait
overlap one another: what any other kernel writes, such as a step's positions, is there before the
kernels after it begin.

`wait` waits for the kernels right ahead to end. All before them have ended then, too, but only
because those kernels waited themselves. A grid of which no program waits could end early, and the
kernel after it would no longer wait for those before it. Tensors share memory by the order of
launches, so that would be wrong even where nobody reads what they wrote. So:

- A program waits before it returns, also where it has nothing to do: `if i + wait(0) >= count`. The
  compiler may move a wait past a condition that does not depend on its zero. (Of attend_kernel some
  programs return first; of every row one does not.)
- A program waits before it writes anything, also what depends on nothing that it reads.
- Before it waits it reads weights and tables, what the host wrote before the graph, such as where a
  chunk's sequences begin, and state that no other kernel of the graph writes.
- Its tensor descriptors may be made before, if their memory belongs to this launch alone, as it
  does in a launch list.

tests/compile_kernels.py sees in the compiled kernels that the first three hold.

The next kernel may begin as soon as every program of this one has said so. `wait` says so at once.
With `wait_alone` a program says so later, by `release`, when it has read what it reads. Programs
that fill a processor do that: the next kernel's programs would otherwise be placed beside them
where room is left, and so unevenly.

See "Programmatic Dependent Launch" in NVIDIA's CUDA C++ programming guide;
runner/engines/programmatic_launch.py makes a graph's dependencies programmatic.
"""

import torch
import triton
import triton.language as tl

# Before Hopper there are no such instructions.
_EXISTS = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)

# Names of the kernels that wait, of those operators that are imported.
WAITING: set[str] = set()

# Elements: a pointer to anything stays as aligned as it was when so many are added to it.
ALIGNMENT = tl.constexpr(16)
# Triton must not see an effect in any of these: torch takes an operation with effects for one that
# may write to any argument. So each gives its argument, and the caller must use that.
_RELEASE = "griddepcontrol.launch_dependents;" if _EXISTS else ""
_WAIT = "griddepcontrol.wait;" if _EXISTS else ""
# Thread t asks for $4 bytes from $1 + t * $2 on, if t is below $3.
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
if not _EXISTS:
    _PREFETCH = "mov.b32 $0, 0;"
RELEASE = tl.constexpr(f"{_RELEASE} mov.b32 $0, $1;")
WAIT = tl.constexpr(f"{_WAIT} mov.b32 $0, $1;")
RELEASE_WAIT = tl.constexpr(f"{_RELEASE} {_WAIT} mov.b32 $0, $1;")
# On one line: torch's compiler copies it into a string with its escapes processed.
PREFETCH = tl.constexpr(" ".join(_PREFETCH.split()))


def waits(kernel: triton.JITFunction) -> triton.JITFunction:
    """The kernel itself, whose name is now in WAITING: it waits before it reads or writes what
    other kernels of a step write. Before Hopper no kernel waits."""
    if _EXISTS:
        WAITING.add(kernel.fn.__name__)
    return kernel


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

        The caller adds it to each pointer to what they may write: that keeps loads and stores
        behind it.
        """
        return ALIGNMENT * tl.inline_asm_elementwise(
            RELEASE_WAIT, "=r,r", [zero], dtype=tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def wait_alone(zero):
        """As `wait`, but the next kernel may not begin yet."""
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
        """int32 zeros. Asks L2 for the lines that `pointers` are in."""
        return tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip

    @triton.jit
    def prefetch_rows(ptr, stride, rows, size):
        """int32 0. Asks L2 for `size` bytes of each of `rows` rows, `stride` bytes apart; the
        program has at least as many threads. ptr, stride and size are multiples of 16 bytes."""
        return tl.inline_asm_elementwise(
            PREFETCH, "=r,l,r,r,r", [ptr.to(tl.int64), stride, rows, size],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
