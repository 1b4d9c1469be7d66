"""What could several GPUs give, and several hosts? Computed, not measured: the ceiling that
measurements are held against, with every assumption as a flag.

`python -m benchmarks.tensor_parallel` prints a step's time on 1, 2, 4 and 8 GPUs of one host, what
pipeline parallel over hosts and a prefill of its own would cost and gain, and one JSON line. The
defaults are Gemma 4 31B in bfloat16 on H200s, with the one-card figures of
results/cuda_31b_peer_h200.json and results/prefill_31b.json; keys and values are what a step reads
more at position 8,192 than at 256. Standard library only.
"""

import argparse
import json

GPUS = 1, 2, 4, 8
HOSTS = 1, 2, 4
PROMPTS = 1024, 8192, 32768


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=60)
    add("--hidden", type=int, default=5376)
    add("--step-gb", type=float, default=61.63, help="what a step of one card reads, 1e9 bytes")
    add("--common-gb", type=float, default=0.0, help="how much of that every card reads")
    add("--step-ms", type=float, default=16.803, help="a step of one card, measured")
    add("--bandwidth-tb-s", type=float, default=4.318, help="of a card's memory, measured")
    add("--reduces", type=int, default=2, help="sums in a layer")
    add("--reduce-us", type=float, default=5.0, help="a sum of one row, with residual and norm")
    add("--peer-gb-s", type=float, default=380.0, help="from one card to another, one direction")
    add("--rows", type=int, default=1, help="sequences at once")
    add("--kv-mb-token", type=float, default=0.161, help="keys and values of a token, 1e6 bytes")
    add("--prefill-tok-s", type=float, default=9980.0, help="prompt tokens of one card")
    add("--link-gb-s", type=float, default=50.0, help="between hosts; 400 Gbit/s is 50")
    add("--link-us", type=float, default=10.0, help="latency of a message between hosts")
    add("--cards-a-host", type=int, default=2)
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if value < 0 or value == 0 and name not in ("common_gb", "link_us", "reduce_us"):
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if options.common_gb > options.step_gb:
        parser.error(f"--common-gb is {options.common_gb}, and a step reads {options.step_gb}")
    return options


def step_ms(options: argparse.Namespace, gpus: int) -> dict[str, float]:
    """A step's milliseconds on so many GPUs: what reading takes, what the sums take beside that,
    and both, which is the floor. What one card takes beside reading is divided as the weights are
    in `divided`, and not at all in `undivided`: a measurement lies between the two."""
    shared = (options.step_gb - options.common_gb) / gpus + options.common_gb
    reading = shared / options.bandwidth_tb_s
    sums = 0.0
    if gpus > 1:
        # One shot: each card gives its whole part to every other one, over links of its own.
        row_bytes = 2 * options.hidden * options.rows * (gpus - 1)
        each_us = options.reduce_us + row_bytes / options.peer_gb_s / 1e3
        sums = options.layers * options.reduces * each_us / 1e3
    alone = options.step_gb / options.bandwidth_tb_s
    overhead, floor = max(0.0, options.step_ms - alone), reading + sums
    return {
        "reading": reading, "sums": sums, "floor": floor,
        "divided": floor + overhead * reading / alone, "undivided": floor + overhead,
    }  # fmt: skip


def pipeline(options: argparse.Namespace, hosts: int) -> dict[str, float]:
    """So many hosts with a part of the layers each. A step of one sequence goes through all, so it
    is no faster; with as many groups of rows as hosts all of them are busy."""
    within = step_ms(options, options.cards_a_host)["undivided"]
    message = 2 * options.hidden * options.rows
    hop_ms = options.link_us / 1e3 + message / options.link_gb_s / 1e6
    # A token's id goes back to the first host.
    latency = within + hosts * hop_ms * (hosts > 1)
    stage = within / hosts + hop_ms * (hosts > 1)
    return {
        "gb_a_card": options.step_gb / options.cards_a_host / hosts,
        "hop_ms": hop_ms, "latency_ms": latency,
        "tok_s": options.rows * 1e3 / stage, "tok_s_a_host": options.rows * 1e3 / stage / hosts,
    }  # fmt: skip


def disaggregated(options: argparse.Namespace, tokens: int) -> dict[str, float]:
    """A prompt of so many tokens that another host prefills: what it takes there, what moving its
    keys and values takes, and how many steps of the rows beside it would have waited."""
    cards = options.cards_a_host
    prefill = tokens / (options.prefill_tok_s * cards) * 1e3
    moving = options.link_us / 1e3 + tokens * options.kv_mb_token / options.link_gb_s
    return {
        "prefill_ms": prefill, "moving_ms": moving, "share": moving / prefill,
        "steps_spared": prefill / step_ms(options, cards)["undivided"],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    found = {
        "benchmark": "tensor_parallel", "computed": True, "assumptions": vars(options),
        "gpus": {n: step_ms(options, n) for n in GPUS},
        "hosts": {n: pipeline(options, n) for n in HOSTS},
        "prompts": {n: disaggregated(options, n) for n in PROMPTS},
    }  # fmt: skip
    alone = found["gpus"][1]["undivided"]
    print(f"{options.rows} rows, computed: a step in ms, and how many times as fast as one card")
    print(
        f"{'GPUs':>6}{'reading':>10}{'sums':>8}{'floor':>9}{'divided':>10}{'x':>6}"
        f"{'undivided':>12}{'x':>6}"
    )
    for n, row in found["gpus"].items():
        print(
            f"{n:>6}{row['reading']:>10.2f}{row['sums']:>8.2f}{row['floor']:>9.2f}"
            f"{row['divided']:>10.2f}{alone / row['divided']:>6.2f}"
            f"{row['undivided']:>12.2f}{alone / row['undivided']:>6.2f}"
        )
    print(f"\npipeline parallel over hosts of {options.cards_a_host} GPUs, computed")
    print(f"{'hosts':>6}{'GB a card':>11}{'hop ms':>8}{'step ms':>9}{'tok/s':>9}{'a host':>9}")
    for n, row in found["hosts"].items():
        print(
            f"{n:>6}{row['gb_a_card']:>11.1f}{row['hop_ms']:>8.3f}{row['latency_ms']:>9.2f}"
            f"{row['tok_s']:>9.1f}{row['tok_s_a_host']:>9.1f}"
        )
    print("\nprompts that another host prefills, computed")
    print(f"{'tokens':>8}{'prefill ms':>12}{'moving ms':>11}{'share':>8}{'steps spared':>14}")
    for n, row in found["prompts"].items():
        print(
            f"{n:>8}{row['prefill_ms']:>12.1f}{row['moving_ms']:>11.2f}{row['share']:>8.1%}"
            f"{row['steps_spared']:>14.1f}"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
