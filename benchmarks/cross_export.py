"""Export a network with random weights for a CUDA GPU that this machine does not have, so that the
minutes of a lent one are not spent on compiling:

    python -m benchmarks.cross_export gemma.py --random-weights benchmarks/configs/gemma3-270m.json

The flags are the script's own. It takes a torch that is built for CUDA, with Triton, the toolkit's
headers in CUDA_HOME, and a C compiler; the package runs where that same torch has an H100 or H200.
Tensors are torch's fake ones. What asks for the GPU while Inductor compiles is answered here, in
no_driver.c or by what replaces functions of torch below; where Inductor would measure several ways
to cut a kernel's work it takes the first.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    total_memory=150_000_000_000, L2_cache_size=52_428_800,
)  # fmt: skip

COMPILER = """#!/bin/bash
exec {} "${{@/-march=native/-march=x86-64-v3}}"
"""


def begin_anew(directory: Path) -> int:
    """Run this module again, with stand-ins for CUDA's libraries in `directory`; its status."""
    source, library = Path(__file__).with_name("no_driver.c"), directory / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", f"-I{CUDA / 'include'}", f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    # The name that a package is linked by.
    (directory / "libcuda.so").symlink_to(library)
    # Inductor compiles what runs on the host for this machine's own processor.
    compiler = directory / "g++"
    compiler.write_text(COMPILER.format(os.environ.get("CXX", "/usr/bin/g++")))
    compiler.chmod(0o755)
    paths = {"LD_LIBRARY_PATH": directory, "LIBRARY_PATH": directory, "CUDA_HOME": CUDA}
    paths |= {"LD_PRELOAD": library, "CXX": compiler}
    environment = os.environ | {name: str(path) for name, path in paths.items()}
    command = [sys.executable, "-m", "benchmarks.cross_export", *sys.argv[1:]]
    return subprocess.run(command, env=environment).returncode


def pretend() -> None:
    """Let torch and Triton find the GPU of PROPERTIES, as far as compiling goes."""
    import torch
    import torch._subclasses.fake_tensor
    import triton
    from triton.backends.compiler import GPUTarget

    def always(value=None):
        return lambda *arguments, **options: value

    random_state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_capability": (9, 0), "get_device_properties": PROPERTIES,
        "get_device_name": PROPERTIES.name, "get_rng_state": random_state, "set_rng_state": None,
        "_lazy_init": None, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "synchronize": None,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, always(value))
    for name in ("_cuda_getDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
        setattr(torch._C, name, always(0))
    torch._C._cuda_getCurrentRawStream = always(0)
    torch._subclasses.fake_tensor.init_gpu_context = always()

    # Not before: they keep torch.cuda's functions that they find.
    from torch._inductor import config, graph, utils
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    limits = {"max_shared_mem": PROPERTIES.shared_memory_per_block_optin}
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=always(GPUTarget("cuda", 90, 32)),
            get_active_torch_device=always(torch.device("cuda", 0)),
            get_current_device=always(0),
            get_device_interface=always(torch.cuda),
            launcher_cls=always(),
            binary_ext="cubin",
            utils=SimpleNamespace(
                get_device_properties=always(limits),
                load_binary=always((1, 1, 0, 0, PROPERTIES.max_threads_per_block)),
            ),
        )
    )
    for module in (triton_heuristics, triton_helpers):
        module.set_driver_to_gpu = always()

    # These would compute on the GPU: to write small weights into the code, to fold constants, to
    # match patterns that are not in these networks, and to measure.
    config.compile_threads = 1
    config.cpp.simdlen = 256  # another machine's processor may have no AVX-512
    config.always_keep_tensor_constants = True
    config.shape_padding = config.joint_graph_constant_folding = False
    fuse_attention._sfdp_init = misc_patterns._misc_patterns_init = always()
    pad_mm._pad_mm_init = always()

    def take_the_first(codegen) -> None:
        codegen.kernel_autotune_defs.splice("async_compile.wait(globals())\ndel async_compile\n")
        scope = {}
        exec(codegen.kernel_autotune_defs.getvalue(), scope)
        for kernel in scope.values():
            if isinstance(kernel, triton_heuristics.CachingAutotuner):
                kernel.precompile()
                kernel.save_gpu_kernel(0, kernel.launchers[0])

    PythonWrapperCodegen.generate_and_run_autotune_block = take_the_first

    def is_same_tensor(a, b) -> bool:
        layouts = [(x.size(), x.stride(), x.dtype, x.device, x.storage_offset()) for x in (a, b)]
        # A fake one has no address.
        storages = [x.untyped_storage()._cdata for x in (a, b)]
        return layouts[0] == layouts[1] and storages[0] == storages[1]

    utils.is_same_tensor = graph.is_same_tensor = is_same_tensor


