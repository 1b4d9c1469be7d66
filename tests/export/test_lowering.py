"""Methods lowered to launches give what their operators give, on memory that tensors share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from tests.compile_kernels import ASKED, EARLY  # noqa: E402
from tests.export.replay import replay  # noqa: E402
from tests.export.test_cuda_prefill import chunk_of  # noqa: E402
from tests.export.test_fused import DEVICE, SHAPE  # noqa: E402
from tests.models.eager import prompt  # noqa: E402
from tests.models.tiny_models import PER_LAYER, ROW_OF, make_reference, network_of  # noqa: E402
from tests.sampler.test_restrict import random_bits  # noqa: E402
from tokenloop.export.errors import ExportError  # noqa: E402
from tokenloop.export.launches.cuda_prefill import CudaPrefill  # noqa: E402
from tokenloop.export.launches.cuda_step import CudaStep  # noqa: E402
from tokenloop.export.launches.embedded import split  # noqa: E402
from tokenloop.export.launches.lowering import Pointer, Slot, lower, names_of, plan  # noqa: E402
from tokenloop.export.launches.methods import selection_methods  # noqa: E402
from tokenloop.export.tensors import is_state, tensors_of  # noqa: E402
from tokenloop.models import qwen3  # noqa: E402
from tokenloop.models.kernels.launch.dependent_launch import WAITING  # noqa: E402
from tokenloop.models.kernels.linear_chunk.chunk_tiles import IN_TILE  # noqa: E402
from tokenloop.sampler.restrict import adjust, mask  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "interpreted_ranges")


def make_network(model_type: str = "qwen3", batch: int = 2):
    config = qwen3.Config.from_dict(SHAPE | {"model_type": model_type})
    torch.manual_seed(0)
    network = qwen3.Network(config, 9, batch).requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.to(DEVICE)


def per_layer_network(slots: int = 9, rows: int = 2):
    """One with inputs of the layers' own, whose last layers have no keys."""
    hf = make_reference(PER_LAYER, head_dim=32, global_head_dim=64)
    return network_of(ROW_OF[PER_LAYER], hf, slots, rows).to(DEVICE)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe", PER_LAYER])
def test_a_lowered_step_gives_the_steps_logits_and_state(model_type):
    network = per_layer_network() if model_type == PER_LAYER else make_network(model_type)
    size = network.model.embedded_size
    step = CudaStep(network)
    weights, _, state = tensors_of(step)
    tensors = {name: x.clone() for name, x in (weights | state).items()}
    example = torch.zeros(2, 1, size), torch.zeros(2, dtype=torch.int64)
    (lowered,) = lower(step, [tuple(x.to(DEVICE) for x in example)], names_of(weights | state))
    with torch.no_grad():
        # A step of the last of them takes Triton's interpreter seven seconds.
        for position in (2,) if model_type == PER_LAYER else range(3):
            hidden = torch.randn(2, 1, size, device=DEVICE)
            where = torch.tensor([position, position + 2], device=DEVICE)
            expected = step(hidden, where)
            (logits,) = replay(lowered, [hidden, where], tensors)
            assert torch.equal(logits, expected)
    assert all(torch.equal(tensors[name], x) for name, x in state.items())
    assert any(x.any() for x in state.values())


@pytest.mark.parametrize("bits", [0, 8])
def test_a_lowered_chunk_reads_nothing_before_it_is_written(bits):
    """What a kernel reads before it waits for others is a weight that no kernel writes, or the host
    or a kernel that none overlaps wrote it. Chunks of so many tokens make floats of integers."""
    network = per_layer_network(150, 4).to(torch.bfloat16 if bits else torch.float32)
    method = CudaPrefill(CudaStep(network, bits), network)
    tensors, _, _ = tensors_of(method)
    given = chunk_of({2: prompt(37, 2), 0: prompt(5, 0)}, {2: 0, 0: 0}, 64, IN_TILE)
    (lowered,) = lower(method, [tuple(x.to(DEVICE) for x in given)], names_of(tensors))
    writers, early, made = [], 0, 0
    for launch in lowered.launches:
        kernel, others = launch.kernel.fn.__name__, []
        for name, x in zip(launch.kernel.arg_names, launch.arguments):
            if not isinstance(x, Pointer):
                continue
            if name not in EARLY - ASKED.get(kernel, set()):
                others.append(x)
            elif x.memory == "workspace":
                made += 1
                last = next(kernel for kernel, y in reversed(writers) if overlap(x, y))
                assert last not in WAITING, f"{kernel} reads {name} before {last} has written it"
            else:
                assert x.memory == "input" or not is_state(x.which)
                early += 1
        writers += [(kernel, x) for x in others]
    assert early > 100 and made >= 2


