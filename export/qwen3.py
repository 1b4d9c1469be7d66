"""Export a Qwen checkpoint: `python export/qwen3.py --model DIR` makes its artifact."""

if __name__ == "__main__":
    # Before the imports, which take longest. That of the handler is one.
    from _signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal

    if getsignal(SIGINT) is default_int_handler:
        signal(SIGINT, SIG_DFL)
    from tokenloop.export.process import end_when_interrupted

    end_when_interrupted()

import sys

from tokenloop.export.command import Family, main

FAMILY = Family("export/qwen3.py", "Qwen2 or Qwen3", ("qwen3",))

if __name__ == "__main__":
    sys.exit(main(family=FAMILY))
