"""Rounds of drafts, launch by launch: the tokens and the bits of the logits are those of steps."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.export.replay import replay  # noqa: E402
from tests.export.test_fused import DEVICE  # noqa: E402
from tests.models.tiny_models import NORMED_AFTER, dense_network  # noqa: E402
from tokenloop.export.errors import ExportError  # noqa: E402
from tokenloop.export.launches.cuda_drafts import draft_methods  # noqa: E402
from tokenloop.export.launches.cuda_step import CudaStep  # noqa: E402
from tokenloop.export.launches.lowering import lower, names_of  # noqa: E402
from tokenloop.export.tensors import tensors_of  # noqa: E402
from tokenloop.models import dense  # noqa: E402
from tokenloop.sampler.philox import vocabulary_gumbel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "interpreted_ranges")
# The first token's position, how many there are, and drafts of a round.
FIRST, POSITIONS, DRAFTS = 9, 19, 3


def choose(logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Tokens int64 [N, 1] of logits [N, V]: drawn, with noise that is keyed by position, of those
    that no other position may have."""
    noise = vocabulary_gumbel(torch.full_like(positions, 5), positions, logits.shape[1])
    others = (torch.arange(logits.shape[1]) - positions[:, None]) % POSITIONS != 0
    return (logits.cpu() + noise).masked_fill(others, -torch.inf).argmax(1)[:, None]


def test_rounds_give_the_tokens_and_the_bits_of_steps():
    # One layer, whose ring is gone around, by rounds of more than half of its slots.
    changes = {"layer_types": (dense.SLIDING,), "rotations": (dense.SLIDING,)}
    network = dense_network(NORMED_AFTER, POSITIONS, 1, **changes).to(DEVICE)
    (ring,) = network.model.caches()
    assert ring.is_ring and ring.slots // 2 < DRAFTS + 1 <= ring.slots < POSITIONS
    size, vocab_size = DRAFTS + 1, network.config.vocab_size
    step = CudaStep(network, rows=size)
    methods = draft_methods(step, network.model, DRAFTS, vocab_size, POSITIONS)
    # The order in which the runner gives them (runner/engines/draft_rounds.py).
    where, sampling = ["history", "position"], ["temperature", "top_k", "top_p", "seed", "position"]
    for rows in (1, size):
        assert list(methods[f"round_{rows}"][1]) == [*where, "tokens", "positions"]
        expected = ["tokens", "positions", "chosen", *where, "accepted"]
        assert list(methods[f"accept_{rows}"][1]) == expected
    expected = [*where, "drafts", "tokens", "positions"]
    assert list(methods[f"verify_{size}"][1]) == expected
    assert list(methods["sample_round"][1]) == ["logits", *sampling, "next_id"]
    weights, _, state = tensors_of(step, *(method for method, _ in methods.values()))
    names = names_of(weights | state)
    lowered = {
        name: lower(method, [tuple(x.to(DEVICE) for x in inputs.values())], names)[0]
        for name, (method, inputs) in methods.items()
    }
    assert {"greedy_round", "sample_round", "sample_unfiltered_round"} < set(lowered)
    # 1. Steps, one after the other, behind a prompt that might have been anything.
    for name, x in state.items():
        if ".cache." in name:
            x.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    tensors = {name: x.clone() for name, x in (weights | state).items()}
    ids, expected = [*range(1, FIRST + 1), 5], {}
    with torch.no_grad():
        for position in range(FIRST, POSITIONS):
            where = torch.tensor([position])
            token = torch.tensor([[ids[position]]], device=DEVICE)
            expected[position] = step(network.embed(token), where.to(DEVICE))
            ids.append(choose(expected[position], where).item())

    # 2. Rounds, whose history has most of what will come, and something wrong.
    history = torch.zeros(POSITIONS + size, dtype=torch.int64, device=DEVICE)
    known = ids[FIRST : 2 * FIRST]
    known[8] = (known[8] + 1) % vocab_size
    history[:FIRST], history[FIRST] = torch.tensor(known), ids[FIRST]
    position, found, counts = torch.tensor([FIRST], device=DEVICE), [ids[FIRST]], []
    while len(counts) < 4:
        rows = 1 if len(counts) == 3 else size
        begin = position.item()
        tokens, positions = (torch.zeros(rows, dtype=torch.int64, device=DEVICE) for _ in "ab")
        name, given = f"round_{rows}", [history, position, tokens, positions]
        if not counts:
            # Those of another model, of which the second does not hold.
            drafts = torch.tensor(ids[begin + 1 : begin + 1 + DRAFTS], device=DEVICE)
            drafts[1] = (drafts[1] + 1) % vocab_size
            name = f"verify_{rows}"
            given.insert(2, drafts)
        (logits,) = replay(lowered[name], given, tensors)
        assert positions.tolist() == list(range(begin, begin + rows))
        chosen = choose(logits, positions.cpu()).to(DEVICE)
        accepted = torch.zeros(1 + rows, dtype=torch.int64, device=DEVICE)
        given = [tokens, positions, chosen, history, position, accepted]
        assert replay(lowered[f"accept_{rows}"], given, tensors) == []
        count = accepted[0].item()
        for i in range(count):
            assert torch.equal(logits[i : i + 1], expected[begin + i]), (begin, i)
        assert position.item() == begin + count
        found += accepted[1 : 1 + count].tolist()
        counts.append(count)
    assert found == ids[FIRST : FIRST + len(found)]
    # One of those given held, for the one behind it was wrong; of those found all did, and then
    # one; and there were none.
    assert counts == [2, 4, 2, 1]


def test_what_cannot_be_taken_back_is_refused():
    network = dense_network(NORMED_AFTER, POSITIONS, 1)
    window = min(cache.slots for cache in network.model.caches())
    step = CudaStep(network)
    with pytest.raises(ExportError, match=f"is {window}; .* the last {window} tokens: at most"):
        draft_methods(step, network.model, window, 11, POSITIONS)


def test_what_no_round_is_for_is_refused_in_one_line(run_here, tiny_checkpoint, tmp_path):
    cuda = "--device", "cuda"
    for flags, line in (
        ((*cuda, "--draft-tokens", 32), "--draft-tokens is 32; at most 31 are possible"),
        ((*cuda, "--draft-tokens", -1), "--draft-tokens is -1; it must be at least 0"),
        ((*cuda, "--draft-tokens", 3, "--batch", 2), "--draft-tokens is 3 and --batch 2: the "),
        (("--draft-tokens", 3), "--draft-tokens is 3 and --backend xnnpack: there a token's bits"),
        (("--draft-tokens", 3, "--backend", "inductor"), "and --backend inductor: there a token's"),
    ):
        arguments = "--model", tiny_checkpoint, *flags, "--output", tmp_path / "x"
        done = run_here("export/gemma.py", *arguments)
        assert done.returncode == 2 and line in done.stderr.splitlines()[-1], done.stderr
        assert not any(tmp_path.iterdir())
