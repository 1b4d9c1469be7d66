"""Float8 weights on a GPU: what the recipe makes, and a checkpoint's own that are kept, give every
row what it gives alone, and ids that its network gives in float32."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.driving import PROMPTS, assert_rows_are_those_alone, ids_of, variants  # noqa: E402
from tests.export.packed import loaded  # noqa: E402
from tests.export.test_float8 import WIDE, float8_checkpoint  # noqa: E402
from tokenloop import runner  # noqa: E402
from tokenloop.export import command  # noqa: E402

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
COUNT = 40
CASES = {"recipe": ("row", "fp8"), "kept rows": ("row", None), "kept blocks": ("block 128", None)}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    """The checkpoint, and models of it with one row and with three."""
    form, quant = CASES[request.param]
    path = tmp_path_factory.mktemp("float8")
    checkpoint = float8_checkpoint(path / "model", form, head_dim=64, **WIDE)
    models = []
    for batch in (1, 3):
        artifact = path / f"artifact-{batch}"
        arguments = ["--model", checkpoint, "--output", artifact, "--device", "cuda"]
        arguments += ["--max-seq-len", 120, "--max-prefill", 64, "--batch", batch]
        arguments += [] if quant is None else ["--quant", quant]
        assert command.main([str(argument) for argument in arguments]) == 0
        models.append(runner.load(artifact))
        assert models[-1].manifest["quant"] == (quant or "keep")
        models[-1].tokenizer.eos_token_ids.clear()
    return checkpoint, *models


def test_rows_that_join_and_leave_give_what_each_gives_alone(made):
    _, alone, several = made
    assert_rows_are_those_alone(several, alone, variants(graphs=(True, False))[:3])


def test_ids_are_among_the_best_of_the_checkpoint_s_weights(made):
    checkpoint, alone, _ = made
    _, network = loaded(checkpoint, torch.float32, 120)
    for prompt in PROMPTS:
        ids = ids_of(alone, prompt, COUNT)
        given, logits = prompt + ids, []
        with torch.no_grad():
            for position, token in enumerate(given[:-1]):
                step = network.decode(torch.tensor([[token]]), torch.tensor([position]))
                logits.append(step[0])
        logits = torch.stack(logits[len(prompt) - 1 :])
        chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        # Activations are bfloat16, and the recipe's scales are float32 anew.
        assert ((logits.amax(1) - chosen) / logits.std(1)).median() < 0.05
