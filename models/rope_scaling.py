"""How rotary frequencies are scaled for longer contexts, by rope_type, each as in transformers'
modeling_rope_utils.py.

A scaling is called with the wavelengths over 2 pi of a default embedding, float32 [N] (theta to the
power of 2 i / D), with theta, and with the positions that a network's caches reach. It gives the
frequencies float32 [N]. `attention_factor` multiplies cosines and sines. Nothing depends on the
length of a prompt, so what a token's key is does not depend on how a prompt is cut.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's, by a Hugging Face config's names.

    Wavelengths above original_max_position_embeddings / low_freq_factor are `factor` times as long.
    Those below original_max_position_embeddings / high_freq_factor stay. A line leads from one to
    the other.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: ClassVar[float] = 1.0

    def __call__(self, periods: Tensor, theta: float, max_seq_len: int) -> Tensor:
        length, low, high = (
            self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor,
        )  # fmt: skip
        inv_freq = 1.0 / periods
        wavelength = 2 * math.pi / inv_freq
        is_long, is_short = wavelength > length / low, wavelength < length / high
        scaled = torch.where(is_long, inv_freq / self.factor, inv_freq)
        share = (length / wavelength - low) / (high - low)
        between = (1 - share) * scaled / self.factor + share * scaled
        return torch.where(is_long | is_short, scaled, between)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071), by a Hugging Face config's names.

    Pairs that turn more than `beta_fast` times in original_max_position_embeddings positions stay.
    Those that turn less than `beta_slow` times are `factor` times as slow. A line leads from one to
    the other, between whole pairs if `truncate`.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __call__(self, periods: Tensor, theta: float, max_seq_len: int) -> Tensor:
        size = 2 * len(periods)

        def pair(turns: float) -> float:
            """The pair that turns so often, a fraction."""
            length = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return size * math.log(length) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        # A line of no length is none.
        high += 0.001 * (low == high)
        index = torch.arange(size // 2, dtype=torch.float32, device="cpu")
        stays = 1 - ((index - low) / (high - low)).clamp(0, 1)
        slow, fast = 1.0 / (self.factor * periods), 1.0 / periods
        return slow * (1 - stays) + fast * stays


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """YaRN's attention factor where a config does not say it: 0.1 ln(factor) + 1, or DeepSeek's
    ratio of two such numbers, if both of `mscale` are there."""

    def of(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv:2402.13753), by a Hugging Face config's names: a divisor for each pair.

    `short_factor` is for networks whose caches reach original_max_position_embeddings positions or
    fewer, and `long_factor` for others. transformers chooses by the length of what it is given, and
    keys that it has cached keep the short ones.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    def __call__(self, periods: Tensor, theta: float, max_seq_len: int) -> Tensor:
        is_long = max_seq_len > self.original_max_position_embeddings
        divisors = self.long_factor if is_long else self.short_factor
        return 1.0 / (torch.tensor(divisors, dtype=torch.float32, device="cpu") * periods)


def longrope_attention_factor(factor: float, original_max_position_embeddings: int) -> float:
    """LongRoPE's attention factor where a config does not say it."""
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))


@dataclass(frozen=True)
class DynamicNtkScaling:
    """Dynamic NTK, which scales nothing up to max_position_embeddings positions.

    Beyond them transformers rotates with frequencies of the length that it has been given so far,
    and keys that it has cached stay as they were. What it answers there depends on how a prompt is
    cut, so networks reach no further.
    """

    factor: float
    max_position_embeddings: int
    attention_factor: ClassVar[float] = 1.0

    def __call__(self, periods: Tensor, theta: float, max_seq_len: int) -> Tensor:
        """Raises ValueError for more positions than the model has."""
        if max_seq_len > self.max_position_embeddings:
            raise ValueError(
                f"rope_type = 'dynamic' with {max_seq_len} positions: at most "
                f"max_position_embeddings = {self.max_position_embeddings} is right, for beyond it "
                "frequencies depend on how a prompt is cut"
            )
        return 1.0 / periods


Scaling = Llama3Scaling | YarnScaling | LongRopeScaling | DynamicNtkScaling
