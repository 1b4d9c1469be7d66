"""The runner's own check of the tokenizer that was written, in a process of its own.

No module of the exporter imports one of the runner. What the runner refuses is its own concern, so
it is asked, before the minutes that an export takes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenloop.export.errors import ExportError


def check_tokenizer(source: Path, directory: Path, entry: dict[str, Any]) -> None:
    """Let the runner load the tokenizer in `directory` that the manifest's `entry` describes. It
    takes a third of a second, and longer for a large vocabulary.

    Errors: ExportError with the runner's reason for a tokenizer that it would refuse. `source` is
    what the tokenizer was made of.
    """
    command = [sys.executable, "-m", "tokenloop.runner.check_tokenizer", str(directory)]
    checked = subprocess.run(
        command, input=json.dumps(entry), capture_output=True, encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    if checked.returncode == 0:
        return
    if checked.returncode != 2:
        raise ExportError(
            f"{source}: the runner's check of its tokenizer ended with status "
            f"{checked.returncode}: {' '.join(checked.stderr.split())[-300:]}"
        )
    raise ExportError(f"{source}: {checked.stdout.strip().replace(f'{directory}{os.sep}', '')}")
