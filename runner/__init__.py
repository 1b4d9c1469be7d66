"""Run an artifact: `runner.load(directory)`, then `model.generate(prompt)`.

Imports nothing from export/, models/ or sampler/: the artifact is all there is.
"""

from runner.errors import RunnerError
from runner.loop import LoopOptions
from runner.model import Generation, Model, Stats, Token

load = Model

__all__ = ["Generation", "LoopOptions", "Model", "RunnerError", "Stats", "Token", "load"]
