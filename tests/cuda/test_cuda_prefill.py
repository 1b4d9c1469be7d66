"""On a GPU no bit of a prompt's logits, or of the state that it leaves, depends on the chunks that
it comes in, on what is packed beside it, or on the artifact's rows."""

import json

import pytest
import torch

from tokenloop import runner
from tokenloop.runner.engines.staging import Staging
from tokenloop.runner.prefill import packed

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
QWEN = {
    "model_type": "qwen3", "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1152,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {
    "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma3_text", "vocab_size": 1000, "hidden_size": 640, "intermediate_size": 1024,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 512, "query_pre_attn_scalar": 256, "max_position_embeddings": 4096,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6,
}  # fmt: skip
GEMMA4 = GEMMA | {
    "model_type": "gemma4_text", "num_key_value_heads": 2, "num_global_key_value_heads": 1,
    "global_head_dim": 512, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
# The first three layers have the keys that the others share.
GEMMA4_E2B = GEMMA4 | {
    "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 1000,
    "attention_k_eq_v": False, "num_hidden_layers": 6, "num_kv_shared_layers": 3,
    "layer_types": GEMMA["layer_types"][:2] * 3, "use_double_wide_mlp": True,
}  # fmt: skip
HYBRID = {
    "model_type": "qwen3_5_text", "vocab_size": 1000, "hidden_size": 512,
    "intermediate_size": 768, "num_hidden_layers": 4, "full_attention_interval": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
}  # fmt: skip
NETWORKS = {
    "qwen3": ("export/qwen3.py", QWEN),
    "experts": ("export/qwen3.py", QWEN | EXPERTS | {"model_type": "qwen3_moe"}),
    "gemma3": ("export/gemma.py", GEMMA),
    "gemma4": ("export/gemma.py", GEMMA4),
    "gemma4-e2b": ("export/gemma.py", GEMMA4_E2B),
    "hybrid": ("export/qwen3_5.py", HYBRID),
}
CASES = [(name, "bf16") for name in NETWORKS]
CASES += [("qwen3", "int8"), ("qwen3", "int4"), ("qwen3", "fp32"), ("gemma3", "fp32")]
CASES += [("hybrid", "fp32"), ("experts", "fp32"), ("gemma4", "int4")]
CASES += [("qwen3", "fp8"), ("hybrid", "int8"), ("hybrid", "int4")]
CASES += [("gemma4-e2b", quant) for quant in ("fp32", "int8", "int4", "fp8")]
NAMES = ["-".join(case) for case in CASES]
LENGTH, CAPACITY, ROWS = 1500, 2048, 32


@pytest.fixture(scope="module")
def load(export_artifact, tmp_path_factory):
    """A function: network, recipe, rows -> the program of an artifact, always of the same random
    weights."""

    def make(network: str, quant: str, batch: int):
        script, config = NETWORKS[network]
        file = tmp_path_factory.mktemp("config") / "config.json"
        file.write_text(json.dumps(config))
        artifact = export_artifact(
            f"prefill-{network}-{quant}-{batch}", "--random-weights", file, "--device", "cuda",
            "--quant", quant, "--max-seq-len", 2048, "--max-prefill", CAPACITY, "--batch", batch,
            script=script,
        )  # fmt: skip
        program = runner.load(artifact).loop.program
        if network.startswith("gemma4"):
            # Gemma 4 has no scale of scores: these norms hold it. With weights near 1, as random
            # ones are, a few keys get all of the attention, and bfloat16's last bit says which.
            for entry in program.manifest["weights"]["random"]:
                if entry["name"].endswith(("q_norm.weight", "k_norm.weight")):
                    program.tensors[entry["name"]].mul_(0.25)
            torch.cuda.synchronize()
        return program

    return make


def ids(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1000, (count,), generator=generator).tolist()


def prefill(program, prompts: list[tuple[int, list[int]]], capacity: int) -> dict:
    """The logits [V] after each row's prompt."""
    found = {}
    for chunk in packed(prompts, capacity, program.packing.parts, 64):
        logits = program.prefill_packed(chunk)
        # The program has a stream of its own.
        torch.cuda.synchronize()
        for i, part in enumerate(chunk):
            if part.ends:
                found[part.row] = logits[i].clone()
    return found


def states(program, row: int) -> dict[str, torch.Tensor]:
    """What a row remembers of LENGTH tokens."""
    kept = {}
    for name, tensor in program.tensors.items():
        if ".cache." in name:
            whole = tensor.shape[1] == 2048 and name.endswith((".k", ".v"))
            kept[name] = tensor[row, :LENGTH].clone() if whole else tensor[row].clone()
    return kept


@pytest.mark.parametrize(("network", "quant"), CASES, ids=NAMES)
def test_no_bit_depends_on_the_chunks(load, network, quant):
    program, prompt = load(network, quant, 1), ids(0, LENGTH)
    expected = prefill(program, [(0, prompt)], CAPACITY)[0]
    state = states(program, 0)
    assert expected.isfinite().all() and expected.std() > 0
    for size in (64, 128, 1024):
        prefill(program, [(0, ids(1, LENGTH + 100))], CAPACITY)
        assert torch.equal(prefill(program, [(0, prompt)], size)[0], expected), size
        for name, tensor in states(program, 0).items():
            assert torch.equal(tensor, state[name]), (size, name)


@pytest.mark.parametrize(("network", "quant"), CASES, ids=NAMES)
def test_no_bit_depends_on_what_is_packed_beside_it(load, network, quant):
    alone, several = load(network, quant, 1), load(network, quant, ROWS)
    prompts = [
        (3, ids(0, 400)),
        (1, ids(1, 1)),
        (0, ids(2, LENGTH)),
        (4, ids(3, 129)),
        (2, ids(4, 7)),
    ]
    prompts += [(row, ids(row, 2 * row)) for row in range(5, ROWS)]
    expected = {row: prefill(alone, [(0, prompt)], CAPACITY)[0] for row, prompt in prompts}
    for capacity in (CAPACITY, 512):
        found = prefill(several, prompts, capacity)
        assert all(torch.equal(found[row], expected[row]) for row, _ in prompts), capacity
    prefill(alone, [(0, prompts[2][1])], CAPACITY)
    state, theirs = states(alone, 0), states(several, 0)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in state.items())


