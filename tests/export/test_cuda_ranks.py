"""A network that is divided by ranks gives on CUDA what the whole one gives, with the same bits on
all ranks, and its prompts do not depend on how they are cut."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("triton", reason="triton is not installed")

from tests.export import virtual_ranks  # noqa: E402
from tests.models.tiny_models import ROW_OF, make_reference, network_of  # noqa: E402
from tokenloop.export import tensor_parallel  # noqa: E402
from tokenloop.export.errors import ExportError  # noqa: E402
from tokenloop.export.launches.cuda_prefill import CudaPrefill  # noqa: E402
from tokenloop.export.launches.cuda_step import CudaStep  # noqa: E402
from tokenloop.export.launches.lowering import lower, names_of  # noqa: E402
from tokenloop.export.launches.methods import Lookup, prefill_inputs  # noqa: E402
from tokenloop.export.packed_weights import parts_by_storage  # noqa: E402
from tokenloop.export.tensors import tensors_of, write_shards  # noqa: E402

RANKS, LENGTH = 2, 12
CASES = {
    "qwen3": {"head_dim": 32},
    "gemma4_text, 5 sliding to 1 full": {
        "head_dim": 32, "global_head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_global_key_value_heads": 1, "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_moe": {"head_dim": 32},
}  # fmt: skip
GEMMA = "gemma3_text, two key heads, all sliding"
pytestmark = [
    pytest.mark.usefixtures("one_thread", "interpreted_ranges"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="ranks are of the interpreter"),
]


def divided(case: str, batch: int = 1) -> tuple[torch.nn.Module, list, list[CudaStep]]:
    """A network, and its ranks' networks and steps."""
    hf = make_reference(case, **CASES.get(case, {"head_dim": 32}))
    plain, whole = (network_of(ROW_OF[case], hf, LENGTH, batch) for _ in range(2))
    tensor_parallel.check_launches(whole, RANKS)
    networks = tensor_parallel.shards(whole, RANKS, True)
    return plain, networks, [CudaStep(each, 0, ranks=RANKS) for each in networks]


def chunk(ids: list[int], first: int) -> dict[str, torch.Tensor]:
    """A chunk of one sequence, of which `first` tokens are there."""
    given = prefill_inputs(len(ids) + 1, 1)
    given["tokens"][: len(ids)] = torch.tensor(ids)
    for name, value in (
        ("starts", len(ids)), ("first", first), ("last_starts", 1),
        ("last_first", first + len(ids) - 1),
    ):  # fmt: skip
        given[name][-1] = value
    return given


@pytest.mark.parametrize("case", CASES)
def test_ranks_give_together_what_a_network_gives_alone(case):
    plain, networks, steps = divided(case)
    kept = virtual_ranks.connect(steps)
    ids, vocab = [5, 9, 3, 7, 1], plain.config.vocab_size

    def work(rank: int) -> torch.Tensor:
        """Logits of a prompt in one chunk, of two steps after it, and of the prompt in two."""
        step, embed = steps[rank], Lookup(networks[rank].model)
        prefill = CudaPrefill(step, networks[rank])
        found = [prefill(**chunk(ids, 0))]
        for position in (5, 6):
            hidden = embed(torch.tensor([[3]]))
            found.append(step(hidden, torch.tensor([position])))
        prefill(**chunk(ids[:2], 0))
        return torch.cat([*found, prefill(**chunk(ids[2:], 2))])

    with torch.no_grad():
        found = virtual_ranks.run(work, (4, vocab), RANKS)
        expected = [
            plain.decode(torch.tensor([[i]]), torch.tensor([position]))
            for position, i in enumerate([*ids, 3, 3])
        ]
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0, :3], torch.cat(expected[-3:]), rtol=1e-4, atol=1e-4)
    # A ring's chunks begin where CHUNK_MULTIPLE says, which is beyond these prompts.
    if not any(layer.cache.is_ring for layer in steps[0].layers):
        assert torch.equal(found[0, 0], found[0, 3])
    assert kept


def test_a_step_sums_once_after_each_branch_and_gathers_logits_once():
    _, networks, steps = divided(GEMMA, 3)
    step = steps[0]
    tensors, _, state = tensors_of(step)
    assert {"sums.peers", "sums.epochs", "exchange.peers", "exchange.epochs"} <= set(state)
    hidden = torch.zeros(3, 1, step.hidden_size)
    inputs = hidden, torch.zeros(3, dtype=torch.int64)
    low = lower(step, [inputs], names_of(tensors | state))[0]
    counts = Counter(launch.kernel.__name__ for launch in low.launches)
    assert counts["reduce_norm_kernel"] == 2 * len(step.layers)
    assert counts["exchange_kernel"] == 1
    assert low.outputs[0].shape == (3, networks[0].config.vocab_size)


def test_what_has_no_sum_on_cuda_is_refused_by_name():
    hf = make_reference("olmo2")
    with pytest.raises(ExportError, match="not for norms of all heads at once and layers without"):
        tensor_parallel.check_launches(network_of(ROW_OF["olmo2"], hf, LENGTH, 1), RANKS)


def test_shards_of_packed_layers_are_the_ranks_own(tmp_path):
    """Packed weights are places until they are written, and their parts are what is compared."""
    whole = network_of(ROW_OF["qwen3"], make_reference("qwen3", head_dim=32), LENGTH, 1)
    networks = tensor_parallel.shards(whole, RANKS, True)
    steps = [CudaStep(each, None, ranks=RANKS) for each in networks]
    parts = {place: some for step in steps for place, some in parts_by_storage(step).items()}
    each = [tensors_of(step)[0] for step in steps]
    _, entry = write_shards(each, tmp_path, False, parts)
    written = load_file(tmp_path / "model.safetensors")
    sharded = set(entry["tensor_parallel"]["sharded"])
    for name in ("qkv", "o", "gate_up", "down"):
        assert f"layers.0.{name}.weight" in sharded
    for rank, step in enumerate(steps):
        for layer, number in zip(step.layers, range(len(step.layers))):
            of_rank = written[f"layers.{number}.gate_up.weight"][rank]
            assert torch.equal(of_rank, torch.cat(layer.gate_up.parts))
    assert "norm.weight" in written and "norm.weight" not in sharded