def replace_tensors(module, replace) -> None:
    """Every parameter and buffer, and other tensor that a module holds, by what `replace` makes of
    it; what is shared stays shared."""
    import torch

    made = {}

    def new(x):
        # Each is kept, or another one could come to have its identity.
        if id(x) not in made:
            made[id(x)] = x, replace(x)
        return made[id(x)][1]

    for part in module.modules():
        for name, x in list(part._parameters.items()):
            if x is not None:
                part._parameters[name] = torch.nn.Parameter(new(x), requires_grad=False)
        for held in (part._buffers, vars(part)):
            for name, x in list(held.items()):
                if isinstance(x, torch.Tensor):
                    held[name] = new(x)


def export_fake(script: str, arguments: list[str]) -> int:
    """What export/`script` does, with fake tensors."""
    import torch
    from torch._export.utils import _detect_fake_mode_from_gm
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from tokenloop.export import command
    from tokenloop.export.pt2 import package as pt2
    from tokenloop.export.pt2 import pt2_artifact

    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(tracked_fakes=[]))

    def alike(x, mode=fake, device=None):
        with mode:
            return torch.empty_strided(
                x.shape, x.stride(), dtype=x.dtype, device=device or x.device
            )

    def move(module, device):
        replace_tensors(module, lambda x: x if x.is_cuda else alike(x, device=device))
        return module

    def compile_method(method, example, dynamic_shapes=None) -> dict[str, bytes]:
        with unset_fake_temporarily(), torch.device("cpu"):
            graph = pt2.trace(method, example, dynamic_shapes)
            # A graph's tensors must be of one mode, and it was traced in one of its own.
            mode = _detect_fake_mode_from_gm(graph)
            replace_tensors(graph, lambda x: alike(x, mode))
            example = tuple(alike(x, mode) for x in example)
            return pt2.compile_graph(graph, example)

    class Later:
        """tokenloop.export.background.Background in this process."""

        def __init__(self, what, function, *arguments, processor=""):
            self.function, self.arguments = function, arguments

        def result(self):
            return self.function(*self.arguments)

    torch.nn.Module.to = move
    pt2.compile_method = compile_method
    pt2_artifact.Background = Later
    export = command.export

    def with_fake_tensors(*arguments) -> None:
        with fake:
            export(*arguments)

    command.export = with_fake_tensors
    family = importlib.import_module(f"tokenloop.export.{script.removesuffix('.py')}").FAMILY
    flags = ["--backend", "inductor", "--device", "cuda", *arguments]
    return command.main(flags, family)


def main() -> int:
    if "--random-weights" not in sys.argv:
        print(__doc__)
        return 2
    if not (CUDA / "include" / "cuda_runtime_api.h").exists():
        print(
            f"python -m benchmarks.cross_export: error: CUDA_HOME: there are no headers in {CUDA}"
        )
        return 2
    if "libcuda.so.1" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as directory:
            return begin_anew(Path(directory))
    pretend()
    return export_fake(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
