"""Export a Qwen checkpoint: `python export/qwen3.py --model DIR` makes its artifact."""

import sys
from pathlib import Path

from tokenloop.export.command import Family, main
from tokenloop.export.errors import ExportError


def demo_model() -> Path:
    """There is none: no package has a small Qwen checkpoint."""
    raise ExportError("no --model; give it a .gguf file or a Hugging Face directory")


FAMILY = Family(
    "export/qwen3.py", "Qwen2 or Qwen3", "qwen3", ("tokenloop.models.qwen3",), demo_model
)

if __name__ == "__main__":
    sys.exit(main(FAMILY))
