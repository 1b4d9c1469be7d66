"""Semaphores, by which programs of one launch find out which of them is the last."""

import triton
import triton.language as tl


@triton.jit
def arrive(semaphore_ptr, count):
    """Whether this is the last of `count` programs to come here; it leaves the semaphore at 0."""
    tl.debug_barrier()  # the stores of all threads come before it
    last = tl.atomic_add(semaphore_ptr, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(semaphore_ptr, 0)
    return last
