"""What every family of models promises of its scripts, one sentence for each promise."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import AUSTEN

# How many ids their greedy texts have at least.
VARIETY = {"gemma": 5, "llama": 5, "qwen3": 5, "qwen3_5, xnnpack": 20, "qwen3_5, inductor": 12}
# Scripts whose --model has no default, and what they ask for.
WITHOUT_A_MODEL = {
    "export/qwen3.py": "no --model; give it a .gguf file or a Hugging Face directory",
    "export/qwen3_5.py": "no --model; give it a .gguf file or a Hugging Face directory",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", VARIETY)
def test_the_scripts_give_transformers_greedy_ids(family_artifact, run_script, tmp_path, family):
    checkpoint, artifact = family_artifact(family)
    # A network of 30 million weights takes its time in plain kernels.
    count = 32 if checkpoint == AUSTEN else 64
    arguments = ("--artifact", artifact, "--json", "--max-new-tokens", count, "Größe: 5 µm")
    done = run_script("runner/run.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    tokenizer = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]
    prompt = result["prompt_ids"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokens = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False}
    with torch.no_grad():
        ids = model.generate(tokens, max_new_tokens=count, **options)[0, len(prompt) :].tolist()
    if checkpoint != AUSTEN:
        # The tiny checkpoints' tokenizers have an id for each byte.
        assert len(prompt) == len("Größe: 5 µm".encode()) + len(tokenizer["prefix_ids"])
    assert len(set(ids)) > VARIETY[family]
    end = next((i for i, token in enumerate(ids) if token in tokenizer["eos_token_ids"]), len(ids))
    assert result["token_ids"] == ids[:end]


@pytest.mark.parametrize("script", WITHOUT_A_MODEL)
def test_without_a_model_the_script_asks_for_one(run_here, script):
    done = run_here(script)
    assert done.returncode == 2
    assert done.stderr == f"{script}: error: {WITHOUT_A_MODEL[script]}\n"
