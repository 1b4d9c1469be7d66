"""Where kernels find a sequence's state in a table (models/kernels/state_table.py)."""

import triton
import triton.language as tl


@triton.jit
def load_slot(cache_indices_ptr, sequence, HAS_INDICES: tl.constexpr, exists=None):
    """The slot of a sequence, int64; any slot where `exists` is False."""
    slot = sequence.to(tl.int64)
    if HAS_INDICES:
        if exists is None:
            slot = tl.load(cache_indices_ptr + sequence).to(tl.int64)
        else:
            slot = tl.load(cache_indices_ptr + sequence, mask=exists, other=0).to(tl.int64)
    return slot
