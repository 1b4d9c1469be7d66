"""How fast are norms, gates and embeddings of a packed chunk on a CUDA GPU? All are of memory.
`python -m benchmarks.norms_chunk` prints a table.
"""

import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.chunk_common import BYTES_S, equal, run, time_us
from tokenloop.models.kernels.embedding import operator as embedding
from tokenloop.models.kernels.embedding import reference as embedding_reference
from tokenloop.models.kernels.rms_norm import operator as rms_norm
from tokenloop.models.kernels.rms_norm import reference as rms_norm_reference
from tokenloop.models.kernels.sigmoid_gate import operator as sigmoid_gate
from tokenloop.models.kernels.sigmoid_gate import reference as sigmoid_gate_reference

TOKENS, SIZES = (1024, 8192), (2560, 4096, 5376)
PARTS = 0, 512, 1024, 2048


def normed(whole: int, part: int, kernel: Callable) -> Callable:
    """The operator, but rows that are wider than `whole` are normed in parts."""

    def call(*arguments, **named):
        kept = rms_norm.WHOLE, rms_norm.PART
        rms_norm.WHOLE, rms_norm.PART = whole, part
        try:
            return kernel(*arguments, **named)
        finally:
            rms_norm.WHOLE, rms_norm.PART = kept

    return call


def measure(
    rows: list[dict], deadline: float, repeats: int, dry: bool = False,
    tokens: Sequence[int] = (), only: Sequence[str] = (),
) -> None:  # fmt: skip
    """Add a row of figures for each operator, size and number of tokens."""
    new = {"device": "cpu" if dry else "cuda", "dtype": torch.bfloat16}
    counts = (10,) if dry else tokens or TOKENS
    for size in (40,) if dry else SIZES:
        for tokens in counts:
            x, branch, wide = (torch.randn(tokens, n * size, **new) for n in (1, 1, 2))
            table_of_tokens = torch.randn(64 if dry else 50_000, size, **new)
            ids = torch.arange(tokens, device=new["device"]) * 37 % len(table_of_tokens)
            weight = torch.randn(size, **new)
            count = torch.tensor([tokens], dtype=torch.int32, device=new["device"])
            none = torch.zeros_like(count)
            options = {"eps": 1e-6}
            residual = (x, branch, None, None, weight)
            sandwich = (x, branch, weight, weight[:1], weight)
            gate = wide[:, size:]
            # Copies of a row that each reads or writes, and what gives the right result.
            ways = [
                ("add_norm", 4, rms_norm.add_norm, rms_norm_reference.add_norm, residual),
                ("add_norm post", 4, rms_norm.add_norm, rms_norm_reference.add_norm, sandwich),
                ("norm", 2, rms_norm.norm, rms_norm_reference.norm, (x, weight)),
                (
                    "gate", 3, sigmoid_gate.sigmoid_gate, sigmoid_gate_reference.sigmoid_gate,
                    (x, gate),
                ),
                (
                    "embed", 2, embedding.embed_chunk, embedding_reference.embed_chunk,
                    (ids, table_of_tokens),
                ),
            ]  # fmt: skip
            # The norm cut in other ways, whose bits are those of a row in one part.
            for part in (16,) if dry else PARTS:
                for name, copies, kernel, _, arguments in ways[:2]:
                    cut = normed(32 if part else size, part, kernel)
                    label = f"{name} by {part}" if part else f"{name} whole"
                    ways.append((label, copies, cut, normed(size, 0, kernel), arguments))
            ways = [way for way in ways if not only or any(part in way[0] for part in only)]
            for name, copies, kernel, reference, arguments in ways:
                named = options if "norm" in name else {}
                for counter in (count, none):
                    moved = copies * x.nbytes if counter is count else 0
                    row = {"name": f"{name} {size}", "tokens": tokens, "tflops": 0.0}
                    row["own"] = " by " not in name and "whole" not in name
                    row["floor_us"], row["bits"] = moved / BYTES_S * 1e6, "-"
                    row["way"] = "all tokens" if counter is count else "no token"
                    rows.append(row)
                    try:
                        if counter is count:
                            got = kernel(*arguments, counter, **named)
                            right = reference(*arguments, counter, **named)
                            got, right = (v[1] if "add" in name else v for v in (got, right))
                            row["bits"] = equal(got, right)
                        call = lambda f=kernel, a=(*arguments, counter), o=named: f(*a, **o)  # noqa: E731
                        row["us"] = time_us([call] * 4, repeats, dry)
                        row["tb_s"] = moved / row["us"] / 1e6
                    # Triton's and CUDA's failures have no common type; the next may work.
                    except Exception as failure:
                        row["failure"] = f"{type(failure).__name__}: {failure}".split("\n")[0][:90]
    print(f"rest done, {deadline - time.monotonic():.0f} s left", flush=True)


if __name__ == "__main__":
    run("norms_chunk", __doc__, measure)
