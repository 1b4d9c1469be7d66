"""Rows and settings of the sampler at the ends of their types, for hypothesis: any bits that
float32 can have, special values among them."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tokenloop.sampler.sample import LEAST_TEMPERATURE

SMALLEST, SMALLEST_NORMAL, LARGEST = 2.0**-149, 2.0**-126, (2 - 2**-23) * 2.0**127


def bits(low: int, high: int) -> st.SearchStrategy[float]:
    """float32 numbers of bit patterns, as Python's."""
    return st.integers(low, high).map(lambda x: np.uint32(x).view(np.float32).item())


TEMPERATURES = st.one_of(
    st.sampled_from([
        0.0, SMALLEST, 1e-39, 2.0**-128, SMALLEST_NORMAL, LEAST_TEMPERATURE * (1 - 2**-24),
        LEAST_TEMPERATURE, LEAST_TEMPERATURE * (1 + 2**-23), 1e-8, 0.7, 1.0, 1e30, 2.0**127,
        LARGEST,
    ]),
    bits(0, 0x7F7FFFFF),
    st.floats(0.0625, 4.0, width=32),
)  # fmt: skip
# 0 is what float32 makes of smaller ones.
TOP_PS = st.one_of(
    st.sampled_from([0.0, SMALLEST, SMALLEST_NORMAL, 0.5, 1 - 2.0**-24, 1.0, 1.0]),
    bits(1, 0x3F800000),
    st.floats(0.0625, 1.0, width=32),
)
VALUES = st.one_of(
    st.sampled_from([
        math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, SMALLEST, -SMALLEST, SMALLEST_NORMAL,
        2.0**-127, LARGEST, -LARGEST,
    ]),
    bits(0, 0xFFFFFFFF),
    st.floats(-16.0, 16.0, width=32),
)  # fmt: skip
INT64 = st.one_of(st.sampled_from([-(2**63), -1, 0, 2**63 - 1]), st.integers(-(2**63), 2**63 - 1))
SPREADS = st.one_of(
    st.sampled_from([0.0, 0.0, 1.0, 4.0, SMALLEST_NORMAL, 2.0**-66, LARGEST / 8]),
    bits(0, 0x7F7FFFFF),
)


def top_ks(size: int) -> st.SearchStrategy[int]:
    few = min(size + 2, 40)
    return st.one_of(st.just(0), st.integers(1, few), st.sampled_from([size, size + 1, 2**63 - 1]))


@dataclass(frozen=True)
class Row:
    """Logits of one row, and how a token is drawn of them.

    `values` come `sprinkled` times among noise of a spread around `centre`, or everywhere where
    `centre` is None.
    """

    values: list[float]
    sprinkled: int
    centre: float | None
    spread: float
    places: int
    settings: tuple[float, int, float, int, int]

    def logits(self, size: int) -> Tensor:
        """float32 [size]"""
        generator = np.random.default_rng(self.places)
        values = np.array(self.values, np.float32)
        if self.centre is None:
            return torch.from_numpy(generator.choice(values, size))
        with np.errstate(over="ignore", invalid="ignore"):
            noise = generator.standard_normal(size).astype(np.float32) * np.float32(self.spread)
            row = noise + np.float32(self.centre)
        where = generator.integers(0, size, self.sprinkled)
        row[where] = generator.choice(values, self.sprinkled)
        return torch.from_numpy(row)


def rows_of(size: int) -> st.SearchStrategy[Row]:
    return st.builds(
        Row,
        st.lists(VALUES, min_size=1, max_size=5),
        st.sampled_from([0, 1, 2, 9]),
        st.one_of(st.none(), st.just(0.0), VALUES),
        SPREADS,
        st.integers(0, 2**32 - 1),
        st.tuples(TEMPERATURES, top_ks(size), TOP_PS, INT64, INT64),
    )


def arguments(rows: list[Row], size: int) -> list[Tensor]:
    """sample's arguments for the rows."""
    dtypes = torch.float32, torch.int64, torch.float32, torch.int64, torch.int64
    columns = zip(*(row.settings for row in rows))
    logits = torch.stack([row.logits(size) for row in rows])
    return [logits, *(torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes))]
