"""An artifact that is made in seconds, without a checkpoint: bytes, two small tables, and a network
that looks at the newest token and its position alone."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenloop.export.artifact import write_manifest
from tokenloop.export.random_weights import write_byte_tokenizer

VOCAB_SIZE, HIDDEN, POSITIONS, CHUNK = 256, 8, 64, 16
TEMPLATE = """{% for message in messages %}[{{ message.role }}] {{ message.content | trim }}
{% endfor %}{% if add_generation_prompt %}[model] {% endif %}"""


class Prefill(nn.Module):
    """tokens int64 [1, T], positions int64 [T] -> logits float32 [1, V]"""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tokens = nn.Parameter(torch.randn(VOCAB_SIZE, HIDDEN, generator=generator))
        self.positions = nn.Parameter(torch.randn(POSITIONS, HIDDEN, generator=generator))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = self.tokens[tokens[:, -1]] * self.positions[positions[-1:]]
        return hidden @ self.tokens.T


class Greedy(nn.Module):
    """logits float32 [1, V] -> token int64 [1, 1]"""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1, keepdim=True)


def make_toy_artifact(directory: Path) -> None:
    """Fill the directory with a program for ExecuTorch's plain kernels, a tokenizer and a chat
    template."""
    from executorch.exir import ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass

    network, length = Prefill(), torch.export.Dim("length", min=1, max=CHUNK)
    one = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    chunk = torch.zeros(1, CHUNK, dtype=torch.int64), torch.arange(CHUNK)
    programs = {
        "prefill": torch.export.export(network, chunk, dynamic_shapes=[{1: length}, {0: length}]),
        "decode": torch.export.export(network, one),
        "greedy": torch.export.export(Greedy(), (torch.zeros(1, VOCAB_SIZE),)),
    }
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    edge = to_edge(programs, constant_methods={"get_max_context_len": POSITIONS})
    config = ExecutorchBackendConfig(memory_planning_pass=planning)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.pte").write_bytes(edge.to_executorch(config).buffer)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = write_byte_tokenizer(directory) | {"chat_template": "chat_template.jinja"}
    write_manifest(
        directory,
        {
            "model_type": "toy",
            "batch": 1,
            "max_seq_len": POSITIONS,
            "max_prefill": CHUNK,
            "program": {"file": "model.pte"},
            "engine": "executorch",
            "backend": "portable",
            "device": "cpu",
            "methods": sorted(programs),
            "dtype": "float32",
            "state": [],
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "quant": "fp32",
            "tokenizer": tokenizer,
            "checkpoint": {"file": "toy", "sha256": "0" * 64},
        },
    )


if __name__ == "__main__":
    make_toy_artifact(Path(sys.argv[1]))
