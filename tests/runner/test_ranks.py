"""Several processes with a part of every layer each give what one gives, and end together."""

import json
import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests.kill_ranks import kill_one
from tokenloop.export.command import choose_backend
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.manifest import open_artifact
from tokenloop.runner.ranks import check_ranks, place


@pytest.fixture(scope="session")
def qwen_checkpoint(once, make_qwen_checkpoint) -> Path:
    changes = {"num_hidden_layers": 1}
    make = make_qwen_checkpoint
    return once("ranks-checkpoint", lambda path: make("qwen3", **changes).rename(path))


@pytest.fixture(scope="session")
def ranks_artifact(export_artifact, qwen_checkpoint) -> Path:
    """A Qwen 3 of one layer for two ranks."""
    arguments = ("--model", qwen_checkpoint, "--backend", "inductor", "--tensor-parallel", 2)
    return export_artifact(
        "ranks", *arguments, "--max-seq-len", 200, "--max-prefill", 7, script="export/qwen3.py"
    )


def test_two_ranks_give_one_s_ids_and_the_death_of_one_ends_the_other(
    ranks_artifact, qwen_checkpoint
):
    from transformers import Qwen3ForCausalLM

    lines, _ = kill_one(ranks_artifact, victim=1, delay_s=random.random())
    result = json.loads(lines[0])
    reference = Qwen3ForCausalLM.from_pretrained(qwen_checkpoint, dtype=torch.float32)
    prompt = torch.tensor([result["prompt_ids"]])
    expected = reference.generate(prompt, do_sample=False, max_new_tokens=100)
    assert result["token_ids"] == expected[0, prompt.shape[1] :].tolist()
    assert json.loads(lines[1])["token_ids"] == result["token_ids"]
    # An embedding, two sums of the layer, and the logits: of the prompt's 9 tokens in two chunks,
    # and of 99 steps. And the embedding of the last token, which no step is fed.
    received = result["stats"]["transfers"]["between_ranks"]
    assert received["count"] == 4 * (2 + 99) + 1


def test_an_artifact_says_how_many_processes_it_is_for(ranks_artifact, monkeypatch):
    artifact = open_artifact(ranks_artifact)
    sharded = artifact.manifest["tensor_parallel"]["sharded"]
    assert "network.model.layers.0.self_attn.q_proj.weight" in sharded
    assert not any("norm" in name for name in sharded)
    with pytest.raises(RunnerError, match=r"is for 2 processes, and there is 1: torchrun --nproc"):
        check_ranks(ranks_artifact, artifact.manifest)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert check_ranks(ranks_artifact, artifact.manifest) == (1, 2)
    with pytest.raises(RunnerError, match="is for 1 process, and there are 2: leave out torchrun"):
        check_ranks(ranks_artifact, {})


@pytest.mark.parametrize("rank, count", [("2", "2"), ("-1", "2"), ("x", "2"), ("0", None)])
def test_a_place_that_torchrun_cannot_have_set_is_refused(monkeypatch, rank, count):
    for name, value in (("RANK", rank), ("WORLD_SIZE", count)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(RunnerError, match="both are torchrun's"):
        place()


def test_backends_that_cannot_be_divided_say_so():
    options = Namespace(
        tensor_parallel=2, device=None, quant=None, max_prefill=None, backend="xnnpack",
        draft_tokens=0,
    )  # fmt: skip
    assert "--tensor-parallel 2 is not for --backend xnnpack: inductor" in choose_backend(
        options, "xnnpack"
    )
