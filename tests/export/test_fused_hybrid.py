"""A hybrid whose rows were put in the kernels' order computes what it did, and so does its decode
step: on a GPU, else in Triton's interpreter."""

import copy

import pytest
import torch

ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="triton is not installed")

from tests.models.eager import assert_near, prompt  # noqa: E402
from tests.models.tiny_models import PER_LAYER, ours  # noqa: E402
from tokenloop.export.checkpoint import load_weights, open_checkpoint  # noqa: E402
from tokenloop.export.errors import ExportError  # noqa: E402
from tokenloop.export.launches.cuda_drafts import draft_methods  # noqa: E402
from tokenloop.export.launches.cuda_step import CudaStep  # noqa: E402
from tokenloop.export.packed_weights import (  # noqa: E402
    pack_blocks,
    pack_head,
    pack_inputs,
    quantized,
)  # noqa: E402
from tokenloop.models import qwen3_5  # noqa: E402
from tokenloop.models.kernels.linear.reference import dequantize  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
LAYOUTS = ["qwen3_5_text", "qwen3_next"]
EXPERTS = "qwen3_5_moe_text"
# The interpreter takes its time.
SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}

pytestmark = pytest.mark.usefixtures("one_thread", "interpreted_ranges")


@pytest.fixture(scope="module")
def networks(make_hybrid_checkpoint):
    """A function: layout, rows -> two equal networks of so many rows."""

    def make(layout: str, batch: int):
        checkpoint = open_checkpoint(make_hybrid_checkpoint(layout, **SMALL))
        with torch.device("meta"):
            network = qwen3_5.Network(qwen3_5.Config.from_dict(checkpoint.config), 40, batch)
        load_weights(network, checkpoint, qwen3_5.checkpoint_name)
        network.eval().requires_grad_(False).to(DEVICE)
        return network, copy.deepcopy(network)

    return make


def test_a_packed_network_of_short_convolutions_computes_what_it_did():
    plain, packed = ours("lfm2"), ours("lfm2")
    pack_blocks(packed, 0)
    chunk, step = (prompt(7), torch.arange(7)), (torch.tensor([[3]]), torch.tensor([7]))
    assert_near(packed.prefill(*chunk), plain.prefill(*chunk))
    assert_near(packed.decode(*step), plain.decode(*step))


@pytest.mark.parametrize("case", [PER_LAYER, "gemma3n_text"])
def test_integer_weights_are_all_that_a_network_of_per_layer_inputs_has(case):
    plain, rounded = ours(case), ours(case)
    pack_blocks(rounded, 8)
    assert pack_inputs(rounded, 8).projection.scale is not None
    pack_head(rounded, 8)
    linears = [name for name, x in rounded.named_modules() if type(x) is torch.nn.Linear]
    # What mixes streams is small, and stays.
    assert all({"altup", "laurel", "streams"} & set(name.split(".")) for name in linears)
    chunk, step = (prompt(7), torch.arange(7)), (torch.tensor([[3]]), torch.tensor([7]))
    for method, given in (("prefill", chunk), ("decode", step)):
        expected = getattr(plain, method)(*given)
        difference = getattr(rounded, method)(*given) - expected
        assert 0 < difference.abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("layout", [*LAYOUTS, EXPERTS])
def test_an_arranged_network_computes_what_it_did(networks, layout):
    plain, arranged = networks(layout, 2)
    pack_blocks(arranged, 0)
    assert not any("qkvz" in name for name, _ in arranged.named_parameters())
    for row in (0, 1):
        chunk = prompt(7 + row), torch.arange(7 + row), torch.tensor([row])
        chunk = [x.to(DEVICE) for x in chunk]
        assert_near(arranged.prefill(*chunk), plain.prefill(*chunk))
    step = torch.tensor([[3], [5]], device=DEVICE), torch.tensor([7, 8], device=DEVICE)
    assert_near(arranged.decode(*step), plain.decode(*step))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_integer_weights_are_near_what_they_stand_for(networks, layout):
    plain, rounded = networks(layout, 1)
    pack_blocks(rounded, 8)
    chunk = prompt(9).to(DEVICE), torch.arange(9, device=DEVICE)
    expected = plain.prefill(*chunk)
    difference = rounded.prefill(*chunk) - expected
    assert 0 < difference.abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(("layout", "batch"), zip([*LAYOUTS, EXPERTS], [1, 3, 2]))
def test_a_fused_step_gives_the_networks_logits(networks, layout, batch):
    plain, changed = networks(layout, batch)
    decode = CudaStep(changed)
    for step in range(2):
        token = torch.tensor([[7 + step], [9], [step]], device=DEVICE)[:batch]
        # A row that begins anew, and one that stays behind.
        position = torch.tensor([step, 0, max(step - 1, 0)], device=DEVICE)[:batch]
        actual = decode(changed.embed(token), position)
        assert_near(actual, plain.decode(token, position))
    assert not decode.kernel_semaphores.any()


@pytest.mark.parametrize("layout", ["qwen3_next", EXPERTS])
def test_no_two_tensors_of_a_fused_step_share_memory(networks, layout):
    decode = CudaStep(networks(layout, 1)[0])
    tensors = [*decode.parameters(), *decode.buffers()]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert len(addresses) == len(tensors) > 20


@pytest.mark.parametrize(("inputs", "group_size"), [(256, 128), (576, 64)])
def test_groups_of_4_bits_are_128_inputs_or_64(inputs, group_size):
    weight = torch.randn(8, inputs, generator=torch.Generator().manual_seed(0))
    words, scale = quantized([weight], 4)
    assert scale.shape == (inputs // group_size, 8)
    error = (dequantize(words, scale, inputs).float() - weight).abs()
    groups = scale.T.float().repeat_interleave(group_size, 1)
    assert (error <= 0.51 * groups).all()


@pytest.mark.parametrize("inputs", [128, 200])
def test_inputs_that_are_no_whole_groups_of_4_bits_are_refused(inputs):
    with pytest.raises(ExportError, match=f"--quant int4 does not fit a linear layer of {inputs}"):
        quantized([torch.zeros(8, inputs)], 4)


def test_drafts_are_refused_for_a_state_that_goes_on(networks):
    network, _ = networks("qwen3_5_text", 1)
    with pytest.raises(ExportError, match="is 3; this network's delta nets have a state that"):
        draft_methods(CudaStep(network), network.model, 3, 48, 40)
