"""The Triton kernel of a token's attention gives what its reference gives."""

import itertools

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES, EPS, ON_GPU, assert_close, needs_gpu
from tokenloop.models.kernels.attention import operator, reference
from tokenloop.models.kernels.attention.attend_tiles import AttendTiles
from tokenloop.models.kernels.linear.packing import quantize_int4

LAYOUTS = (
    [(1, 4, 256), (4, 8, 512), (16, 2, 256), (8, 5, 128)] if ON_GPU else [(1, 4, 16), (2, 3, 8)]
)


def attention(normal, layout, slots, dtype, values_are_keys):
    """The arguments and options of attend_step for three rows, but for their positions."""
    kv_heads, groups, head_dim = layout
    width = kv_heads * (groups + (1 if values_are_keys else 2)) * head_dim
    qkv = normal(3, width, dtype=dtype)
    caches = [normal(3, slots, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    # What is not filled yet may hold anything finite.
    inv_freq = torch.rand(head_dim // 2, device=DEVICE)
    inv_freq[head_dim // 3 :] = 0
    norms = [normal(head_dim, dtype=dtype) for _ in range(2)]
    options = {
        "scale": head_dim**-0.5, "eps": EPS, "offset": 1.0,
        "values_are_keys": values_are_keys, "value_norm": values_are_keys,
        "attention_factor": 1.0 if values_are_keys else 1.3,
    }  # fmt: skip
    return qkv, caches, norms, inv_freq, options


def test_projections_that_the_caches_do_not_fit_are_refused(normal, semaphores):
    caches = [normal(3, 5, 2, 8) for _ in range(2)]
    position = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    rest = position, *caches, None, None, normal(4), semaphores
    with pytest.raises(ValueError, match=r"\(3, 40\) do not fit caches .* \(3, 5, 2, 8\)"):
        operator.attend_step(normal(3, 40), *rest, scale=1.0, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("values_are_keys", [False, True])
def test_attention_and_the_caches_are_the_reference_s(
    normal, semaphores, dtype, layout, values_are_keys
):
    slots = 1000 if ON_GPU else 19
    qkv, caches, norms, inv_freq, options = attention(normal, layout, slots, dtype, values_are_keys)
    for position, fan, least in (
        ([0, 3, slots - 1], 2, 1),
        ([slots, 2 * slots - 1, 7 * slots + 5], 4, 1),
        ([1, 9 * slots, 4], 2, 2),
    ):
        position = torch.tensor(position, device=DEVICE)
        tiles = AttendTiles(16 if ON_GPU else 4, 4, least, stages=1, fan=fan, combined=64)
        mine, theirs = [[x.clone() for x in caches] for _ in range(2)]
        got = operator.launch_attend(
            qkv, position, *mine, *norms, inv_freq, semaphores, **options, tiles=tiles
        )
        expected = reference.attend_step(
            qkv, position, *theirs, *norms, inv_freq, semaphores, **options
        )
        for x, y in zip((got, *mine), (expected, *theirs)):
            assert_close(x, y, dtype)
        new = (torch.arange(3, device=DEVICE), position % slots)
        for x, y in zip(mine, caches):
            x.index_put_(new, y[new])
            assert torch.equal(x, y), "another slot than the new one was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_take_weight_however_slots_are_cut(normal, semaphores, dtype):
    slots = 1000 if ON_GPU else 19
    qkv, caches, norms, inv_freq, options = attention(normal, LAYOUTS[0], slots, dtype, False)
    heads = LAYOUTS[0][0] * LAYOUTS[0][1]
    # One that leaves nothing to the others, one that takes nothing, and some between.
    sinks = torch.cat([torch.tensor([200.0, -200.0], device=DEVICE), normal(heads - 2)]).to(dtype)
    for position in ([0, 3, slots - 1], [slots, 2 * slots - 1, 7 * slots + 5]):
        position = torch.tensor(position, device=DEVICE)
        tiles = AttendTiles(16 if ON_GPU else 4, 4, 1, stages=1, fan=2, combined=64)
        rest = *norms, inv_freq, semaphores, sinks
        mine, theirs = [[x.clone() for x in caches] for _ in range(2)]
        got = operator.launch_attend(qkv, position, *mine, *rest, **options, tiles=tiles)
        expected = reference.attend_step(qkv, position, *theirs, *rest, **options)
        for x, y in zip((got, *mine), (expected, *theirs)):
            assert_close(x, y, dtype)
        got = got.view(3, heads, -1)
        assert not got[:, 0].any() and got[:, 1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_without_keys_sees_those_of_the_caches_and_writes_none(
    normal, semaphores, dtype, layout
):
    slots = 1000 if ON_GPU else 19
    qkv, caches, norms, inv_freq, options = attention(normal, layout, slots, dtype, False)
    kv_heads, groups, head_dim = layout
    q = qkv[:, : kv_heads * groups * head_dim].contiguous()
    before = [x.clone() for x in caches]
    rest = norms[0], None, inv_freq, semaphores
    for position in ([0, 3, slots - 1], [slots, 2 * slots - 1, 7 * slots + 5]):
        position = torch.tensor(position, device=DEVICE)
        tiles = AttendTiles(16 if ON_GPU else 4, 4, 1, stages=1, fan=2, combined=64)
        got = operator.launch_attend(
            q, position, *caches, *rest, **options, keys=False, tiles=tiles
        )
        expected = reference.attend_step(q, position, *caches, *rest, **options, keys=False)
        assert_close(got, expected, dtype)
        assert all(torch.equal(x, y) for x, y in zip(caches, before))
        alone = operator.launch_attend(
            q[1:2], position[1:2], *(x[1:2].clone() for x in caches), *rest, **options, keys=False,
            tiles=tiles,
        )  # fmt: skip
        assert torch.equal(alone[0], got[1])
    with pytest.raises(ValueError, match="there are no keys"):
        sinks = normal(kv_heads * groups, dtype=dtype)
        operator.attend_step(q, position, *caches, *rest, sinks, **options, keys=False)


def test_attention_needs_no_norms(normal, semaphores):
    slots = 50 if ON_GPU else 7
    qkv, caches, _, inv_freq, options = attention(normal, LAYOUTS[0], slots, torch.float32, False)
    position = torch.tensor([0, 5, 3 * slots], device=DEVICE)
    arguments = (qkv, position, *caches, None, None, inv_freq, semaphores)
    expected = reference.attend_step(
        *[x.clone() if x is not None else x for x in arguments], **options
    )
    assert_close(operator.attend_step(*arguments, **options), expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_s_attention_does_not_depend_on_its_company(normal, semaphores, dtype, monkeypatch):
    slots = 1000 if ON_GPU else 70
    qkv, caches, norms, inv_freq, options = attention(normal, LAYOUTS[-1], slots, dtype, False)
    position = torch.tensor([slots // 2, 5 * slots, 2], device=DEVICE)
    last = (*norms, inv_freq, semaphores)
    copies = [x.clone() for x in caches]
    together = operator.attend_step(qkv, position, *copies, *last, **options)
    for programs in (operator.PROGRAMS, 2 * LAYOUTS[-1][0], 1):
        # Of these one, or two, are to do all parts of a row.
        monkeypatch.setattr(operator, "PROGRAMS", programs)
        for i in range(3):
            row = [x[i : i + 1].clone() for x in (qkv, position, *caches)]
            assert torch.equal(operator.attend_step(*row, *last, **options)[0], together[i])
            assert all(torch.equal(x[0], y[i]) for x, y in zip(row[2:], copies))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    list(itertools.product(LAYOUTS, DTYPES))
    if ON_GPU
    else [(LAYOUTS[0], torch.bfloat16), (LAYOUTS[-1], torch.float32)],
)
@pytest.mark.parametrize("values_are_keys", [False, True] if ON_GPU else [False])
def test_rows_of_one_sequence_have_the_bits_of_steps(
    normal, semaphores, dtype, layout, values_are_keys
):
    slots = 700 if ON_GPU else 11
    qkv, caches, norms, inv_freq, options = attention(normal, layout, slots, dtype, values_are_keys)
    caches = [x[:1].clone() for x in caches]
    last = *norms, inv_freq, semaphores
    # At the beginning and the end of a cache; around a ring's end, and in the midst of a full one.
    for stores, first in (
        (True, 0), (True, slots - 3), (False, 3 * slots - 1), (False, slots + slots // 2)
    ):  # fmt: skip
        position = first + torch.arange(3, device=DEVICE)
        mine, step_by_step = [[x.clone() for x in caches] for _ in range(2)]
        drafts = [torch.full_like(x[:, :1], torch.nan).repeat(3, 1, 1, 1) for x in caches]
        got = operator.attend_drafts(qkv, position, *mine, *drafts, *last, **options, stores=stores)
        for i in range(3):
            row = qkv[i : i + 1], position[i : i + 1]
            expected = operator.attend_step(*row, *step_by_step, *last, **options)
            assert torch.equal(got[i : i + 1], expected), (first, i)
        for x, y, z, draft in zip(mine, step_by_step, caches, drafts):
            assert torch.equal(x, y if stores else z)
            assert torch.equal(draft[:, 0], y[0, position % slots])
        if dtype == torch.float32:
            theirs = [x.clone() for x in caches]
            expected = reference.attend_drafts(
                qkv, position, *theirs, *drafts, *last, **options, stores=stores
            )
            assert_close(got, expected, dtype)
            for x, y in zip(mine, theirs):
                assert_close(x, y, dtype)
    short = [x[:, :2].contiguous() for x in caches]
    with pytest.raises(ValueError, match="3 rows do not fit a cache of 2 slots"):
        operator.attend_drafts(qkv, position, *short, *drafts, *last, **options)


@needs_gpu
def test_a_step_can_be_captured_and_exported(normal, semaphores):
    layout, slots = (2, 4, 128), 300
    qkv, caches, norms, inv_freq, options = attention(normal, layout, slots, torch.bfloat16, False)
    weight = normal(512, 1024, dtype=torch.bfloat16, scale=0.03)
    words, scale = quantize_int4(weight.float())

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, x in zip(("k", "v", "semaphores"), (*caches, semaphores)):
                self.register_buffer(name, x.clone())

        def forward(self, qkv, position):
            x = torch.ops.tokenloop.attend_step(
                qkv, position, self.k, self.v, *norms, inv_freq, self.semaphores, **options
            )
            return torch.ops.tokenloop.linear(x, words, scale, None, self.semaphores)

    position = torch.tensor([3, 299, 1000], device=DEVICE)
    step = Step()
    expected = step(qkv, position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(qkv, position)
    graph.replay()
    assert torch.equal(got, expected)
    assert torch.equal(torch.export.export(step, (qkv, position)).module()(qkv, position), expected)
