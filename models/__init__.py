"""The networks, a file for each architecture, found by a Hugging Face config's model_type.

Such a file has MODEL_TYPES, Config with `from_dict`, Network and checkpoint_name
(docs/adding-a-model.md).
"""

from importlib import import_module
from types import ModuleType

ARCHITECTURES = (
    "gemma3", "gemma3n", "gemma4", "gpt_oss", "granite", "lfm2", "llama", "mistral", "olmo2",
    "phi3", "qwen3", "qwen3_5", "smollm3",
)  # fmt: skip


def by_model_type(architectures: tuple[str, ...] = ARCHITECTURES) -> dict[str, ModuleType]:
    """The modules of some architectures, by every model_type that they take."""
    modules = (import_module(f"{__name__}.{name}") for name in architectures)
    return {model_type: module for module in modules for model_type in module.MODEL_TYPES}
