"""Export a Llama checkpoint: `python export/llama.py` makes the demo model's artifact."""

import sys

from tokenloop.export import demo
from tokenloop.export.command import Family, main

FAMILY = Family("export/llama.py", "Llama", ("llama",), demo.smollm2_135m)

if __name__ == "__main__":
    sys.exit(main(family=FAMILY))
