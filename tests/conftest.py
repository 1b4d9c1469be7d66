"""Artifacts that many tests share, exported once in a run."""

import contextlib
import gc
import importlib
import importlib.util
import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from filelock import FileLock

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # A worker has processors of its own, for threads of two that share some wait for one another,
    # spinning. This comes before torch, which counts them.
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    processors = sorted(os.sched_getaffinity(0))
    share = processors[worker::count] or [processors[worker % len(processors)]]
    os.sched_setaffinity(0, share)

ROOT = Path(__file__).resolve().parents[1]
AUSTEN = ROOT / "tests" / "data" / "austen"
# Of the tiny checkpoints, bytes and special tokens: where it is one number, their exports find the
# selection methods that one of them has made.
VOCAB_SIZE = 256 + 3

# Files that take more than some seconds of a processor each.
SLOW_FILES = {
    *("benchmarks/test_operator_benchmarks.py", "benchmarks/test_plot.py"),
    *("export/test_attention.py", "export/test_cuda_prefill.py", "export/test_lowering.py"),
    *("export/test_drafts.py", "export/test_cuda_ranks.py"),
    *("export/test_fused.py", "export/test_fused_hybrid.py", "export/test_launches.py"),
    *("export/test_gemma.py", "export/test_pte.py", "export/test_pte_cuda.py"),
    *("export/test_float8.py", "export/test_hub.py", "export/test_kept_artifact.py"),
    *("export/test_kept_experts.py", "export/test_pooled.py"),
    *("export/test_qwen3.py", "export/test_qwen3_5.py", "export/test_selection.py"),
    *("export/test_wheel.py", "export/test_xnnpack.py", "export/test_xnnpack_graph.py"),
    *("export/test_xnnpack_kinds.py", "export/test_running_state.py"),
    *("models/kernels/test_attention_chunk.py", "models/kernels/test_experts_chunk.py"),
    *("models/kernels/test_causal_conv1d.py", "models/kernels/test_gated_delta_rule_chunk.py"),
    *("models/kernels/test_attention.py", "models/kernels/test_linear_chunk.py"),
    *("models/kernels/test_linear.py", "models/kernels/test_rms_norm.py"),
    *("models/kernels/test_experts.py", "models/kernels/test_reduce_ranks.py"),
    "export/test_tensor_parallel.py",
    "models/test_exported_methods.py",
    *("sampler/kernels/test_cutoff.py", "sampler/kernels/test_tokens.py"),
    *("runner/test_inductor.py", "runner/test_serve.py", "runner/test_executorch_runtime.py"),
    "test_compiled_kernels.py",
}
LAST_OF_SLOW = "export/test_families.py"


def pytest_configure(config: pytest.Config) -> None:
    """The process that hands out the tests runs none, and the others wait until it has begun."""
    if getattr(config.option, "dist", "no") != "no":
        return
    import torch

    from tests.fast_interpreter import do_nothing_twice
    from tokenloop.export.background import collect_seldom

    # Tests export in this process, too.
    collect_seldom()
    if not torch.cuda.is_available():
        # Triton's kernels run in its interpreter. This is read when Triton, which torch may import,
        # defines one.
        os.environ["TRITON_INTERPRET"] = "1"
        if importlib.util.find_spec("triton") is not None:
            from triton.runtime import interpreter

            do_nothing_twice(interpreter)


def parameters_of(item: pytest.Item) -> list:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that have none of the fast tests are not imported for them. Whatever is ignored for
    another reason still is."""
    name = collection_path.relative_to(ROOT / "tests").as_posix()
    return True if config.option.markexpr == "fast" and name in SLOW_FILES else None


def pytest_collection_finish() -> None:
    """What the tests' files have imported stays. No collection of garbage looks at it again: that
    would take most of a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test is `slow` or `fast`: slow are those of SLOW_FILES, and those that take an artifact,
    which a command line has to export. Files with slow tests come first, so that short ones are
    left in the end for whichever process is free. LAST_OF_SLOW would wait for artifacts of files
    beside it."""
    slow_paths = set()
    for item in items:
        slow = item.path.relative_to(ROOT / "tests").as_posix() in SLOW_FILES
        names = *item.fixturenames, *parameters_of(item)
        slow |= any(isinstance(name, str) and name.endswith("_artifact") for name in names)
        item.add_marker("slow" if slow else "fast")
        if slow:
            slow_paths.add(item.path)
    last = ROOT / "tests" / LAST_OF_SLOW
    items.sort(key=lambda item: (item.path not in slow_paths, item.path == last))


@pytest.fixture(scope="session")
def run_script(shared):
    """A function that runs export/gemma.py or runner/run.py as a user does; what they print must
    be UTF-8. Exports keep what they have in common, unless their environment is given."""

    def run(
        script: str, *arguments, cwd: Path, env: dict[str, str] | None = None, **options
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        if env is None:
            env = os.environ | {"TOKENLOOP_CACHE": str(shared / "cache")}
            # Exports compile kernels, which only tests interpret.
            env.pop("TRITON_INTERPRET", None)
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, **options)
        # Text mode would turn "\r" into "\n".
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        return done

    return run


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A directory for all of the test run's processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    (root / "shared").mkdir(exist_ok=True)
    return root / "shared"


@pytest.fixture(scope="session")
def once(shared):
    """A function (name, make) -> directory that make(directory) has filled, at most once for each
    name, whichever of the test run's processes needs it first. Nothing else is made beside it."""

    def find(name: str, make) -> Path:
        directory = shared / name / name
        with FileLock(shared / f"{name}.lock"):
            directory.parent.mkdir(exist_ok=True)
            if not directory.exists():
                make(directory)
        return directory

    return find


