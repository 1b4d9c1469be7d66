"""The Triton kernels of a decode step give what their references give: on a GPU at the networks'
sizes, else in Triton's interpreter with odd small ones."""

import pytest
import torch

ON_GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime import interpreter  # noqa: E402

from tokenloop.models.kernels import cuda, reference  # noqa: E402
from tokenloop.models.kernels.packing import pack, quantize_int4, quantize_int8, unpack  # noqa: E402
from tokenloop.models.kernels.tiles import AttendTiles, LinearTiles  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
# A rounding to bfloat16 is 2^-8 of a value; float32 sums differ in their order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
EPS = 1e-6
PLAIN = LinearTiles(False, 8, 512 if ON_GPU else 32)
DOT = LinearTiles(True, 64 if ON_GPU else 16, 64 if ON_GPU else 32, stages=2)
SPLIT = DOT._replace(splits=3)
INPUTS = [2048, 5376, 1000] if ON_GPU else [72]
OUTPUTS = 1537 if ON_GPU else 19
LAYOUTS = (
    [(1, 4, 256), (4, 8, 512), (16, 2, 256), (8, 5, 128)] if ON_GPU else [(1, 4, 16), (2, 3, 8)]
)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def interpreted_ranges():
    """NumPy 2.4 no longer takes an array of one element as a loop's end, which the interpreter's
    scalars are."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
        yield


@pytest.fixture
def counters():
    """Zeros, which every kernel must leave zero."""
    counters = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
    yield counters
    assert not counters.any()


@pytest.fixture
def normal():
    """A function (*shape, dtype, scale) -> normal numbers on the device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0):
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    return normal


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    difference = (got.float() - expected.float()).abs().max()
    assert difference <= TOLERANCE[dtype] * max(1.0, expected.float().abs().max())


def quantized(weight: torch.Tensor, bits: int, group_size: int = 0):
    return quantize_int8(weight) if bits == 8 else quantize_int4(weight, group_size)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [129, 256, 384])
