"""Which networks a backend takes, read from what their blocks declare."""

from tokenloop.export.recipes import FOR_BACKEND
from tokenloop.models.decoder import CausalLM


def unsupported(network: CausalLM, backend: str) -> str | None:
    """The parts of the network that the backend does not take, in words. None if it takes all."""
    blocks = network.model.layers
    mixers = [block.mixer for block in blocks]
    types = {m.layer_type for m in mixers}
    if backend not in ("portable", "inductor", "xnnpack") and "conv" in types:
        return "short convolutions"
    if backend not in ("portable", "inductor") and network.model.per_layer is not None:
        return "per-layer embeddings"
    if backend not in ("portable", "inductor") and any(m.shares for m in mixers):
        return "shared keys and values"
    if backend == "xnnpack" and any(b.mlp.moe and b.mlp.reads_residual for b in blocks):
        return "an expert of all tokens"
    return None


def supporting(network: CausalLM) -> list[str]:
    """The backends that take the network, the default first."""
    return [backend for backend in FOR_BACKEND if unsupported(network, backend) is None]
