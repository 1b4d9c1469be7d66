"""How fast is the sampler on a CUDA GPU, beside torch's own ways, and how fast could it be?
`python -m benchmarks.sampler_cuda` prints the ceiling, the figures, and one JSON line.
(benchmarks/sampler.py asks the same of ExecuTorch's CPU kernels.)

Kernel time is of CUDA graphs of many calls, between events. The time of a step is a clock's, from
the launch until the tokens are read on the host. Figures are medians. Every token is compared with
the reference's on the CPU.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cuda_common import (
    capture,
    copy_bandwidth,
    device_us,
    heading,
    kernel_options,
    kernel_parser,
    origin,
    save,
)
from tokenloop.sampler.greedy import greedy
from tokenloop.sampler.kernels import operator
from tokenloop.sampler.sample import sample

VOCABULARIES = 151_936, 262_144
BATCHES = 1, 4, 16, 32
TEMPERATURE = 0.8
# Of each case: top_k, top_p, which rows are greedy (all, none, or every other), and the logits.
CASES = {
    "greedy": (0, 1.0, "all", "zipf"),
    "sampled": (0, 1.0, "none", "zipf"),
    "half greedy, half sampled": (0, 1.0, "half", "zipf"),
    "top-p 0.95": (0, 0.95, "none", "zipf"),
    "top-k 40, top-p 0.95": (40, 0.95, "none", "zipf"),
    "half greedy, half top-k": (40, 0.95, "half", "zipf"),
    "top-p 0.95, flat logits": (0, 0.95, "none", "flat"),
}
# Probabilities like those of words, 1 / rank^1.2 at temperature 1, or thousands much alike.
EXPONENT, FLAT_SPREAD = 1.2, 4.0
CALLS = 20
# In place of the sampler's own: tokens of a part, warps of a tile, parts that are scored at once.
PARTS, WARPS, GROUPS = (128, 256), (4, 8), (2, 4, 8)
COLD_BYTES = 256e6  # several times the largest L2
HEADER = (
    f"{'case':<26}{'V':>8}{'B':>4}{'floor':>8}{'ours':>8}{'torch':>9}"
    f"{'step: ours':>12}{'torch':>9}{'loop':>10}{'launches':>15}{'copies':>10}{'wrong':>7}"
)


@dataclass(frozen=True)
class Work:
    """Logits of one case on the GPU, several sets of them, and the rows' parameters."""

    sets: list[Tensor]
    parameters: tuple[Tensor, ...]
    top_k: int
    top_p: float
    greedy_rows: list[bool]


