"""A program as JSON comes back as it was, and is made of nothing but a program's classes."""

import json

import pytest
from executorch.exir import schema

from tokenloop.export.pte.program_json import from_json, to_json


def program() -> schema.Program:
    """One of every kind of value, instruction and enumeration."""
    tensor = schema.Tensor(
        scalar_type=schema.ScalarType.FLOAT,
        storage_offset=0,
        sizes=[3, 7],
        dim_order=[0, 1],
        requires_grad=False,
        layout=0,
        data_buffer_idx=1,
        allocation_info=schema.AllocationDetails(1, 2**31, 5),
        shape_dynamism=schema.TensorShapeDynamism.DYNAMIC_BOUND,
        extra_tensor_info=schema.ExtraTensorInfo(fully_qualified_name="wü", location=1),
    )
    values = [
        *(schema.Null(), schema.Int(-(2**63)), schema.Bool(True), schema.String("é\n")),
        *(schema.Double(0.1), schema.Double(float("inf")), schema.Double(-5e-324)),
        *(tensor, schema.IntList([1]), schema.DoubleList([1.5]), schema.BoolList([False])),
        *(schema.TensorList([7]), schema.OptionalTensorList([-1])),
    ]
    calls = [
        *(schema.KernelCall(0, [1, 2]), schema.DelegateCall(0, []), schema.MoveCall(1, 2)),
        *(schema.JumpFalseCall(1, 2), schema.FreeCall(3)),
    ]
    frames = schema.FrameList([schema.Frame("file", 1, "name", "context")])
    delegate = schema.BackendDelegate(
        "XnnpackBackend",
        schema.BackendDelegateDataReference(schema.DataLocation.INLINE, 0),
        [schema.CompileSpec("key", b"\x00\xff")],
    )
    plan = schema.ExecutionPlan(
        name="greedy",
        container_meta_type=schema.ContainerMetadata("in", "out"),
        values=[schema.EValue(value) for value in values],
        inputs=[7],
        outputs=[1],
        chains=[schema.Chain([7], [1], [schema.Instruction(call) for call in calls], frames)],
        operators=[schema.Operator("aten::add", "out")],
        delegates=[delegate],
        non_const_buffer_sizes=[0, 2**40],
        non_const_buffer_device=[schema.NonConstBufferDevice(1, schema.DeviceType.CUDA, 0)],
    )
    return schema.Program(
        version=0,
        execution_plan=[plan],
        constant_buffer=[schema.Buffer(b""), schema.Buffer(bytes(range(256)))],
        backend_delegate_data=[schema.BackendDelegateInlineData(b"data")],
        segments=[schema.DataSegment(0, 8)],
        constant_segment=schema.SubsegmentOffsets(0, [0, 8]),
        mutable_data_segments=[schema.SubsegmentOffsets(1, [0])],
        named_data=[schema.NamedData("key", 0)],
    )


def test_a_program_comes_back_as_it_was():
    back = from_json(to_json(program()))
    assert back == program()
    # Of two equal values only one may be an enumeration's.
    assert repr(back) == repr(program())


@pytest.mark.parametrize("name", ["Popen", "Path", "Union", "dataclass", "Program.__init__"])
def test_nothing_but_a_programs_classes_is_made(name):
    for content in ({}, 1, {"args": ["true"]}):
        with pytest.raises((KeyError, TypeError)):
            from_json(json.dumps({name: content}).encode())


def test_what_has_no_place_in_a_program_is_refused():
    with pytest.raises(TypeError, match="a program with a set"):
        to_json(schema.Program(0, [], [], [], {1}, None))
