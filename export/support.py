"""Which networks a backend takes, read from what their blocks declare."""

from tokenloop.export.recipes import FOR_BACKEND
from tokenloop.models.decoder import CausalLM

EVERYTHING = "xnnpack", "portable", "inductor"


def unsupported(network: CausalLM, backend: str) -> str | None:
    """The parts of the network that the backend does not take, in words. None if it takes all."""
    mixers = [block.mixer for block in network.model.layers]
    if backend in EVERYTHING:
        return None
    if network.model.streams is not None:
        return "alternating updates"
    if any(m.layer_type == "conv" for m in mixers):
        return "short convolutions"
    if backend == "cuda" and network.model.per_layer is not None:
        return "per-layer embeddings"
    if backend == "cuda" and any(m.shares for m in mixers):
        return "shared keys and values"
    return None


def supporting(network: CausalLM) -> list[str]:
    """The backends that take the network, the default first."""
    return [backend for backend in FOR_BACKEND if unsupported(network, backend) is None]
