"""Artifacts that many tests share, exported once in a run by the real command line."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_script(script: str, *arguments, cwd: Path, **options) -> subprocess.CompletedProcess:
    """Run export/gemma.py or runner/run.py as a user does."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


@pytest.fixture(scope="session")
def export_artifact(tmp_path_factory):
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
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A small random Gemma 3 with a window of 16, written by transformers, with a tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    directory = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *alphabet])}
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = Gemma3ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
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
