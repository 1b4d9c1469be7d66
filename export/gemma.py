"""Export a Gemma checkpoint: `python export/gemma.py` makes the demo model's artifact."""

if __name__ == "__main__":
    # Before the imports, which take longest.
    from tokenloop.export.process import end_when_interrupted

    end_when_interrupted()

import sys

from tokenloop.export import demo
from tokenloop.export.command import Family, main

FAMILY = Family("export/gemma.py", "Gemma", ("gemma3", "gemma3n", "gemma4"), demo.gemma3_270m)

if __name__ == "__main__":
    sys.exit(main(family=FAMILY))
