"""Methods of an ExecuTorch program made of its other methods, without tracing anything again.

`decode` is the embedding lookup and then `decode_embedded`. `greedy_embed` is `greedy` and then the
lookup. Their instructions run one after the other, on the same constants, delegates and state.
ExecuTorch has no way of its own to put emitted programs together.
"""

import copy
import math
from dataclasses import fields, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from executorch.exir import schema
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir.tensor import make_allocation_info

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager
    from executorch.exir._serialize._cord import Cord

# The activations' memory. ExecuTorch's own planning aligns to as much.
ARENA, ALIGNMENT = 1, 16
FLOAT32_BYTES = 4
# The fields in which instructions name values.
VALUE_FIELDS = "args", "move_from", "move_to", "cond_value_index", "value_index"


def link(
    manager: "ExecutorchProgramManager", selection: schema.Program
) -> tuple["Cord", list[str]]:
    """The bytes of a .pte, and its methods' names.

    `manager` has prefill, embed, decode_embedded and constants. `selection` has greedy and sample,
    and neither named data nor mutable buffers with contents.
    """
    program = merge(manager.executorch_program, selection)
    plans = {plan.name: plan for plan in program.execution_plan}
    plans["decode"] = chained("decode", plans["embed"], plans["decode_embedded"])
    for name in sorted({"greedy", "sample"} & plans.keys()):
        fused = f"{name}_embed"
        plans[fused] = chained(fused, plans[name], plans["embed"], keep=True)
    program.execution_plan = list(plans.values())
    file = PTEFile(program, manager._emitter_output.mutable_data, manager._named_data)
    names = [name for name, plan in plans.items() if plan.chains[0].instructions]
    return serialize_pte_binary(file, extract_delegate_segments=True), sorted(names)


def merge(program: schema.Program, other: schema.Program) -> schema.Program:
    """`program` with the methods of both."""
    # Buffer 0 stands for "no constant" in both.
    constants = len(program.constant_buffer) - 1
    delegates = len(program.backend_delegate_data)
    for plan in other.execution_plan:
        for value in plan.values:
            if isinstance(value.val, schema.Tensor) and value.val.data_buffer_idx > 0:
                value.val.data_buffer_idx += constants
        for delegate in plan.delegates:
            assert delegate.processed.location == schema.DataLocation.INLINE
            delegate.processed.index += delegates
    return replace(
        program,
        execution_plan=program.execution_plan + other.execution_plan,
        constant_buffer=program.constant_buffer + other.constant_buffer[1:],
        backend_delegate_data=program.backend_delegate_data + other.backend_delegate_data,
    )


def chained(
    name: str, first: schema.ExecutionPlan, second: schema.ExecutionPlan, keep: bool = False
) -> schema.ExecutionPlan:
    """A method that runs `first` and then `second`, whose first input is the one output of `first`.

    The method takes the inputs of `first` and then the other inputs of `second`. It gives the
    outputs of `second`, after that of `first` if `keep`. That one is float32 without `keep`.
    """
    first, second = copy.deepcopy(first), copy.deepcopy(second)
    (passed,), (taken, *others) = first.outputs, second.inputs
    offset = len(first.values)

    def moved(index: int) -> int:
        # A list of optional tensors has -1 for none.
        return passed if index == taken else index + offset if index >= 0 else index

    # 1. The second method's values come after the first one's, but for the one that is passed.
    second.values[taken].val = schema.Null()
    for value in second.values:
        if isinstance(value.val, (schema.IntList, schema.TensorList, schema.OptionalTensorList)):
            value.val.items = [moved(index) for index in value.val.items]
    (chain,), (before,) = second.chains, first.chains
    for call in (instruction.instr_args for instruction in chain.instructions):
        for field in fields(call):
            index = getattr(call, field.name)
            if field.name in VALUE_FIELDS:
                index = [*map(moved, index)] if isinstance(index, list) else moved(index)
            elif field.name == "op_index":
                index += len(first.operators)
            elif field.name == "delegate_index":
                index += len(first.delegates)
            elif isinstance(call, schema.JumpFalseCall):
                index += len(before.instructions)
            setattr(call, field.name, index)

    # 2. The passed value lies behind all that either method plans, unless the caller has it.
    both = first.non_const_buffer_sizes, second.non_const_buffer_sizes
    sizes = [max(pair) for pair in zip_longest(*both, fillvalue=0)]
    if not keep:
        tensor = first.values[passed].val
        start = -(-sizes[ARENA] // ALIGNMENT) * ALIGNMENT
        tensor.allocation_info = make_allocation_info(ARENA, start)
        sizes[ARENA] = start + FLOAT32_BYTES * math.prod(tensor.sizes)
    inputs = first.inputs + [moved(index) for index in others]
    outputs = [passed] * keep + [moved(index) for index in second.outputs]
    return replace(
        second,
        name=name,
        values=first.values + second.values,
        inputs=inputs,
        outputs=outputs,
        chains=[
            replace(
                chain,
                inputs=inputs,
                outputs=outputs,
                instructions=before.instructions + chain.instructions,
                stacktrace=None,
            )
        ],
        operators=first.operators + second.operators,
        delegates=first.delegates + second.delegates,
        non_const_buffer_sizes=sizes,
    )
