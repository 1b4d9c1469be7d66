"""Export a hybrid Qwen checkpoint: `python export/qwen3_5.py --model DIR` makes its artifact."""

import sys
from pathlib import Path

from tokenloop.export.command import Family, main
from tokenloop.export.errors import ExportError


def demo_model() -> Path:
    """There is none: no package has a small hybrid checkpoint."""
    raise ExportError("no --model; give it a Hugging Face directory")


FAMILY = Family(
    "export/qwen3_5.py",
    "Qwen3.5 or Qwen3-Next",
    "qwen3_5",
    ("tokenloop.models.qwen3_5",),
    demo_model,
    backends=("inductor", "portable"),
)

if __name__ == "__main__":
    sys.exit(main(FAMILY))
