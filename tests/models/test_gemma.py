"""What Gemma 3 and Gemma 4 promise alike: a step split at its embedding, bfloat16, caches of a
dtype, parameters that come later, and methods that torch.export takes."""

import functools
from itertools import pairwise

import pytest
import torch
from torch.export import Dim
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

from tests.models.driving import even_ends, generate, prefill, prompt
from tokenloop.models.gemma3 import Gemma3, Gemma3Config
from tokenloop.models.gemma4 import Gemma4, Gemma4Config

# sqrt(44) is another number in bfloat16, by 0.1 %.
SMALL = {
    "vocab_size": 97, "hidden_size": 44, "intermediate_size": 78, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14, "sliding_window": 7,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "pad_token_id": 0,
}  # fmt: skip
GEMMA_4 = {
    "global_head_dim": 26, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
}  # fmt: skip
NETWORKS = {
    Gemma3: (Gemma3Config, Gemma3ForCausalLM, Gemma3TextConfig(**SMALL)),
    Gemma4: (Gemma4Config, Gemma4ForCausalLM, Gemma4TextConfig(**SMALL | GEMMA_4)),
}


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__),
]


@functools.cache
def reference(network: type, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model, with the same random weights, which bfloat16 holds, in every dtype."""
    _, cls, config = NETWORKS[network]
    model = cls._from_config(config, attn_implementation="eager", dtype=dtype).eval()
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator) * 0.3
        if "layer_scalar" in name or (network is Gemma4 and "norm" in name):
            values += 1.0
        tensor.copy_(values.bfloat16())
    return model


def ours(network: type, batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    hf = reference(network, dtype)
    config = NETWORKS[network][0].from_dict(hf.config.to_dict())
    with torch.device("meta"):
        model = network(config, 60, batch, dtype=dtype)
    model.load_state_dict(hf.state_dict(), assign=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_those_of_transformers(network, dtype):
    tokens = prompt(20)
    expected = reference(network, dtype).get_input_embeddings()(tokens)
    assert torch.equal(ours(network, dtype=dtype).embed(tokens), expected)


def test_a_step_from_an_embedding_is_a_step_from_its_token(network):
    whole, parts = ours(network, batch=3), ours(network, batch=3)
    for step in range(9):
        token, position = prompt(3, seed=step).T, torch.tensor([step, 3 + step, 20 - step])
        hidden = parts.embed(token)
        assert hidden.shape == (3, 1, SMALL["hidden_size"])
        assert torch.equal(parts.decode_embedded(hidden, position), whole.decode(token, position))


def test_bfloat16_is_as_near_to_float32_as_transformers_is(network):
    tokens = prompt(60)
    with torch.no_grad():
        exact = reference(network)(tokens).logits[0]
        theirs = reference(network, torch.bfloat16)(tokens).logits[0].float()
    model = ours(network, dtype=torch.bfloat16)
    logits = prefill(model, tokens[:, :30], even_ends(30, 5))
    for position in range(30, 60):
        logits.append(model.decode(tokens[:, position : position + 1], torch.tensor([position])))
    logits = torch.cat(logits)
    assert logits.dtype == torch.float32
    compared = [end - 1 for end in even_ends(30, 5)] + list(range(30, 60))
    error = (logits - exact[compared]).square().mean()
    assert error < 1.3 * (theirs - exact)[compared].square().mean()


def test_caches_are_of_the_dtype_asked_for(network):
    model = ours(network, dtype=torch.bfloat16)
    caches = [layer.self_attn.cache for layer in model.model.layers]
    assert {cache.k.dtype for cache in caches} | {cache.v.dtype for cache in caches} == {
        torch.bfloat16
    }
    assert {rope.inv_freq.dtype for rope in model.model.rope.values()} == {torch.float32}


def test_a_model_on_meta_needs_nothing_but_its_parameters(network):
    expected = ours(network)
    with torch.device("meta"):
        model = network(expected.config, 60)
    buffers = dict(model.named_buffers())
    model.to_empty(device="cpu")
    model.lm_head.weight = model.model.embed_tokens.weight
    # to_empty empties what was real as well.
    model.load_state_dict(expected.state_dict())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    assert generate(model, prompt(9), 20)[0] == generate(expected, prompt(9), 20)[0]


class Method(torch.nn.Module):
    """A method of a model as what torch.export takes."""

    def __init__(self, model: torch.nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.name)(*inputs)


@pytest.mark.parametrize("batch", [1, 3])
def test_an_exported_prefill_takes_chunks_of_any_length(network, batch):
    model = ours(network, batch)
    row = [torch.tensor([1])] if batch > 1 else []
    length = Dim("length", max=model.max_chunk)
    program = torch.export.export(
        Method(ours(network, batch), "prefill"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.arange(3), *row),
        dynamic_shapes=((({1: length}, {0: length}, *[None] * len(row))),),
    ).module()
    tokens = prompt(29)
    for start, end in pairwise([0, 5, 12, 14, 18, 25, 29]):
        inputs = tokens[:, start:end], torch.arange(start, end), *row
        torch.testing.assert_close(program(*inputs), model.prefill(*inputs))


@pytest.mark.parametrize("name", ["decode", "decode_embedded"])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_exported_step_gives_the_logits_of_the_model(network, name, batch):
    model = ours(network, batch)
    first = torch.zeros(batch, 1, dtype=torch.int64)
    first = first if name == "decode" else model.embed(first)
    inputs = first, torch.zeros(batch, dtype=torch.int64)
    program = torch.export.export(Method(ours(network, batch), name), inputs).module()
    for step in range(20):
        token, position = prompt(batch, seed=step).T, torch.arange(batch) + step
        inputs = token if name == "decode" else model.embed(token), position
        torch.testing.assert_close(program(*inputs), model.decode(token, position))
