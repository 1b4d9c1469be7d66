"""Linear layers over a packed chunk give what their reference gives, and a token's result has the
same bits in any chunk."""

import itertools

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES, ON_GPU, assert_close, quantized
from tokenloop.models.kernels.linear.packing import leaves_scale, quantize_int4, quantize_int8
from tokenloop.models.kernels.linear_chunk import operator, reference
from tokenloop.models.kernels.linear_chunk.chunk_tiles import ChunkTiles, WordTiles, chunk_tiles

TILES = {
    "pointers": ChunkTiles(128, 64, 64, 8, 3),
    "narrow": ChunkTiles(64, 16, 128, 4, 4),
    "descriptors": ChunkTiles(128, 128, 64, 8, 3, descriptors=True),
    "halves": ChunkTiles(128, 128, 64, 8, 3, descriptors=True, parts=2),
    "nested": ChunkTiles(64, 64, 64, 4, 3, descriptors=True, flatten=False),
    "extra": ChunkTiles(128, 128, 64, 4, 3, True, extra=32),
    "extra nested": ChunkTiles(64, 64, 64, 4, 3, True, flatten=False, extra=64),
    "beside": ChunkTiles(64, 32, 128, 4, 4, extra=16),
    "specialized": ChunkTiles(128, 128, 64, 4, 3, True, flatten=False, specialize=True),
}


@pytest.fixture(autouse=True)
def memory_of_descriptors():
    if ON_GPU:
        import triton

        triton.set_allocator(
            lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda")
        )


def counted(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("outputs, inputs", [(48, 72), (37, 50)])
def test_results_are_the_reference_s(normal, dtype, activation, outputs, inputs):
    rows = outputs * (1 if activation is None else 2)
    x = normal(70, inputs, dtype=dtype)
    weight = normal(rows, inputs, dtype=dtype, scale=inputs**-0.5)
    for bias, out_float32 in ((None, False), (normal(rows, dtype=dtype), True)):
        options = {"activation": activation, "out_float32": out_float32}
        arguments = x, weight, None, bias, counted(70)
        got = operator.linear_chunk(*arguments, **options)
        assert_close(got, reference.linear_chunk(*arguments, **options), dtype)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("form", TILES)
def test_bits_do_not_depend_on_the_tiles(normal, form, activation):
    outputs, inputs = (512, 1536) if ON_GPU else (136, 136)
    weight = normal(outputs * (1 if activation is None else 2), inputs, dtype=torch.bfloat16)
    if TILES[form].extra and TILES[form].descriptors and activation is not None:
        pytest.skip("a gated layer's tiles have no outputs beside")
    x, options = normal(200, inputs, dtype=torch.bfloat16), {"activation": activation}
    expected = operator.launch_linear_chunk(x, weight, None, counted(200), **options)
    got = operator.launch_linear_chunk(
        x, weight, None, counted(200), **options, tiles=TILES[form]
    )  # fmt: skip
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [0, 4, 8, "fp8"])
def test_bits_do_not_depend_on_the_chunk(normal, monkeypatch, dtype, bits):
    if bits and dtype == torch.float32:
        pytest.skip("packed weights take bfloat16")
    weight, scale = normal(64, 256, dtype=dtype), None
    if bits:
        weight, scale = quantized(weight, bits)
        # Chunks of 300 and 200 tokens make bfloat16 weights first, the others in their tiles.
        monkeypatch.setattr(operator, "IN_TILE", 128)
    x = normal(300, 256, dtype=dtype)
    whole = operator.linear_chunk(x, weight, scale, None, counted(300))
    # Tokens that are beyond the count may be anything.
    for begin, tokens, count in ((0, 64, 64), (64, 128, 128), (128, 128, 70), (64, 200, 191)):
        part = x[begin : begin + tokens].clone()
        part[count:] = float("nan")
        got = operator.linear_chunk(part, weight, scale, None, counted(count))
        assert torch.equal(got[:count], whole[begin : begin + count])


@pytest.mark.parametrize("form", ["pointers", "descriptors", "words"])
def test_a_chunk_without_tokens_is_left_alone(normal, form):
    x = normal(64, 256, dtype=torch.bfloat16)
    weight = normal(32, 256, dtype=torch.bfloat16)
    if form == "words":
        operator.launch_words(x, *quantize_int4(weight), None, counted(0))
    else:
        operator.launch_linear_chunk(x, weight, None, counted(0), tiles=TILES[form])


