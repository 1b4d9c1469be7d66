"""How Inductor compiles a method for CudaBackend: each kernel in one form, so that no forms are
timed. Timing takes most of an export, and what wins differs from one export to the next."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from executorch.backends.cuda.cuda_backend import CudaBackend
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch._inductor import codecache, config
from torch._inductor.choices import InductorChoices
from torch._inductor.cpp_builder import convert_cubin_to_obj
from torch._inductor.cpu_vec_isa import valid_vec_isa_list
from torch._inductor.kernel_template_choice import KernelTemplateChoice
from torch._inductor.virtualized import V
from triton import Config

# CudaBackend's max_autotune is to be off beside these.
OPTIONS = {
    # The runtime has no products of matrices, so that they are Triton's.
    "max_autotune_gemm": True,
    "triton.autotune_pointwise": False,
    # Whether a product is padded would be timed.
    "shape_padding": False,
    # One form for each reduction, and an error where anything else would be timed.
    "deterministic": True,
    # The wrapper only launches kernels, and optimizing it takes a third of the whole time.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    # Nothing is computed on the CPU. Inductor would look for its best instructions by building and
    # loading libraries, in processes that import torch each: most of a first method's time.
    "cpp.vec_isa_ok": False,
}
# Rows, columns and depth of a product's blocks. A step reads weights: many blocks share that.
FEW_ROWS, MANY_ROWS = (16, 32, 128), (64, 64, 64)
# The forms of ExecuTorch's attention kernels, which fit shared memory with heads of 512.
ATTENTION = "executorch.backends.cuda.triton.kernels.sdpa"
ATTENTION_CONFIGS = {
    "_sdpa_fwd_kernel": Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=2),
    "_sdpa_decode_splitk_kernel": Config({"BLOCK_N": 64}, num_warps=4, num_stages=1),
    "_sdpa_small_query_splitk_kernel": Config({"BLOCK_N": 64}, num_warps=4, num_stages=1),
}


class OneChoice(InductorChoices):
    """Takes one of Inductor's forms of a product, by its blocks alone."""

    def _finalize_template_configs(self, *args, **kwargs) -> list[KernelTemplateChoice]:
        every = super()._finalize_template_configs(*args, **kwargs)
        blocked = {
            choice: tuple(parameters[f"BLOCK_{axis}"] for axis in "MNK")
            for choice in every
            if "BLOCK_M" in (parameters := choice.params.to_kwargs())
        }
        if not blocked:
            return every
        few = max(rows for rows, _, _ in blocked.values()) <= FEW_ROWS[0]
        wanted = FEW_ROWS if few else MANY_ROWS
        return [min(blocked, key=lambda choice: distance(blocked[choice], wanted))]


def object_of_its_own(cubin_file: str, kernel_name: str, ld: str, objcopy: str) -> str:
    """The object file of a kernel's binary, which has symbols of the kernel's name. Two kernels of
    a method can have one binary, as ExecuTorch's attention of layers of two sizes has. Inductor of
    torch 2.11 would name the object file after the binary: twice one file, which has the second
    kernel's symbols."""
    own = f"{cubin_file}.{kernel_name}"
    shutil.copyfile(cubin_file, own)
    try:
        return convert_cubin_to_obj(own, kernel_name, ld, objcopy)
    finally:
        os.remove(own)


def distance(sizes: tuple[int, ...], wanted: tuple[int, ...]) -> float:
    """By how many powers of two the sizes differ from those that are wanted."""
    return sum(abs(math.log2(a / b)) for a, b in zip(sizes, wanted))


@contextmanager
def one_form() -> Iterator[None]:
    """Let CudaBackend compile each kernel in one form, and for the GPU that is here alone."""
    attention = import_module(ATTENTION)
    of_executorch = CudaBackend.get_aoti_compile_options

    def options(compile_specs: list[CompileSpec]) -> dict:
        # A compiler run for each kernel would make them for later GPUs too.
        return of_executorch(compile_specs) | {"aot_inductor.emit_multi_arch_kernel": False}

    with ExitStack() as stack:
        stack.enter_context(config.patch(OPTIONS))
        # What the CPU has is found once for a process.
        valid_vec_isa_list.cache_clear()
        stack.callback(valid_vec_isa_list.cache_clear)
        stack.enter_context(V.set_choices_handler(OneChoice()))
        stack.enter_context(replaced(CudaBackend, "get_aoti_compile_options", options))
        stack.enter_context(replaced(codecache, "convert_cubin_to_obj", object_of_its_own))
        for name, form in ATTENTION_CONFIGS.items():
            stack.enter_context(replaced(getattr(attention, name), "configs", [form]))
        yield


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Let what `holder` has by this name be another value meanwhile."""
    before = vars(holder)[name]
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
