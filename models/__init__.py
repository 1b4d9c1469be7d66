"""The networks, a file for each architecture, found by a Hugging Face config's model_type.

Such a file has MODEL_TYPES, Config with `from_dict`, Network and checkpoint_name
(docs/adding-a-model.md).
"""

from importlib import import_module
from types import ModuleType

ARCHITECTURES = (
    "gemma3", "gemma4", "llama", "qwen3", "qwen3_5",
)  # fmt: skip


def architecture_of(model_type: str) -> ModuleType | None:
    """The module for a checkpoint's model_type, None if there is none."""
    modules = (import_module(f"{__name__}.{name}") for name in ARCHITECTURES)
    return next((module for module in modules if model_type in module.MODEL_TYPES), None)


def model_types(architectures: tuple[str, ...] = ARCHITECTURES) -> list[str]:
    """Every model_type that these architectures take."""
    modules = (import_module(f"{__name__}.{name}") for name in architectures)
    return [model_type for module in modules for model_type in module.MODEL_TYPES]
