"""Several processes with a part of every layer each give what one gives, and end together."""

import http.client
import json
import random
import signal
import socket
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.kill_ranks import PATIENCE_S, kill_one, port_of, start
from tests.serving import request_of
from tokenloop.export.command import choose_backend
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.manifest import open_artifact
from tokenloop.runner.ranks import Place, check_ranks, place
from tokenloop.runner.tokenizer import Tokenizer
from tokenloop.runner.transfers import Copies

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def qwen_checkpoint(once, make_qwen_checkpoint) -> Path:
    def make(path: Path) -> None:
        made = make_qwen_checkpoint("qwen3", num_hidden_layers=1)
        config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
        (made / "tokenizer_config.json").write_text(json.dumps(config))
        made.rename(path)

    return once("ranks-checkpoint", make)


@pytest.fixture(scope="session")
def ranks_artifact(export_artifact, qwen_checkpoint) -> Path:
    """A Qwen 3 of one layer and three rows for two ranks, which do not divide its vocabulary."""
    arguments = ("--model", qwen_checkpoint, "--backend", "inductor", "--tensor-parallel", 2)
    return export_artifact(
        "ranks", *arguments, "--batch", 3, "--max-seq-len", 200, "--max-prefill", 7,
        script="export/qwen3.py",
    )  # fmt: skip


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
        draft_tokens=0, gpu_arch=None,
    )  # fmt: skip
    assert "--tensor-parallel 2 is not for --backend xnnpack: inductor" in choose_backend(
        options, "xnnpack"
    )


def test_a_group_of_one_has_what_it_has_and_tells_it(monkeypatch):
    from tokenloop.runner.engines.ranks import Ranks

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    ranks = Ranks(Place(0, 1), Copies())
    try:
        assert (ranks.all(5), ranks.share("x")) == ([5], "x")
        assert ranks.gather(torch.ones(2)).tolist() == [[1, 1]]
        channel = ranks.channel()
        for size in (0, 1, 1020, 1021, 5000):
            channel.send(bytes(size))
        assert (ranks.told.count, ranks.told.bytes) == (5, 7042)
    finally:
        Ranks.joined = None
        dist.destroy_process_group()


HEADERS = {"content-type": "application/json"}


def texts_of_one(artifact: Path, checkpoint: Path, prompts: list[list[int]]) -> list[str]:
    """What transformers' own network says after each prompt, in one process."""
    from transformers import Qwen3ForCausalLM

    reference = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    opened = open_artifact(artifact)
    tokenizer = Tokenizer(opened.directory, opened.manifest["tokenizer"], opened.read)
    found = []
    for prompt in prompts:
        ids = reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30)
        ids = ids[0, len(prompt) :].tolist()
        found.append(tokenizer.decode([i for i in ids if i not in tokenizer.eos_token_ids]))
    return found


def hang_up(port: int) -> None:
    body = b'{"prompt": "Once", "max_tokens": 150, "temperature": 1}'
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(request_of("POST", "/v1/completions", body, HEADERS))


def test_ranks_serve_what_each_request_gives_alone(ranks_artifact, qwen_checkpoint):
    prompts = [[9] * 20 + [i + 10] * (1 + 5 * i) for i in range(6)]

    def ask(path: str, body: dict | None = None) -> str:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        data = None if body is None else json.dumps(body)
        client.request("GET" if body is None else "POST", path, data, HEADERS)
        answer = client.getresponse()
        found = answer.read().decode()
        assert answer.status == 200, found
        return found

    def text(prompt: list[int], sampling: dict) -> str:
        body = {"prompt": prompt, "max_tokens": 30} | sampling
        return json.loads(ask("/v1/completions", body))["choices"][0]["text"]

    ranks = start(
        ranks_artifact, "--port", "0", "--threads", "1", "--prefix-cache-mb", "1",
        script="serve.py",
    )  # fmt: skip
    try:
        port = port_of(ranks[0])
        greedy = {"temperature": 0}
        for sampling in (greedy, {"temperature": 0.9, "seed": 5, "top_p": 0.9}):
            alone = [text(prompt, sampling) for prompt in prompts]
            with ThreadPoolExecutor(len(prompts)) as pool:
                # Beside one whose client hangs up.
                hang_up(port)
                together = list(pool.map(partial(text, sampling=sampling), prompts))
            assert together == alone
            if sampling is greedy:
                assert alone == texts_of_one(ranks_artifact, qwen_checkpoint, prompts)
        schema = {"type": "object", "properties": {"a": {"enum": ["x", 17]}}, "required": ["a"]}
        schema |= {"additionalProperties": False}
        named = {"name": "a", "schema": schema}
        asked = {
            "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60, "seed": 1,
            "response_format": {"type": "json_schema", "json_schema": named},
        }  # fmt: skip
        answer = json.loads(ask("/v1/chat/completions", asked))["choices"][0]
        assert answer["finish_reason"] == "stop"
        assert json.loads(answer["message"]["content"]) in ({"a": "x"}, {"a": 17})
        counts = dict(
            line.rsplit(" ", 1)
            for line in ask("/metrics").splitlines()
            if line.startswith("tokenloop_")
        )
        assert float(counts["tokenloop_cached_tokens_total"]) > 0
        assert float(counts["tokenloop_rank_gathers_total"]) > 4 * float(
            counts["tokenloop_steps_total"]
        )
        assert float(counts["tokenloop_rank_messages_total"]) > 0
        # As a terminal has it, all of them get it.
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        errors = [rank.communicate(timeout=PATIENCE_S)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [130, 0]
        assert "rror" not in "".join(errors)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_ranks_chat(ranks_artifact):
    ranks = start(ranks_artifact, "--interactive", "--max-new-tokens", "8", "--threads", "1")
    try:
        said, errors = ranks[0].communicate("Hi\nx\n/new\nHi\n", timeout=60)
        assert (ranks[0].returncode, ranks[1].wait(PATIENCE_S), errors) == (0, 0, "")
        first, *_, last = said.splitlines()
        assert first == last != ""
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