def export_here(script: str, arguments: tuple) -> int:
    """The exit status of an export by this process, which keeps its own ways: one of its own takes
    six seconds of a processor to import what is here."""
    from tokenloop.export import command

    family = importlib.import_module(f"tokenloop.export.{Path(script).stem}").FAMILY
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            return command.main([str(argument) for argument in arguments], family)
    except SystemExit as end:
        return end.code
    finally:
        signal.signal(signal.SIGTERM, handler)
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def export_artifact(once, run_script, shared):
    """A function (name, *arguments) -> directory that exports at most once for each name. The demo
    model is exported as a user does it, and so is what compiles kernels: here they are
    interpreted."""

    def export(name: str, *arguments, script: str = "export/gemma.py") -> Path:
        def make(output):
            given = script, "--output", output, *arguments
            if {"--model", "--random-weights"}.isdisjoint(arguments) or "cuda" in arguments:
                done = run_script(*given, cwd=output.parent)
                assert done.returncode == 0, done.stderr
                return
            said = io.StringIO()
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
                patch.setenv("TOKENLOOP_CACHE", str(shared / "cache"))
                assert export_here(script, given[1:]) == 0, said.getvalue()

        return once(name, make)

    return export


@pytest.fixture(scope="session")
def default_artifact(once, run_script) -> Path:
    """Gemma 3 270M as `python export/gemma.py` makes it."""

    def make(directory):
        done = run_script("export/gemma.py", cwd=directory.parent)
        assert done.returncode == 0, done.stderr
        (directory.parent / "artifacts/gemma3-xnnpack").rename(directory)

    return once("default", make)


@pytest.fixture(scope="session")
def fp32_artifact(export_artifact) -> Path:
    """Gemma 3 270M in float32."""
    return export_artifact("fp32", "--quant", "fp32")


@pytest.fixture(scope="session")
def austen_artifact(export_artifact) -> Path:
    """The small hybrid of English text for AOTInductor, of three rows."""
    arguments = ("--model", AUSTEN, "--backend", "inductor", "--batch", 3)
    arguments += ("--max-seq-len", 400, "--max-prefill", 16)
    return export_artifact("austen-inductor", *arguments, script="export/qwen3_5.py")