def make_work(case: str, vocabulary: int, batch: int, cold: bool) -> Work:
    top_k, top_p, rows, kind = CASES[case]
    size = batch * vocabulary * 4
    count = int(COLD_BYTES // size) + 1 if cold else 1
    generator = torch.Generator("cuda").manual_seed(vocabulary + batch)
    ranks = torch.arange(1, vocabulary + 1, device="cuda")
    sets = []
    for _ in range(count):
        logits = torch.randn(batch, vocabulary, generator=generator, device="cuda") * FLAT_SPREAD
        if kind == "zipf":
            logits = -EXPONENT * ranks.log()[logits.argsort(-1).argsort(-1)]
        sets.append(logits)
    greedy_rows = [rows == "all" or (rows == "half" and i % 2 == 1) for i in range(batch)]
    temperature = [0.0 if is_greedy else TEMPERATURE for is_greedy in greedy_rows]
    integers = {"dtype": torch.int64, "device": "cuda"}
    parameters = (
        torch.tensor(temperature, device="cuda"),
        torch.full((batch,), top_k, **integers),
        torch.full((batch,), top_p, device="cuda"),
        torch.arange(batch, **integers) * 7919,
        torch.full((batch,), 100, **integers),
    )
    return Work(sets, parameters, top_k, top_p, greedy_rows)


def torch_sample(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """torch's usual sampling, with the steps of transformers' warpers."""
    logits = logits / TEMPERATURE
    if top_k:
        kth = torch.topk(logits, top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ascending, order = torch.sort(logits, descending=False)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[:, -1:] = False
        logits = logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)


def ways(work: Work) -> dict[str, Callable[[Tensor], Tensor | list[int]]]:
    """Of each way its function from logits to tokens, on the GPU or already on the host. torch
    has no batched one where rows differ."""

    def ours(logits: Tensor) -> Tensor:
        if all(work.greedy_rows):
            return operator.greedy(logits)
        restricted = work.top_k > 0 or work.top_p < 1
        return operator.sample(logits, *work.parameters, restricted=restricted)

    def loop(logits: Tensor) -> list[int]:
        return [
            int(
                torch.argmax(logits[i])
                if is_greedy
                else torch_sample(logits[i : i + 1], work.top_k, work.top_p)
            )
            for i, is_greedy in enumerate(work.greedy_rows)
        ]

    functions = {"ours": ours, "loop": loop}
    if all(work.greedy_rows):
        functions["torch"] = lambda logits: torch.argmax(logits, -1, keepdim=True)
    elif not any(work.greedy_rows):
        functions["torch"] = lambda logits: torch_sample(logits, work.top_k, work.top_p)
    return functions


def graph_us(function: Callable[[Tensor], Tensor], sets: list[Tensor], repeats: int) -> list[float]:
    """Microseconds of each call, on one of the logits after the other."""
    count = max(CALLS, len(sets))
    graph, _ = capture([lambda i=i: function(sets[i % len(sets)]) for i in range(count)])
    return device_us(graph.replay, count, repeats)


def wall_us(step: Callable[[], object], repeats: int) -> list[float]:
    """Microseconds of each step, which ends with tokens on the host."""
    times = []
    for i in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if i >= 3:
            times.append((time.perf_counter() - start) * 1e6)
    return times


def count_events(step: Callable[[], object]) -> tuple[int, int]:
    """(kernel launches, copies from the device) of one step."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    names = [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    return len(kernels), sum(name.startswith("Memcpy DtoH") for name in names)


def mismatches(work: Work) -> int:
    """Tokens that are not the CPU reference's."""
    logits = work.sets[0]
    got = ways(work)["ours"](logits).cpu()
    if all(work.greedy_rows):
        return int((got != greedy(logits.cpu())).sum())
    expected = sample(logits.cpu(), *(x.cpu() for x in work.parameters))
    return int((got != expected).sum())


def measure(work: Work, repeats: int) -> dict:
    """A case's figures, those of each way by its name."""
    result = {"wrong": mismatches(work)}
    for name, function in ways(work).items():

        def step(function=function):
            tokens = function(work.sets[0])
            return tokens if isinstance(tokens, list) else tokens.tolist()

        launches, copies = count_events(step)
        figures = {"launches": launches, "copies": copies}
        # torch.multinomial is timed as it is called; the others can be captured.
        if name == "ours" or (name == "torch" and all(work.greedy_rows)):
            figures["device_us"] = graph_us(function, work.sets, repeats)
            graph, token = capture([lambda function=function: function(work.sets[0])])

            def step(graph=graph, token=token):
                graph.replay()
                return token.tolist()

        elif name == "torch":

            def calls_of_torch(function=function):
                for i in range(CALLS):
                    function(work.sets[i % len(work.sets)])

            figures["device_us"] = device_us(calls_of_torch, CALLS, repeats)
        figures["step_us"] = wall_us(step, repeats)
        result[name] = {
            key: statistics.median(value) if isinstance(value, list) else value
            for key, value in figures.items()
        }
    return result


def measure_cuts(repeats: int) -> list[dict]:
    """Selection without top_k and top_p, with other tiles, parts, warps and groups than the
    sampler's own."""
    print(
        f"{'case':<26}{'V':>8}{'B':>4}{'tile':>7}{'part':>6}{'warps':>6}{'groups':>7}{'us':>8}"
        f"{'wrong':>7}"
    )
    names = "PART", "WARPS", "GROUPS", "STRIDE"
    rows, own = [], [getattr(operator, name) for name in names]
    cases = itertools.product(
        VOCABULARIES,
        ("greedy", "sampled", "half greedy, half sampled"),
        ((1, (1024,)), (32, (1024, 2048, 4096))),
    )
    try:
        for vocabulary, case, (batch, tiles) in cases:
            work = make_work(case, vocabulary, batch, False)
            expected = sample(work.sets[0].cpu(), *(x.cpu() for x in work.parameters))
            if case == "greedy":
                cuts = [(own[0], warps, own[2]) for warps in WARPS]
            else:
                cuts = [*itertools.product(PARTS, WARPS, own[2:3])]
                cuts += [(own[0], own[1], groups) for groups in GROUPS if groups != own[2]]
            for tile, (part, warps, groups) in itertools.product(tiles, cuts):
                for name, value in zip(names, (part, warps, groups, 128 * warps)):
                    setattr(operator, name, value)

                def ours(logits: Tensor, work=work, tile=tile) -> Tensor:
                    if all(work.greedy_rows):
                        return operator.greedy(logits, tile=tile)
                    return operator.sample(logits, *work.parameters, restricted=False, tile=tile)

                us = statistics.median(graph_us(ours, work.sets, repeats))
                wrong = int((ours(work.sets[0]).cpu() != expected).sum())
                row = {"case": case, "vocabulary": vocabulary, "batch": batch, "tile": tile}
                row |= {"part": part, "warps": warps, "groups": groups}
                rows.append(row | {"us": us, "wrong": wrong})
                print(
                    f"{case:<26}{vocabulary:>8}{batch:>4}{tile:>7}{part:>6}{warps:>6}{groups:>7}"
                    f"{us:>8.2f}{wrong:>7}",
                    flush=True,
                )
    finally:
        for name, value in zip(names, own):
            setattr(operator, name, value)
    return rows


def print_row(case: str, vocabulary: int, batch: int, floor_us: float, result: dict) -> None:
    names = ("ours", "torch", "loop")

    def figure(name: str, key: str, width: int) -> str:
        value = result.get(name, {}).get(key)
        text = "-" if value is None else f"{value:,.1f}" if isinstance(value, float) else str(value)
        return f"{text:>{width}}"

    print(
        f"{case:<26}{vocabulary:>8}{batch:>4}{floor_us:>8.1f}"
        f"{figure('ours', 'device_us', 8)}{figure('torch', 'device_us', 9)}"
        f"{figure('ours', 'step_us', 12)}{figure('torch', 'step_us', 9)}"
        f"{figure('loop', 'step_us', 10)}"
        f"{'/'.join(figure(name, 'launches', 0) for name in names):>15}"
        f"{'/'.join(figure(name, 'copies', 0) for name in names):>10}{result['wrong']:>7}",
        flush=True,
    )


def main() -> None:
    parser = kernel_parser("sampler_cuda", __doc__, 20)
    parser.add_argument(
        "--cold", action="store_true", help="rotate among logits that no cache can hold"
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    options = kernel_options(parser, None)

    bandwidth = copy_bandwidth()
    print(heading(bandwidth))
    print("microseconds a call on the device, and a step with its tokens read; ours/torch/loop")
    print(HEADER)
    count_events(lambda: torch.zeros(1, device="cuda").item())  # starts the profiler
    rows = []
    for vocabulary in VOCABULARIES:
        for case in options.only:
            for batch in BATCHES:
                work = make_work(case, vocabulary, batch, options.cold)
                floor_us = batch * vocabulary * 4 / bandwidth * 1e6
                result = measure(work, options.repeats)
                print_row(case, vocabulary, batch, floor_us, result)
                shape = {"case": case, "vocabulary": vocabulary, "batch": batch}
                rows.append(shape | {"floor_us": floor_us} | result)
    cuts = measure_cuts(options.repeats)
    answer = origin("sampler_cuda") | {
        "copy_tb_s": bandwidth / 1e12,
        "cold": options.cold,
        "repeats": options.repeats,
        "rows": rows,
        "cuts": cuts,
    }
    save(answer, options.output)


if __name__ == "__main__":
    main()
