"""The gated delta rule (Gated Delta Networks, arXiv:2412.06464) in plain torch: its chunked form
over a prompt, and its step. A sequence remembers a matrix for each value head, float32 in a slot of
a table that is updated in place.

With k of length 1 and q of length 1 / sqrt(K), at each token and in each value head

    S = exp(g) * S;  S = S + k (x) beta * (v - S^T k);  o = S^T q
    g = -exp(A_log) * softplus(a + dt_bias),  beta = sigmoid(b)

All of it is float32, beta too. transformers rounds beta to the model's dtype: the two differ by up
to 2^-9 of a value's weight in bfloat16, and not at all in float32.
Shapes: B sequences, T tokens, G query and key heads, H value heads (H / G to a key head),
K and V head sizes, S slots, C chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloop.models.kernels import state_table
from tokenloop.models.kernels.state_table import PAD_SLOT_ID

CHUNK = 64
HEAD_SIZES = 16, 32, 64, 128, 256  # of a packed chunk
MOST_SEQUENCES = 256
L2_EPS = 1e-6  # inside the root, added to the sum of squares


def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """g and beta, float32, of a and b [..., H]; A_log and dt_bias are [H]."""
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g, b.float().sigmoid()


def normalized(x: Tensor, heads: int) -> Tensor:
    """x [..., G, K] as float32 of length 1, repeated for its value heads: [..., H, K]."""
    x = x.float()
    x = x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + L2_EPS)
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], dim=-2)


def check(q: Tensor, v: Tensor, state: Tensor) -> None:
    """Raise ValueError for heads that do not divide, or a state that is not float32."""
    if v.shape[-2] % q.shape[-2]:
        raise ValueError(f"{v.shape[-2]} value heads are no multiple of {q.shape[-2]} key heads")
    if state.dtype != torch.float32:
        raise ValueError(f"the recurrent state is {state.dtype}; torch.float32 is right")


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
    state: Tensor, cache_indices: Tensor | None, has_initial_state: Tensor,
    max_tokens: int | None = None,
) -> Tensor:  # fmt: skip
    """The rule over q, k [B, T, G, K] and v [B, T, H, V] with a, b [B, T, H], and A_log, dt_bias
    [H] -> o [B, T, H, V] of v's dtype.

    Sequence n begins with state[cache_indices[n]], or with zeros where has_initial_state, bool [B],
    is False. state is float32 [S, H, K, V]; cache_indices, int [B], differ from one another (None:
    n itself, and S is B). What the sequence ends with replaces its slot.

    Where T is symbolic, as in torch.export, `max_tokens` must bound it, and that many tokens are
    computed: a program without loops can know no other end of the pass over the chunks. Raises
    ValueError without it, and as `check` does.
    """
    check(q, v, state)
    length, heads = v.shape[1:3]
    if not isinstance(length, int) and max_tokens is None:
        raise ValueError(f"max_tokens = None, but the number of tokens, {length}, is symbolic")
    chunks = ((length if isinstance(length, int) else max_tokens) + CHUNK - 1) // CHUNK

    def chunked(x: Tensor) -> Tensor:
        """[B, T, H, ...] as [B, H, C, CHUNK, ...], with zeros after the last token, which neither
        change a state nor let it decay."""
        padding = [0, 0] * (x.dim() - 2) + [0, CHUNK * chunks - length]
        return F.pad(x, padding).transpose(1, 2).unflatten(2, (chunks, CHUNK))

    g, beta = (chunked(x) for x in gates(a, b, A_log, dt_bias))
    q = chunked(normalized(q, heads)) * q.shape[-1] ** -0.5
    k = chunked(normalized(k, heads))
    decay = g.cumsum(-1)  # a logarithm, from the chunk's begin on
    kept, end = decay.exp()[..., None], decay[..., -1:]
    inside = _unit_inverse(beta[..., None] * (k @ k.mT) * _pairwise(decay, -1))
    # What a chunk's tokens write if it begins with zeros, and what they take away of what it begins
    # with.
    writes = inside @ (beta[..., None] * chunked(v.float()))
    erases = inside @ (beta[..., None] * kept * k)
    attention = (q @ k.mT) * _pairwise(decay, 0)
    q = q * kept
    k = k * (end - decay).exp()[..., None]

    matrix = state_table.load(state, cache_indices, has_initial_state, PAD_SLOT_ID)
    outs = []
    for i in range(chunks):
        written = writes[:, :, i] - erases[:, :, i] @ matrix
        outs.append(q[:, :, i] @ matrix + attention[:, :, i] @ written)
        matrix = matrix * end[:, :, i, :, None].exp() + k[:, :, i].mT @ written
    if cache_indices is None:
        state.copy_(matrix)
    else:
        state.index_copy_(0, cache_indices.long(), matrix)
    # One token more than the longest: where T is symbolic, whether the slice is contiguous must not
    # depend on T, or T is asserted to be less than the whole.
    out = torch.cat([*outs, outs[0][:, :, :1]], 2)[:, :, :length]
    return out.transpose(1, 2).to(v.dtype)


def check_chunk(q: Tensor, v: Tensor, starts: Tensor) -> None:
    """Raise ValueError for sizes of heads or a number of sequences that a packed chunk cannot
    have."""
    sizes = q.shape[-1], v.shape[-1]
    if any(size not in HEAD_SIZES for size in sizes):
        raise ValueError(f"heads of {sizes[0]} and {sizes[1]}; each must be one of {HEAD_SIZES}")
    if starts.shape[0] - 1 > MOST_SEQUENCES:
        raise ValueError(
            f"{starts.shape[0] - 1} sequences; at most {MOST_SEQUENCES} make up a packed chunk"
        )


def gated_delta_rule_chunk(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
    state: Tensor, starts: Tensor, rows: Tensor, first: Tensor,
) -> Tensor:  # fmt: skip
    """`gated_delta_rule` of the sequences of a packed chunk: q, k [T, G, K] and v [T, H, V] with a,
    b [T, H] -> o [T, H, V] of v's dtype.

    Sequence i has tokens starts[i] up to starts[i + 1], int32 [B + 1]. It begins with
    state[rows[i]], or with zeros where first[i] is 0, and its end state replaces that row. A
    sequence whose row is -1 begins with zeros and leaves nothing, and one without tokens leaves its
    row as it was. Tokens after the last sequence are never read, and their results are anything
    (here zeros). rows, int32 [B], differ from one another apart from -1; first, int32 [B], are
    multiples of CHUNK, so a prompt's blocks are the same however it is cut into chunks.

    State and output differ from those of single steps by what float32 sums in another order do; on
    CUDA, with inputs of 16 bits, also by roundings of the state in products. The tests have bounds.
    K and V are powers of two from 16 to 256, and B is 256 at most. Raises ValueError for others,
    and as `check` does.
    """
    check(q, v, state)
    check_chunk(q, v, starts)
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    bounds = starts.tolist()
    for i, row in enumerate(rows.tolist()):
        tokens = slice(bounds[i], bounds[i + 1])
        if bounds[i] == bounds[i + 1]:
            continue
        table = state[row : row + 1] if row >= 0 else torch.zeros_like(state[:1])
        given = (x[None, tokens] for x in (q, k, v, a, b))
        begun = (first[i : i + 1] > 0) & (row >= 0)
        out[tokens] = gated_delta_rule(*given, A_log, dt_bias, table, None, begun)[0]
    return out


def _pairwise(decay: Tensor, diagonal: int) -> Tensor:
    """exp(decay[i] - decay[j]) for j up to i + diagonal, else 0: [..., CHUNK, CHUNK] of [...,
    CHUNK]."""
    index = torch.arange(CHUNK, device=decay.device)
    seen = index[None, :] <= index[:, None] + diagonal
    difference = decay[..., :, None] - decay[..., None, :]
    # Differences above the diagonal are positive and may overflow.
    return torch.where(seen, difference, float("-inf")).exp()


def _unit_inverse(lower: Tensor) -> Tensor:
    """(I + lower)^-1 for strictly lower triangular [..., CHUNK, CHUNK].

    Blocks on the diagonal are inverted and joined two by two: the inverse of [[P, 0], [R, Q]] is
    [[P', 0], [-Q' R P', Q']]. That is as stable as substitution, which takes a step for each row.
    The product of (I + lower^(2^i)) is not: its powers grow like binomial coefficients.
    """
    index = torch.arange(CHUNK, device=lower.device)
    inverse = torch.eye(CHUNK, device=lower.device)
    size = 1
    while size < CHUNK:
        block, pair = index // size, index // (2 * size)
        joined = (pair[:, None] == pair[None, :]) & (block[:, None] != block[None, :])
        corner = torch.where(joined, lower, 0.0)
        inverse = inverse - (corner if size == 1 else inverse @ corner @ inverse)
        size *= 2
    return inverse


def gated_delta_rule_update(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
    state: Tensor, cache_indices: Tensor | None, has_initial_state: Tensor,
    pad_slot_id: int = PAD_SLOT_ID,
) -> Tensor:  # fmt: skip
    """`gated_delta_rule` of one token of each of B sequences: q, k [B, G, K], v [B, H, V] and
    a, b [B, H] -> o [B, H, V]. A sequence whose index is `pad_slot_id` begins with zeros and leaves
    nothing."""
    check(q, v, state)
    heads = v.shape[1]
    g, beta = gates(a, b, A_log, dt_bias)
    q, k = normalized(q, heads) * q.shape[-1] ** -0.5, normalized(k, heads)
    matrix = state_table.load(state, cache_indices, has_initial_state, pad_slot_id)
    matrix = matrix * g.exp()[..., None, None]
    delta = beta[..., None] * (v.float() - (matrix * k[..., None]).sum(-2))
    matrix = matrix + k[..., None] * delta[..., None, :]
    out = (matrix * q[..., None]).sum(-2).to(v.dtype)
    state_table.store(state, matrix, cache_indices, pad_slot_id)
    return out
