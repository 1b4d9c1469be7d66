"""Which networks a backend takes, read from what their blocks declare."""

from tokenloop.export.recipes import FOR_BACKEND
from tokenloop.models.decoder import CausalLM

EVERYTHING = "xnnpack", "portable", "inductor"


def unsupported(network: CausalLM, backend: str) -> str | None:
    """The parts of the network that the backend does not take, in words. None if it takes all."""
    if backend in EVERYTHING:
        return None
    mixers = [block.mixer for block in network.model.layers]
    if any(m.layer_type == "conv" for m in mixers):
        return "short convolutions"
    if network.model.per_layer is not None:
        return "per-layer embeddings"
    return "shared keys and values" if any(m.shares for m in mixers) else None


def supporting(network: CausalLM) -> list[str]:
    """The backends that take the network, the default first."""
    return [backend for backend in FOR_BACKEND if unsupported(network, backend) is None]
