"""Export a hybrid Qwen checkpoint: `python export/qwen3_5.py --model DIR` makes its artifact."""

if __name__ == "__main__":
    # Before the imports, which take longest. That of the handler is one.
    from _signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal

    if getsignal(SIGINT) is default_int_handler:
        signal(SIGINT, SIG_DFL)
    from tokenloop.export.process import end_when_interrupted

    end_when_interrupted()

import sys

from tokenloop.export.command import Family, main

FAMILY = Family("export/qwen3_5.py", "Qwen3.5 or Qwen3-Next", ("qwen3_5",))

if __name__ == "__main__":
    sys.exit(main(family=FAMILY))
