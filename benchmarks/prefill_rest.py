"""Norms, gates and embeddings of a chunk: see benchmarks/prefill_kernels.py. All are of memory."""

import time

import torch

from benchmarks.prefill_linear import BYTES_S, equal, table, time_us
from tokenloop.models.kernels.embedding import operator as embedding
from tokenloop.models.kernels.embedding import reference as embedding_reference
from tokenloop.models.kernels.rms_norm import operator as rms_norm
from tokenloop.models.kernels.rms_norm import reference as rms_norm_reference
from tokenloop.models.kernels.sigmoid_gate import operator as sigmoid_gate
from tokenloop.models.kernels.sigmoid_gate import reference as sigmoid_gate_reference

__all__ = ["measure", "table"]

TOKENS, SIZES = (1024, 8192), (2560, 4096, 5376)


def measure(rows: list[dict], deadline: float, repeats: int, dry: bool = False) -> None:
    """Add a row of figures for each operator, size and number of tokens."""
    new = {"device": "cpu" if dry else "cuda", "dtype": torch.bfloat16}
    for size in (40,) if dry else SIZES:
        for tokens in (10,) if dry else TOKENS:
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
            for name, copies, kernel, reference, arguments in ways:
                named = options if "norm" in name else {}
                for counter in (count, none):
                    moved = copies * x.nbytes if counter is count else 0
                    row = {"name": f"{name} {size}", "tokens": tokens, "own": True, "tflops": 0.0}
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
