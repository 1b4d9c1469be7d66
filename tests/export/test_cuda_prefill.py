"""Prefill of a packed chunk gives the network's own logits, and leaves behind the states that the
network's prefill does."""

import copy

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.models.eager import assert_near, even_ends, prefill, prompt  # noqa: E402
from tests.models.tiny_models import (  # noqa: E402
    DENSE_NETWORKS,
    PER_LAYER,
    ROW_OF,
    dense_network,
    make_reference,
    network_of,
)
from tokenloop.export.launches.cuda_prefill import CudaPrefill  # noqa: E402
from tokenloop.export.launches.cuda_step import CudaStep  # noqa: E402

SLOTS, ROWS = 150, 4
WIDE = {"head_dim": 32}
HYBRID = WIDE | {"linear_key_head_dim": 16, "linear_value_head_dim": 32}
YARN = {
    "rope_type": "yarn", "rope_theta": 700.0, "factor": 8.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# The kernels' head sizes.
NETWORKS = {
    "qwen2": {"hidden_size": 128, "rope_parameters": YARN},
    "qwen3": WIDE,
    "qwen3_moe": WIDE,
    "gemma3_text": WIDE,
    "gemma4_text": WIDE | {"global_head_dim": 64},
    "gpt_oss": WIDE,
    "gemma4_text, experts beside": WIDE | {"global_head_dim": 64},
    PER_LAYER: WIDE | {"global_head_dim": 64},
    "qwen3_5_text": HYBRID | {"rope_parameters": YARN | {"partial_rotary_factor": 0.25}},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_next": HYBRID,
}


def chunk_of(prompts: dict[int, torch.Tensor], begins: dict[int, int], end: int, room: int):
    """The arguments of a chunk of up to ROWS sequences, each from where it begins up to `end` or
    its end, with room for more tokens."""
    tokens, starts, rows, first, last_first = [], [0], [], [], []
    for row, ids in prompts.items():
        part = ids[0, begins[row] : end]
        if len(part):
            tokens.append(part)
            starts.append(starts[-1] + len(part))
            rows.append(row)
            first.append(begins[row])
            last_first.append(begins[row] + len(part) - 1)
    unused = ROWS - len(rows)
    last_starts = [min(i, len(rows)) for i in range(ROWS + 1)]
    tables = (
        starts + [starts[-1]] * unused, rows + [-1] * unused, first + [0] * unused, last_starts,
        last_first + [0] * unused,
    )  # fmt: skip
    given = torch.cat([*tokens, torch.zeros(room, dtype=torch.int64)])
    return given, *(torch.tensor(table, dtype=torch.int32) for table in tables)


pytestmark = pytest.mark.usefixtures("one_thread", "interpreted_ranges")


@pytest.fixture
def networks_of():
    """A function: model type, or one of DENSE_NETWORKS -> a network, an equal one, and the prefill
    of that."""

    def networks(model_type: str):
        if model_type in DENSE_NETWORKS:
            network = dense_network(model_type, SLOTS, ROWS)
        else:
            case = model_type
            if case not in ROW_OF:
                case = next(case for case in ROW_OF if case.split(",")[0] == model_type)
            hf = make_reference(case, **NETWORKS[model_type])
            network = network_of(ROW_OF[case], hf, SLOTS, ROWS)
        packed = copy.deepcopy(network)
        method = CudaPrefill(CudaStep(packed), packed)
        return network, packed, method

    return networks


@pytest.mark.parametrize("model_type", [*NETWORKS, *DENSE_NETWORKS])
def test_a_packed_chunk_gives_each_prompt_s_logits_and_states(model_type, networks_of):
    plain, packed, method = networks_of(model_type)
    lengths = {2: 67, 0: 5}
    prompts = {row: prompt(length, row) for row, length in lengths.items()}
    actual, begins = {}, dict.fromkeys(prompts, 0)
    with torch.no_grad():
        for end in (64, 128):
            given = chunk_of(prompts, begins, end, 3)
            for row, logits in zip(given[2].tolist(), method(*given)):
                actual[row] = logits
            begins = {row: min(end, length) for row, length in lengths.items()}
        for row, ids in prompts.items():
            ends = even_ends(lengths[row], plain.max_chunk)
            assert_near(actual[row][None], prefill(plain, ids, ends, row)[-1])
        # Rows 1 and 3 were in no chunk.
        token, position = torch.tensor([[5], [6], [7], [8]]), torch.tensor([5, 0, 67, 0])
        assert_near(packed.decode(token, position), plain.decode(token, position))