def decode(program, prompt: list[int]) -> torch.Tensor:
    """The logits [V] after a prompt whose tokens are fed one by one."""
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    program.begin(embed=False)
    for place, token in enumerate(prompt):
        position.fill_(place)
        fed = torch.tensor([[token]], device="cuda")
        torch.cuda.synchronize()
        logits = program.decode(fed, position)
        torch.cuda.synchronize()
    return logits[0].clone()


@pytest.mark.parametrize(("network", "quant"), CASES, ids=NAMES)
def test_a_prompt_gives_what_its_tokens_give_one_by_one(load, network, quant):
    """Prefill and decode differ in the order of their sums: in float32 by less than this."""
    program, prompt = load(network, quant, 1), ids(0, 200)
    logits, stepped = prefill(program, [(0, prompt)], CAPACITY)[0], decode(program, prompt)
    if quant == "fp32":
        largest = logits.abs().max().item()
        torch.testing.assert_close(stepped, logits, rtol=2e-4, atol=2e-4 * largest)
        assert stepped.argmax() == logits.argmax()
    else:
        least = 0.999 if network.startswith("gemma4") else 0.99
        assert torch.cosine_similarity(stepped, logits, dim=0) > least


@pytest.mark.parametrize(("network", "quant"), CASES, ids=NAMES)
def test_steps_give_the_same_bits_every_time(load, network, quant):
    program, prompt = load(network, quant, 1), ids(0, 100)
    expected = decode(program, prompt)
    for _ in range(10):
        assert torch.equal(decode(program, prompt), expected)


def test_a_method_s_outputs_are_cleared_before_it_runs(load):
    program = load("qwen3", "bf16", 1)
    token = torch.tensor([[7]], device="cuda")
    torch.cuda.synchronize()
    # What torch's own stream is given now happens half a second later.
    torch.cuda._sleep(10**9)
    hidden = program._call("embed", token)
    torch.cuda.synchronize()
    assert hidden.count_nonzero() > 0


def test_a_buffer_is_not_filled_before_the_gpu_has_read_it():
    stream, destination = torch.cuda.Stream(), torch.zeros(4, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    staging, found = Staging(destination, stream), []
    for number in range(6):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)
        staging.arrays[staging.take()][:] = number
        staging.send(4)
        with torch.cuda.stream(stream):
            found.append(destination.clone())
    torch.cuda.synchronize()
    assert [values.tolist() for values in found] == [[number] * 4 for number in range(6)]


def test_prompts_that_join_together_go_up_in_one_copy(load):
    program = load("qwen3", "bf16", ROWS)
    before = program.transfers.snapshot()
    prefill(program, [(row, ids(row, 100)) for row in range(5)], CAPACITY)
    copies = program.transfers.since(before)
    assert (copies.host_to_device.count, copies.device_to_device.count) == (1, 0)


@pytest.mark.parametrize(("network", "quant"), CASES, ids=NAMES)
def test_no_bit_depends_on_whether_kernels_overlap(load, network, quant):
    """A kernel that reads too early what one ahead writes, or writes what one ahead still reads,
    shows as a difference in some of many prompts."""
    program = load(network, quant, ROWS)
    generator, found = torch.Generator().manual_seed(7), {}
    sizes = torch.randint(1, 700, (100, 3), generator=generator).tolist()
    # Chunks that their graph has much more room for, that just fit, and of one token.
    sizes += [[1, 1, 1], [64, 1, 191], [256, 256, 512], [2000, 1, 1]]
    for overlap in (True, False):
        program.begin(embed=False, overlap=overlap)
        found[overlap] = []
        for seed, (one, two, three) in enumerate(sizes):
            prompts = [(4, ids(seed, one)), (0, ids(seed + 1, two)), (2, ids(seed + 2, three))]
            for several in (prompts, prompts[:1]):
                # Graphs follow one another at once: nobody waits for one before the next.
                for chunk in packed(several, CAPACITY, program.packing.parts, 64):
                    logits = program.prefill_packed(chunk)[: len(chunk)]
                    with torch.cuda.stream(program._stream):
                        found[overlap].append(logits.clone())
        torch.cuda.synchronize()
        found[overlap] += [states(program, row) for row in (4, 0, 2)]
    *early, e4, e0, e2 = found[True]
    *late, l4, l0, l2 = found[False]
    assert len(early) == len(late) >= 200
    assert [i for i, x in enumerate(early) if not torch.equal(x, late[i])] == []
    for state, expected in ((e4, l4), (e0, l0), (e2, l2)):
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_prompts_kernels_overlap(load, monkeypatch):
    from tokenloop.runner.engines import programmatic_launch

    counts, let_overlap = [], programmatic_launch.let_overlap
    monkeypatch.setattr(
        programmatic_launch, "let_overlap", lambda *given: counts.append(let_overlap(*given))
    )
    program = load("qwen3", "bf16", 1)
    # The last graphs that are captured are the chunks', one for each size.
    assert min(counts[-len(program._chunks) :]) >= 10
