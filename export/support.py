"""Which networks a backend takes, read from what their blocks declare."""

from tokenloop.export.recipes import FOR_BACKEND
from tokenloop.models.decoder import CausalLM


def unsupported(network: CausalLM, backend: str) -> str | None:
    """The parts of the network that the backend does not take, in words. None if it takes all."""
    blocks = network.model.layers
    mixers = [block.mixer for block in blocks]
    types = {m.layer_type for m in mixers}
    if backend == "xnnpack" and "linear_attention" in types:
        return "gated delta nets"
    if backend not in ("portable", "inductor") and "conv" in types:
        return "short convolutions"
    if backend not in ("portable", "inductor") and network.model.streams is not None:
        return "alternating updates"
    if backend in ("xnnpack", "cuda") and network.model.per_layer is not None:
        return "per-layer embeddings"
    if backend in ("xnnpack", "cuda") and any(m.shares for m in mixers):
        return "shared keys and values"
    if backend != "xnnpack":
        return None
    found = {
        "output gates": any(m.output_gate for m in mixers),
        "an expert of all tokens": any(b.mlp.moe and b.mlp.dense for b in blocks),
    }
    return ", ".join(what for what, is_there in found.items() if is_there) or None


def supporting(network: CausalLM) -> list[str]:
    """The backends that take the network, the default first."""
    return [backend for backend in FOR_BACKEND if unsupported(network, backend) is None]