def overlap(x: Pointer, y: Pointer) -> bool:
    """Whether two tensors have memory in common."""
    (begin, end), (other, other_end) = map(extent, (x, y))
    return x[:2] == y[:2] and begin < other_end and other < end


def extent(x: Pointer) -> tuple[int, int]:
    """The first byte of a tensor, and the one after its last."""
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride))
    return x.offset, x.offset + (last + 1) * x.dtype.itemsize


def test_a_method_with_an_operation_that_no_kernel_does_is_refused():
    class Doubled(torch.nn.Module):
        def forward(self, x):
            return x * 2

    with pytest.raises(ExportError, match="aten.mul.Tensor, which no kernel"):
        lower(Doubled(), [(torch.zeros(3),)], {})


@pytest.mark.parametrize("has_own", [False, True], ids=["embeddings", "and the layers' own"])
def test_lowered_selection_writes_the_token_and_its_embedding(has_own):
    network = per_layer_network() if has_own else make_network()
    methods = selection_methods(network.model, 2, network.config.vocab_size, 9)
    methods = {name: methods[name] for name in ("greedy", "greedy_embed", "greedy_row", "embed")}
    lookup, given = methods.pop("embed")
    tensors, _, _ = tensors_of(*(method for method, _ in methods.values()))
    for name, (method, inputs) in methods.items():
        (lowered,) = lower(method, [tuple(inputs.values())], names_of(tensors))
        values = [torch.randn_like(x) if x.is_floating_point() else x for x in inputs.values()]
        values = [x.to(DEVICE) for x in values]
        assert replay(lowered, values, tensors) == []
        token = values[1]
        assert torch.equal(token[:, 0], values[0].argmax(-1)), name
        if name == "greedy_embed":
            expected = network.embed(token)[:, 0]
            x, own = split(values[2], network.config.hidden_size)
            parts = (x,) if own is None else (x, own)
            assert torch.equal(torch.cat(parts, 1), expected)
            (lowered,) = lower(lookup, [tuple(given.values())], names_of(tensors))
            assert torch.equal(replay(lowered, [token], tensors)[0], values[2])


@pytest.mark.parametrize("suffix", ["", "_row"])
def test_lowered_changes_are_made_in_the_logits_that_are_given(suffix):
    rows, network = (1 if suffix else 2), make_network()
    methods = selection_methods(network.model, 2, 37, 9)
    logits = torch.randn(rows, 37, generator=torch.Generator().manual_seed(0))
    bits = random_bits(rows, 37)
    ids = torch.full((rows, 37), -1)
    ids[:, :2] = torch.tensor([5, 36])
    scale, bias = torch.full((rows, 37), 1.5), torch.full((rows, 37), 0.25)
    expected = {
        "mask": mask(logits, bits),
        "adjust": adjust(logits, ids[:, :2], scale[:, :2], bias[:, :2]),
    }
    for name, changes in {"mask": [bits], "adjust": [ids, scale, bias]}.items():
        method, inputs = methods[name + suffix]
        assert [x.shape for x in inputs.values()] == [x.shape for x in (logits, *changes)]
        (lowered,) = lower(method, [tuple(inputs.values())], {})
        given = logits.to(DEVICE, copy=True)
        assert replay(lowered, [given, *(x.to(DEVICE) for x in changes)], {}) == []
        assert torch.equal(given.cpu(), expected[name]), name


slots = st.lists(
    st.builds(
        lambda size, first, length: Slot(size, first, first + length),
        st.integers(1, 5000), st.integers(0, 20), st.integers(0, 8),
    ),
    max_size=25,
)  # fmt: skip


@settings(deadline=None)
@given(slots)
def test_tensors_that_are_needed_at_once_do_not_overlap(slots):
    offsets, total = plan(slots)
    for i, (a, x) in enumerate(zip(slots, offsets)):
        assert x % 256 == 0 and x + a.size <= total
        for b, y in list(zip(slots, offsets))[:i]:
            together = a.first <= b.last and b.first <= a.last
            assert not together or x + a.size <= y or y + b.size <= x
    assert total <= sum(-(-slot.size // 256) * 256 for slot in slots)
