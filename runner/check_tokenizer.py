"""What the exporter runs before it begins what takes minutes: the runner's own look at a tokenizer.

`python -m tokenloop.runner.check_tokenizer DIRECTORY` reads the "tokenizer" object of a manifest
to be from standard input. It loads the tokenizer and compiles the chat templates that were written
into the directory. What the runner would refuse is one line on standard output, and status 2.
"""

import json
import sys
from pathlib import Path

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.tokenizer import Tokenizer


def main() -> int:
    directory, entry = Path(sys.argv[1]), json.load(sys.stdin)
    try:
        tokenizer = Tokenizer(directory, entry)
        tokenizer.decode(tokenizer.encode("a"))
        tokenizer.check_templates()
    except RunnerError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