@pytest.fixture(scope="session")
def hybrid_checkpoint(make_hybrid_checkpoint) -> Path:
    """A small random hybrid in Qwen3-Next's layout, with experts. Lowering many layers takes its
    time."""
    experts = {
        "num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    }  # fmt: skip
    layer_types = ["linear_attention", "full_attention"]
    return make_hybrid_checkpoint(
        "qwen3_next", num_hidden_layers=2, layer_types=layer_types, **experts
    )


@pytest.fixture(scope="session")
def hybrid_artifact(export_artifact, hybrid_checkpoint) -> Path:
    """That hybrid in float32, of three rows. The delta rule takes 32 tokens at once."""
    arguments = ("--model", hybrid_checkpoint, "--quant", "fp32", "--batch", 3)
    arguments += ("--max-seq-len", 200, "--max-prefill", 34)
    return export_artifact("tiny-hybrid", *arguments, script="export/qwen3_5.py")


@pytest.fixture(scope="session")
def tiny_artifact(export_artifact, tiny_checkpoint) -> Path:
    """The tiny checkpoint in float32, with a chunk that its window is no multiple of."""
    arguments = ("--model", tiny_checkpoint, "--quant", "fp32")
    return export_artifact("tiny", *arguments, "--max-seq-len", 200, "--max-prefill", 7)


@pytest.fixture(scope="session")
def portable_artifact(export_artifact, tiny_checkpoint) -> Path:
    """The tiny checkpoint for ExecuTorch's plain kernels: of three rows, and with the defaults."""
    arguments = ("--model", tiny_checkpoint, "--quant", "fp32", "--backend", "portable")
    return export_artifact("tiny-portable", *arguments, "--batch", 3)


@pytest.fixture(scope="session")
def tiny_checkpoint(once, make_checkpoint) -> Path:
    """A small random Gemma 3 with a window of 16, whose greedy text does not settle down to
    repeating itself."""
    return once("tiny-checkpoint", lambda directory: make_checkpoint().rename(directory))


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """A function (**config) -> directory of the tiny checkpoint, with other values in its config:
    written by transformers, with a tokenizer of one id for each byte."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }

    def make(**changes) -> Path:
        import torch

        directory = tmp_path_factory.mktemp("tiny")
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape | changes))
        for name, parameter in model.named_parameters():
            # The head is the embedding: a large one would see only the token it was given.
            torch.nn.init.normal_(parameter, std=0.02 if "embed_tokens" in name else 0.2)
            if "q_norm" in name:
                parameter.data += 1.0
        model.save_pretrained(directory)
        write_byte_tokenizer(directory, ["<pad>", "<eos>", "<bos>"], "<bos>")
        (directory / "tokenizer_config.json").write_text(
            '{"bos_token": "<bos>", "eos_token": "<eos>"}'
        )
        return directory

    return make


@pytest.fixture(scope="session")
def make_qwen_checkpoint(tmp_path_factory):
    """A function (model_type, **config) -> directory of a tiny Qwen or Llama checkpoint, as
    make_checkpoint makes Gemmas; its texts begin with no token of their own."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
    }
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    tied = {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": rope}
    own = {
        "llama": (LlamaConfig, LlamaForCausalLM, tied),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
        "qwen3_moe": (
            Qwen3MoeConfig,
            Qwen3MoeForCausalLM,
            {
                "head_dim": 32,
                "num_experts": 7,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "norm_topk_prob": True,
            },
        ),
    }

    def make(model_type: str, **changes) -> Path:
        directory = tmp_path_factory.mktemp(model_type)
        import torch

        config_class, model_class, more = own[model_type]
        torch.manual_seed(0)
        model = model_class(config_class(**shape | more | changes))
        for name, parameter in model.named_parameters():
            # The head may be the embedding.
            torch.nn.init.normal_(parameter, std=0.02 if "embed_tokens" in name else 0.2)
            if "norm" in name:
                parameter.data += 1.0
        model.save_pretrained(directory)
        write_byte_tokenizer(directory, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
        (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        return directory

    return make


@pytest.fixture(scope="session")
def make_hybrid_checkpoint(tmp_path_factory):
    """A function (model_type, **config) -> directory of a tiny hybrid, as make_qwen_checkpoint
    makes Qwens: three gated delta nets, which forget at different speeds, and attention."""
    from transformers import (
        Qwen3_5ForCausalLM,
        Qwen3_5MoeForCausalLM,
        Qwen3_5MoeTextConfig,
        Qwen3_5TextConfig,
        Qwen3NextConfig,
        Qwen3NextForCausalLM,
    )

    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
    }
    own = {
        "qwen3_5_text": (Qwen3_5TextConfig, Qwen3_5ForCausalLM, {}),
        "qwen3_5_moe_text": (
            Qwen3_5MoeTextConfig,
            Qwen3_5MoeForCausalLM,
            {
                "num_experts": 7,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 40,
            },
        ),
        "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM, {"num_experts": 0}),
    }

    def make(model_type: str, **changes) -> Path:
        directory = tmp_path_factory.mktemp(model_type)
        import torch

        config_class, model_class, more = own[model_type]
        torch.manual_seed(0)
        model = model_class(config_class(**shape | more | changes))
        for name, parameter in model.named_parameters():
            std = {"A_log": 1.0, "dt_bias": 1.0, "conv1d.weight": 0.6}
            torch.nn.init.normal_(parameter, std=std.get(name.split("attn.")[-1], 0.3))
            if "linear_attn.norm" in name:
                parameter.data += 1.0
            if name.endswith("A_log"):
                parameter.data -= 2.0
        model.save_pretrained(directory)
        write_byte_tokenizer(directory, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
        (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        return directory

    return make


def write_byte_tokenizer(directory: Path, special: list[str], first: str | None = None) -> None:
    """A tokenizer.json of the special tokens and one id for each byte after them. Its texts begin
    with the token `first`, if there is one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[first, "$A"], special_tokens=[(first, vocabulary[first])]
        )
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def one_thread():
    """Threads gain nothing on small tensors, and a busy machine makes them wait long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def interpreted_ranges():
    """NumPy 2.4 no longer takes an array of one element as a loop's end, which the interpreter's
    scalars are."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
        yield
