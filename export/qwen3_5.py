"""Export a hybrid Qwen checkpoint: `python export/qwen3_5.py --model DIR` makes its artifact."""

import sys

from tokenloop.export.command import Family, main

FAMILY = Family("export/qwen3_5.py", "Qwen3.5 or Qwen3-Next", ("qwen3_5",))

if __name__ == "__main__":
    sys.exit(main(family=FAMILY))
