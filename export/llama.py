"""Export a Llama checkpoint: `python export/llama.py` makes the demo model's artifact."""

if __name__ == "__main__":
    # Before the imports, which take longest. That of the handler is one.
    from _signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal

    if getsignal(SIGINT) is default_int_handler:
        signal(SIGINT, SIG_DFL)
    from tokenloop.export.process import end_when_interrupted

    end_when_interrupted()

import sys

from tokenloop.export import demo
from tokenloop.export.command import Family, main

FAMILY = Family("export/llama.py", "Llama", ("llama",), demo.smollm2_135m)

if __name__ == "__main__":
    sys.exit(main(family=FAMILY))
