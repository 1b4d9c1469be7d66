"""What a .pte for ExecuTorch's CudaBackend has, read from its own bytes.

    python -m benchmarks.pte_listing ARTIFACT... [--output FILE.json]

For each method: inputs and outputs with the device that the program says, delegates, operators
outside them, planned memory by device, the size of the compiled library and what it asks of the
runtime, and how many weights it takes. Weights that several methods take are there once.
"""

import argparse
import hashlib
import json
import math
from collections import Counter
from pathlib import Path

from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import DelegateCall, DeviceType, ExecutionPlan, Tensor

from tokenloop.export.pte.cuda_library import decode, imports, missing_shims


def tensor(value: Tensor) -> str:
    """Such as "int64[1, 3] cuda"."""
    info = value.extra_tensor_info
    device = DeviceType.CPU if info is None else info.device_type
    return f"{value.scalar_type.name.lower()}{list(value.sizes)} {device.name.lower()}"


def method(plan: ExecutionPlan, payloads: list[bytes], named: dict[str, bytes]) -> dict:
    """A method's entry."""
    devices = {entry.buffer_idx: entry.device_type for entry in plan.non_const_buffer_device or []}
    planned = Counter()
    for i, size in enumerate(plan.non_const_buffer_sizes):
        planned[devices.get(i, DeviceType.CPU).name.lower()] += size
    instructions = [each for chain in plan.chains for each in chain.instructions]
    calls = [each for each in instructions if isinstance(each.instr_args, DelegateCall)]
    delegates = []
    for delegate in plan.delegates:
        key, constants = decode(payloads[delegate.processed.index])
        library = named[key]
        delegates.append(
            {
                "backend": delegate.id,
                "specs": {spec.key: bytes(spec.value).decode() for spec in delegate.compile_specs},
                "library_bytes": len(library),
                "library_sha256": hashlib.sha256(library).hexdigest(),
                "shims": sorted(n for n in imports(library) if n.startswith("aoti_torch_")),
                "missing_shims": missing_shims(library),
                "constants": len(constants),
                "constant_bytes": sum(each.nbytes for each in constants),
                "keys": sorted(each.key for each in constants),
            }
        )
    return {
        "inputs": [tensor(plan.values[i].val) for i in plan.inputs],
        "outputs": [tensor(plan.values[i].val) for i in plan.outputs],
        "delegates": delegates,
        "calls": len(calls),
        "other_instructions": len(instructions) - len(calls),
        "operators": [f"{each.name}.{each.overload}" for each in plan.operators],
        "planned_bytes": dict(planned),
    }


def listing(artifact: Path) -> dict:
    """The entry of an artifact's directory."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    file = deserialize_pte_binary((artifact / manifest["program"]["file"]).read_bytes())
    named = {
        key: bytes(file.named_data.buffers[entry.buffer_index])
        for key, entry in file.named_data.pte_data.items()
    }
    payloads = [bytes(each.data) for each in file.program.backend_delegate_data]
    plans = {plan.name: plan for plan in file.program.execution_plan}
    methods = {
        name: method(plan, payloads, named) for name, plan in plans.items() if plan.delegates
    }
    users = Counter(k for entry in methods.values() for d in entry["delegates"] for k in d["keys"])
    for entry in methods.values():
        for delegate in entry["delegates"]:
            keys = delegate.pop("keys")
            delegate["shared_constants"] = sum(users[key] > 1 for key in keys)
    return {
        "versions": manifest["versions"],
        "processor": manifest.get("processor"),
        "batch": manifest["batch"],
        "dtype": manifest["dtype"],
        "max_seq_len": manifest["max_seq_len"],
        "files": manifest["files"],
        "constants": {
            name: plan.values[plan.outputs[0]].val.__dict__
            for name, plan in plans.items()
            if not plan.delegates and len(plan.outputs) == 1
        },
        "weight_keys": len(users),
        "methods": methods,
    }


def table(entry: dict) -> list[str]:
    """Lines for people."""
    lines = [
        f"{'method':24} {'delegate':12} {'library':>9} {'weights':>9} {'planned on the GPU':>18}"
    ]
    for name, each in sorted(entry["methods"].items()):
        delegate = each["delegates"][0]
        lines.append(
            f"{name:24} {delegate['backend']:12} {delegate['library_bytes'] / 1e6:6.2f} MB "
            f"{delegate['constant_bytes'] / 1e6:6.1f} MB "
            f"{each['planned_bytes'].get('cuda', 0) / 1e6:15.3f} MB"
            + (f"  lacks {', '.join(delegate['missing_shims'])}" * bool(delegate["missing_shims"]))
        )
    total = math.fsum(file["bytes"] for file in entry["files"].values())
    return [*lines, f"{total / 1e6:.1f} MB in {len(entry['files'])} files"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    entries = {path.name: listing(path) for path in options.artifacts}
    if options.output:
        options.output.write_text(json.dumps(entries, indent=1) + "\n")
    for name, entry in entries.items():
        print(name, *table(entry), sep="\n")


if __name__ == "__main__":
    main()
