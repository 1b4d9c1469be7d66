"""An artifact of a quantized checkpoint has the checkpoint's own integers, without being asked."""

import json
from itertools import accumulate

import numpy as np
import torch

from tests.export.compressed import compressed_checkpoint
from tests.export.programs import assert_near_of_quantized, even, export_here, feed
from tokenloop.export.checkpoint import open_checkpoint
from tokenloop.export.command import ANY
from tokenloop.export.pte.quantize import QuantizedLinear
from tokenloop.runner.engines.executorch import ExecuTorchProgram
from tokenloop.runner.manifest import open_artifact


def test_xnnpack_computes_with_the_checkpoint_s_integers(tmp_path):
    path = compressed_checkpoint(tmp_path / "model", 32)
    arguments = ["--model", path, "--max-seq-len", 24, "--max-prefill", 7]
    network = export_here(ANY, [*arguments, "--output", tmp_path / "artifact"], first_block=8)
    assert json.loads((tmp_path / "artifact/manifest.json").read_text())["quant"] == "keep"
    stored = open_checkpoint(path).stored
    layers = {
        name: layer for name, layer in network.named_modules() if isinstance(layer, QuantizedLinear)
    }
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.dequantized(), stored[f"{name}.weight"].read())
    ids = torch.randint(3, 258, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = [network.decode(ids[:, [i]], torch.tensor([i])) for i in range(24)]
    chunks = even(17, 7)
    ends = np.array([*accumulate(chunks), *range(18, 25)])
    program = ExecuTorchProgram(open_artifact(tmp_path / "artifact"))
    actual = feed(program, ids.numpy(), chunks, 7)
    expected = torch.cat(logits).numpy()[ends - 1]
    assert_near_of_quantized(actual, expected, same=0.2, limit=0.1)
