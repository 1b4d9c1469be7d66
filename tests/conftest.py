"""Artifacts that many tests share, exported once in a run by the real command line."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def run_script():
    """A function that runs export/gemma.py or runner/run.py as a user does; what they print must
    be UTF-8."""

    def run(script: str, *arguments, cwd: Path, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, **options)
        # Text mode would turn "\r" into "\n".
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        return done

    return run


@pytest.fixture(scope="session")
def export_artifact(tmp_path_factory, run_script):
    """A function (name, *arguments) -> directory that exports at most once for each name."""
    root = tmp_path_factory.mktemp("artifacts")

    def export(name: str, *arguments) -> Path:
        output = root / name
        if not output.exists():
            done = run_script("export/gemma.py", "--output", output, *arguments, cwd=root)
            assert done.returncode == 0, done.stderr
        return output

    return export


@pytest.fixture(scope="session")
def default_artifact(export_artifact) -> Path:
    """Gemma 3 270M as `python export/gemma.py` makes it."""
    return export_artifact("default")


@pytest.fixture(scope="session")
def fp32_artifact(export_artifact) -> Path:
    """Gemma 3 270M in float32."""
    return export_artifact("fp32", "--quant", "fp32")


@pytest.fixture(scope="session")
def tiny_artifact(export_artifact, tiny_checkpoint) -> Path:
    """The tiny checkpoint in float32, with a chunk that its window is no multiple of."""
    arguments = ("--model", tiny_checkpoint, "--quant", "fp32")
    return export_artifact("tiny", *arguments, "--max-seq-len", 200, "--max-prefill", 7)


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint) -> Path:
    """A small random Gemma 3 with a window of 16, whose greedy text does not settle down to
    repeating itself."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """A function (**config) -> directory of the tiny checkpoint, with other values in its config:
    written by transformers, with a tokenizer of one id for each byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *alphabet])}
    shape = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }

    def make(**changes) -> Path:
        directory = tmp_path_factory.mktemp("tiny")
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape | changes))
        for name, parameter in model.named_parameters():
            # The head is the embedding: a large one would see only the token it was given.
            torch.nn.init.normal_(parameter, std=0.02 if "embed_tokens" in name else 0.2)
            if "q_norm" in name:
                parameter.data += 1.0
        model.save_pretrained(directory)
        tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(
            '{"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": true}'
        )
        return directory

    return make


@pytest.fixture(scope="module")
def one_thread():
    """Threads gain nothing on small tensors, and a busy machine makes them wait long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
