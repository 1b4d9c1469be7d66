"""The small hybrid that benchmarks/train_hybrid.py made: its greedy text, byte for byte, from
AOTInductor, and its perplexity on what it did not learn from. Another hybrid of ExecuTorch's is in
test_qwen3_5.py: lowering the eight layers of this one for plain kernels takes a minute."""

import json
import math

import pytest
import torch

from tests.conftest import AUSTEN
from tokenloop import runner

GREEDY = {
    "The morning was fine, and Emma": (
        " was obliged to go out of the room for a few minutes.\nThe Miss Bertrams were not to be "
        "in the country, and they were not long in the house. They were not in the house, and they "
        "were not in the"
    ),
    "Elizabeth had never been more at a loss": (
        " to know what was to be done.\nIn a week or two, the two ladies were together in the "
        "morning, and the two Miss Steeles, the Coxes, the Masters, and the e"
    ),
    '"My dear Miss Woodhouse," said Mr. Knightley': (
        ', "I have been so much used to you for your good opinion.\'"\n"I am afraid you are very '
        'much obliged to you," said Emma, "and I am sure you would be very much obliged to you for '
        "your"
    ),
}
NEW_TOKENS = 48
# Tokens of the text that was held out, and what e to their mean loss is.
MEASURED, PERPLEXITY = 120, 26.0344


def test_the_greedy_text_is_what_it_was(austen_artifact, run_script, tmp_path):
    flags = ("--artifact", austen_artifact, "--json", "--max-new-tokens", NEW_TOKENS)
    done = run_script("runner/run.py", *flags, *GREEDY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = map(json.loads, done.stdout.splitlines())
    assert {result["prompt"]: result["text"] for result in results} == GREEDY


def test_the_perplexity_of_text_held_out_is_what_it_was(austen_artifact):
    model = runner.load(austen_artifact)
    text = (AUSTEN / "held_out.txt").read_text(encoding="utf-8")
    ids, program = model.tokenizer.encode(text)[: MEASURED + 1], model.loop.program
    nats = 0.0
    for position, (token, following) in enumerate(zip(ids, ids[1:])):
        inputs = [[token]] * model.batch, [position] * model.batch
        logits = torch.as_tensor(program.decode(*map(model.loop.transfers.upload, inputs)))[0]
        nats -= logits.log_softmax(-1)[following].item()
    assert math.exp(nats / MEASURED) == pytest.approx(PERPLEXITY, rel=1e-4)
