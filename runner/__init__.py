"""Run an artifact: `runner.load(directory)`, then `model.generate(prompt)`.

Imports nothing from export/, models/ or sampler/: the artifact is all there is.
"""

from importlib import import_module

HOMES = {
    "BatchGeneration": "generation",
    "Conversation": "conversation",
    "Engine": "engine",
    "EngineClosed": "engine",
    "EngineError": "ticket",
    "Generation": "generation",
    "LoopOptions": "loop",
    "Model": "model",
    "QueueFull": "engine",
    "Request": "request",
    "Result": "result",
    "RunnerError": "errors",
    "Stats": "generation",
    "Ticket": "ticket",
    "Token": "result",
}

__all__ = ["load", *HOMES]


def __getattr__(name: str):
    """Import what is asked for: run.py answers wrong arguments before NumPy is there."""
    if name == "load":
        name = "Model"
    if name not in HOMES:
        raise AttributeError(f"module 'tokenloop.runner' has no attribute {name!r}")
    return getattr(import_module(f"tokenloop.runner.{HOMES[name]}"), name)