@pytest.mark.parametrize(
    "bits, group, outputs, inputs",
    [
        (4, 64, 70, 256), (4, 32, 33, 416), (4, 64, 33, 448), (8, 0, 70, 200), (8, 32, 70, 224),
        ("fp8", 0, 70, 200), ("fp8", 128, 70, 384),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scales", [None, torch.float16, torch.float32])
def test_dequantized_weights_are_the_reference_s(normal, bits, group, outputs, inputs, scales):
    weight, scale = quantized(normal(outputs, inputs), bits, group)
    if scales is not None:
        # A checkpoint's have more digits than bfloat16.
        scale = (scale.float() * 1.003).to(scales)
    got = operator.dequantize(weight, scale, inputs)
    assert torch.equal(got, reference.dequantize(weight, scale, inputs))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "bits, group, inputs",
    [
        (4, 64, 256), (4, 32, 416), (4, 64, 448), (8, 0, 200), (8, 32, 224), ("fp8", 0, 200),
        ("fp8", 128, 384),
    ],
)  # fmt: skip
def test_weights_dequantized_in_the_tile_give_the_same_bits(
    normal, bits, group, inputs, activation
):
    weight, scale = quantized(normal(128 if activation else 64, inputs), bits, group)
    x, options = normal(70, inputs, dtype=torch.bfloat16), {"activation": activation}
    bias = normal(len(weight), dtype=torch.bfloat16)
    dense = operator.dequantize(weight, scale, inputs)
    left = scale if leaves_scale(weight, scale) else None
    expected = operator.launch_linear_chunk(x, dense, bias, counted(70), **options, scale=left)
    for tiles in (None, WordTiles(64, 64), WordTiles(16, 64)):
        got = operator.launch_words(x, weight, scale, bias, counted(70), **options, tiles=tiles)
        if ON_GPU:
            assert torch.equal(got, expected)
        # The interpreter's sums are those of its blocks of inputs.
        assert_close(got, expected, torch.bfloat16)
        right = reference.linear_chunk(x, weight, scale, bias, counted(70), **options)
        assert_close(got, right, torch.bfloat16)


@pytest.mark.parametrize("form", TILES)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_every_tile_multiplies_by_the_scales_of_rows(normal, form, activation):
    if TILES[form].extra and TILES[form].descriptors and activation is not None:
        pytest.skip("a gated layer's tiles have no outputs beside")
    outputs, inputs = (512, 1536) if ON_GPU else (72, 72)
    rows = outputs * (1 if activation is None else 2)
    x, weight = (normal(n, inputs, dtype=torch.bfloat16) for n in (100, rows))
    scale, bias = normal(1, rows, scale=inputs**-0.5), normal(rows, dtype=torch.bfloat16)
    options = {"activation": activation, "out_float32": True}
    given = {"tiles": TILES[form], "scale": scale}
    got = operator.launch_linear_chunk(x, weight, bias, counted(100), **options, **given)
    scaled = weight.float() * scale.T
    expected = reference.linear_chunk(x, scaled, None, bias, counted(100), **options)
    assert_close(got, expected, torch.float32)


def test_weights_may_be_rows_of_a_larger_matrix(normal):
    x, weight = normal(64, 128, dtype=torch.bfloat16), normal(96, 128, dtype=torch.bfloat16)
    whole = operator.linear_chunk(x, weight, None, None, counted(64))
    part = operator.linear_chunk(x, weight[32:64], None, None, counted(64))
    assert torch.equal(part, whole[:, 32:64])
    weight, scale = quantized(weight, "fp8")
    whole = operator.linear_chunk(x, weight, scale, None, counted(64))
    part = operator.linear_chunk(x, weight[32:64], scale[:, 32:64], None, counted(64))
    assert torch.equal(part, whole[:, 32:64])


def test_what_does_not_fit_is_refused(normal):
    x, weight = normal(64, 128, dtype=torch.bfloat16), normal(96, 128, dtype=torch.bfloat16)
    for arguments in ((x, weight.float(), None), (x[:, :64].contiguous(), weight, None)):
        with pytest.raises(ValueError):
            operator.linear_chunk(*arguments, None, counted(64))
    with pytest.raises(ValueError):
        operator.linear_chunk(x, weight.T, None, None, counted(64))
    with pytest.raises(ValueError):
        operator.launch_linear_chunk(
            x, weight, None, counted(64), activation="silu", tiles=TILES["extra"]
        )
    with pytest.raises(ValueError):
        operator.linear_chunk(x.float(), *quantize_int8(weight), None, counted(64))
    with pytest.raises(ValueError, match="scale of shape .1, 64. for 96 rows"):
        operator.launch_linear_chunk(x, weight, None, counted(64), scale=normal(1, 64))
    with pytest.raises(ValueError, match="the weight with a scale is torch.bfloat16"):
        operator.linear_chunk(x, weight, normal(1, 96), None, counted(64))


def test_tiles_fit_shared_memory_and_descriptors_have_rows_of_whole_16_bytes():
    sizes = (2560, 2564, 5376), (2560, 2562), (64, 128, 192, 512, 1024, 8192), (False, True)
    for outputs, inputs, tokens, gated, wide in itertools.product(*sizes, (False, True)):
        tiles = chunk_tiles(tokens, outputs, inputs, torch.bfloat16, gated, wide)
        assert not tiles.descriptors or (outputs % 8 == 0 and inputs % 8 == 0)
        assert not tiles.extra or tiles.descriptors != gated
        rows = tiles.block_t + (tiles.block_n + tiles.extra) * (2 if gated else 1)
        size = tiles.stages * rows * tiles.block_k * 2
        if tiles.descriptors:
            size += (
                tiles.block_t * (tiles.block_n + tiles.extra) // tiles.parts * (4 if wide else 2)
            )
        assert tiles.stages >= 3 and size <= 226 * 1024
