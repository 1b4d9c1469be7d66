"""Kill a rank of a run at a random step, and see that the other one ends, and says which it was.

`python tests/kill_ranks.py ARTIFACT 20` does it so many times, with an artifact of
`--tensor-parallel 2`, and prints how long the other took at most.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# How long a rank may take that has lost another.
PATIENCE_S = 10.0


def start(artifact: Path, *arguments: str) -> list[subprocess.Popen]:
    """Two ranks of runner/run.py, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(ROOT / "runner/run.py"), "--artifact", str(artifact)]
    return [
        subprocess.Popen(
            [*command, *arguments], env=os.environ | group | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip


def kill_one(artifact: Path, victim: int, delay_s: float) -> tuple[list[str], float]:
    """What rank 0 printed before a rank was killed, so long after its second text; and the seconds
    until the other one had ended, as it must."""
    ranks = start(artifact, "--json", "--max-new-tokens", "100", *["Once upon"] * 200)
    lines = [ranks[0].stdout.readline() for _ in range(2)]
    time.sleep(delay_s)
    ranks[victim].send_signal(signal.SIGKILL)
    since, other = time.monotonic(), ranks[1 - victim]
    try:
        _, errors = other.communicate(timeout=PATIENCE_S)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    told = f"runner/run.py: error: rank {victim} has ended\n"
    assert (other.returncode, errors) == (2, told), (other.returncode, errors)
    return lines, time.monotonic() - since


if __name__ == "__main__":
    times = [
        kill_one(Path(sys.argv[1]), number % 2, random.random())[1]
        for number in range(int(sys.argv[2]))
    ]
    print(f"{len(times)} ranks were killed; the other ended within {max(times):.2f} s")
