"""Kill a rank of a run at a random step, and see that the other one ends, and says which it was.

`python tests/kill_ranks.py ARTIFACT 20` does it so many times, with an artifact of
`--tensor-parallel 2`, and prints how long the other took at most. With `--served` they serve, and
die while one answers or waits for what it is asked.
"""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# How long a rank may take that has lost another.
PATIENCE_S = 10.0


def start(artifact: Path, *arguments: str, script: str = "run.py") -> list[subprocess.Popen]:
    """Two ranks of a script of runner/, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(ROOT / "runner" / script), "--artifact", str(artifact)]
    return [
        subprocess.Popen(
            [*command, *arguments], env=os.environ | group | {"RANK": str(rank)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip


def kill_one(artifact: Path, victim: int, delay_s: float) -> tuple[list[str], float]:
    """What rank 0 printed before a rank was killed, so long after its second text; and the seconds
    until the other one had ended, as it must."""
    ranks = start(artifact, "--json", "--max-new-tokens", "100", *["Once upon"] * 200)
    lines = [ranks[0].stdout.readline() for _ in range(2)]
    time.sleep(delay_s)
    return lines, lose(ranks, victim, "runner/run.py")


def kill_served(artifact: Path, victim: int, delay_s: float, answers: bool) -> float:
    """Kill a rank of a server, so long after it began to answer, or to wait; the seconds until the
    other one had ended."""
    ranks = start(artifact, "--port", "0", "--threads", "1", script="serve.py")
    port = port_of(ranks[0])
    with socket.create_connection(("127.0.0.1", port)) as client:
        if answers:
            body = b'{"prompt": "Once", "max_tokens": 190, "n": 64, "temperature": 1}'
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            client.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        time.sleep(delay_s)
        return lose(ranks, victim, "runner/serve.py")


def port_of(server: subprocess.Popen) -> int:
    """Where rank 0 serves, once it does."""
    for line in server.stderr:
        if found := re.search(r" on http://127\.0\.0\.1:(\d+) ", line):
            return int(found[1])
    raise AssertionError("the server did not start")


def lose(ranks: list[subprocess.Popen], victim: int, program: str) -> float:
    """Kill one of two ranks; the seconds until the other one had ended, and said why."""
    ranks[victim].send_signal(signal.SIGKILL)
    since, other = time.monotonic(), ranks[1 - victim]
    try:
        _, errors = other.communicate(timeout=PATIENCE_S)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    # A server's log is there as well.
    told = [line for line in errors.splitlines() if "rror" in line]
    assert told == [f"{program}: error: rank {victim} has ended"], errors
    assert other.returncode == 2, other.returncode
    return time.monotonic() - since


if __name__ == "__main__":
    artifact, count, *served = sys.argv[1:]
    times = []
    for number in range(int(count)):
        victim, delay_s = number % 2, random.random()
        if served == ["--served"]:
            times.append(kill_served(Path(artifact), victim, delay_s, number % 4 < 2))
        else:
            times.append(kill_one(Path(artifact), victim, delay_s)[1])
    print(f"{len(times)} ranks were killed; the other ended within {max(times):.2f} s")