def test_packed_values_come_back(bits, inputs):
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, inputs), dtype=torch.int32)
    words = pack(values, bits)
    assert words.dtype == torch.int16 and words.shape[1] % 64 == 0
    assert torch.equal(unpack(words, bits, inputs), values)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="bits = 3"):
        pack(torch.zeros(1, 256, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="128 inputs of 4 bits"):
        pack(torch.zeros(1, 128, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="group_size = 96 .* 256 inputs"):
        quantize_int4(torch.zeros(1, 256), 96)
    with pytest.raises(ValueError, match="63 words are not 256 inputs"):
        reference.dequantize(torch.zeros(1, 63, dtype=torch.int16), None, 256)


def test_what_the_kernels_cannot_read_is_refused(normal, counters):
    x, weight = normal(3, 256, dtype=torch.bfloat16), normal(8, 256, dtype=torch.bfloat16)
    words, scale = quantize_int4(weight)
    caches = [normal(3, 5, 2, 8) for _ in range(2)]
    position, inv_freq = torch.zeros(3, dtype=torch.int64, device=DEVICE), normal(4)
    for message, function, arguments in (
        ("weight of strides", cuda.linear, (x[:, :8].contiguous(), weight.T, None)),
        ("activations are torch.float32", cuda.linear, (x.float(), words, scale)),
        ("scale of shape None: 8 rows of 4 bits need", cuda.linear, (x, words, None)),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments, None, counters)
    with pytest.raises(ValueError, match=r"\(3, 40\) do not fit caches .* \(3, 5, 2, 8\)"):
        norms = (None, None, inv_freq, counters)
        cuda.attend_step(normal(3, 40), position, *caches, *norms, scale=1.0, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [PLAIN, DOT, SPLIT], ids=["plain", "dot", "split"])
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
def test_linear_is_the_reference(normal, counters, dtype, tiles, activation):
    for inputs in INPUTS:
        x = normal(3, inputs, dtype=dtype)
        weight = normal(2 * OUTPUTS, inputs, dtype=dtype, scale=inputs**-0.5)
        for bias, soft_cap, wide in ((None, 0.0, False), (normal(2 * OUTPUTS), 3.0, True)):
            arguments = (x, weight, None, bias, counters)
            options = {"activation": activation, "soft_cap": soft_cap, "wide": wide}
            expected = reference.linear(*arguments, **options)
            got = cuda.launch_linear(*arguments, **options, tiles=tiles)[1]
            assert_close(got, expected, dtype)


@pytest.mark.parametrize("bits, group_size", [(8, 0), (4, 64), (4, 128), (4, 256)])
@pytest.mark.parametrize("activation, splits", [(None, 1), ("silu", 2)])
def test_linear_of_integer_weights_is_the_reference_s_in_float32(
    normal, counters, bits, group_size, activation, splits
):
    inputs = 5376 if ON_GPU else 512 if group_size == 256 else 384
    x = normal(3, inputs, dtype=torch.bfloat16)
    weight = normal(2 * OUTPUTS, inputs, scale=inputs**-0.5)
    arguments = (x, *quantized(weight, bits, group_size), None, counters)
    options = {"activation": activation, "wide": True}
    expected = reference.linear(*arguments, **options)
    got = cuda.launch_linear(*arguments, **options, tiles=DOT._replace(splits=splits))[1]
    assert_close(got, expected, torch.float32)


@pytest.mark.parametrize(
    "bits, tiles",
    # Tiles of integers are other ones for few rows and for many: those are the operator's own.
    [(0, PLAIN), (0, DOT), (0, SPLIT), (8, None), (4, None)],
    ids=["plain", "dot", "split", "int8", "int4"],
)
@pytest.mark.parametrize("rows", [9, 33] if ON_GPU else [18])
def test_a_row_of_a_batch_is_that_row_alone(normal, counters, bits, tiles, rows):
    inputs = 5376 if ON_GPU else 384
    x = normal(rows, inputs, dtype=torch.bfloat16)
    weight, scale = normal(OUTPUTS, inputs, scale=inputs**-0.5), None
    if bits:
        weight, scale = quantized(weight, bits, 128)
    else:
        weight = weight.bfloat16()
    together = cuda.launch_linear(x, weight, scale, None, counters, wide=True, tiles=tiles)[1]
    for i in (0, rows // 2, rows - 1):
        row = x[i : i + 1]
        alone = cuda.launch_linear(row, weight, scale, None, counters, wide=True, tiles=tiles)[1]
        # NumPy's products, the interpreter's, depend on the company.
        difference = (alone[0] - together[i]).abs().max()
        assert difference == 0 if ON_GPU else difference < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("with_post, with_scalar", [(False, False), (True, False), (True, True)])
def test_norms_are_the_reference_s(normal, dtype, offset, with_post, with_scalar):
    size = 5376 if ON_GPU else 40
    x, branch = normal(3, size, dtype=dtype), normal(3, size, dtype=dtype)
    post = normal(size, dtype=dtype) if with_post else None
    scalar = normal(1, dtype=dtype) if with_scalar else None
    weight = normal(size, dtype=dtype)
    options = {"eps": EPS, "offset": offset}
    expected = reference.add_norm(x, branch, post, scalar, weight, **options)
    for got, right in zip(cuda.add_norm(x, branch, post, scalar, weight, **options), expected):
        assert_close(got, right, dtype)
    assert_close(cuda.norm(x, weight, **options), reference.norm(x, weight, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_within_a_linear_layer_is_the_norm_alone(normal, counters, monkeypatch, dtype):
    size, rows = (640, 4) if ON_GPU else (40, 3)
    x, branch = normal(rows, size, dtype=dtype), normal(rows, size, dtype=dtype)
    post, weight = normal(size, dtype=dtype), normal(size, dtype=dtype)
    scalar, matrix = normal(1, dtype=dtype), normal(48, size, dtype=dtype)
    options = {"eps": EPS, "offset": 1.0, "activation": "silu"}

    def both():
        last = (matrix, None, None, counters)
        total, y = cuda.add_norm_linear(x, branch, post, scalar, weight, *last, **options)
        return total, y, cuda.norm_linear(x, weight, *last, **options)

    within = both()
    monkeypatch.setattr(cuda, "SHARED_NORM", 0)
    for got, expected in zip(within, both()):
        assert torch.equal(got, expected)
    last = (matrix, None, None, counters)
    expected = reference.add_norm_linear(x, branch, post, scalar, weight, *last, **options)
    for got, right in zip(within, expected):
        assert_close(got, right, dtype)


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
    }  # fmt: skip
    return qkv, caches, norms, inv_freq, options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("values_are_keys", [False, True])
def test_attention_and_the_caches_are_the_reference_s(
    normal, counters, dtype, layout, values_are_keys
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
        got = cuda.launch_attend(
            qkv, position, *mine, *norms, inv_freq, counters, **options, tiles=tiles
        )
        expected = reference.attend_step(
            qkv, position, *theirs, *norms, inv_freq, counters, **options
        )
        for x, y in zip((got, *mine), (expected, *theirs)):
            assert_close(x, y, dtype)
        new = (torch.arange(3, device=DEVICE), position % slots)
        for x, y in zip(mine, caches):
            x.index_put_(new, y[new])
            assert torch.equal(x, y), "another slot than the new one was written"


def test_attention_needs_no_norms(normal, counters):
    slots = 50 if ON_GPU else 7
    qkv, caches, _, inv_freq, options = attention(normal, LAYOUTS[0], slots, torch.float32, False)
    position = torch.tensor([0, 5, 3 * slots], device=DEVICE)
    arguments = (qkv, position, *caches, None, None, inv_freq, counters)
    expected = reference.attend_step(
        *[x.clone() if x is not None else x for x in arguments], **options
    )
    assert_close(cuda.attend_step(*arguments, **options), expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_s_attention_does_not_depend_on_its_company(normal, counters, dtype, monkeypatch):
    slots = 1000 if ON_GPU else 70
    qkv, caches, norms, inv_freq, options = attention(normal, LAYOUTS[-1], slots, dtype, False)
    position = torch.tensor([slots // 2, 5 * slots, 2], device=DEVICE)
    last = (*norms, inv_freq, counters)
    copies = [x.clone() for x in caches]
    together = cuda.attend_step(qkv, position, *copies, *last, **options)
    for programs in (cuda.PROGRAMS, 2 * LAYOUTS[-1][0], 1):
        # Of these one, or two, are to do all parts of a row.
        monkeypatch.setattr(cuda, "PROGRAMS", programs)
        for i in range(3):
            row = [x[i : i + 1].clone() for x in (qkv, position, *caches)]
            assert torch.equal(cuda.attend_step(*row, *last, **options)[0], together[i])
            assert all(torch.equal(x[0], y[i]) for x, y in zip(row[2:], copies))


@needs_gpu
def test_a_step_can_be_captured_and_exported(normal, counters):
    layout, slots = (2, 4, 128), 300
    qkv, caches, norms, inv_freq, options = attention(normal, layout, slots, torch.bfloat16, False)
    weight = normal(512, 1024, dtype=torch.bfloat16, scale=0.03)
    words, scale = quantize_int4(weight.float())

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, x in zip(("k", "v", "counters"), (*caches, counters)):
                self.register_buffer(name, x.clone())

        def forward(self, qkv, position):
            x = torch.ops.tokenloop.attend_step(
                qkv, position, self.k, self.v, *norms, inv_freq, self.counters, **options
            )
            return torch.ops.tokenloop.linear(x, words, scale, None, self.counters)

    position = torch.tensor([3, 299, 1000], device=DEVICE)
    step = Step()
    expected = step(qkv, position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(qkv, position)
    graph.replay()
    assert torch.equal(got, expected)
    assert torch.equal(torch.export.export(step, (qkv, position)).module()(qkv, position), expected)
