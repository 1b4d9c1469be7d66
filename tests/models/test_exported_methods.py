"""What every architecture promises of its methods as torch.export takes them.

Tracing takes a second, so these are apart from test_conformance.py, which runs at each change.
"""

from itertools import pairwise

import pytest
import torch
from torch.export import Dim

from tests.models.architectures import ARCHITECTURES
from tests.models.eager import Method, assert_near, prompt
from tests.models.test_conformance import TYPICAL_OWN, odd_ends
from tests.models.tiny_models import shallow

pytestmark = pytest.mark.usefixtures("one_thread")

# The first case of each row.
FIRST = [next(iter(row.cases)) for row in ARCHITECTURES]
# A model of one row is given no row, which is of concern to its caches alone: the first case has
# caches of both kinds.
EXPORTED = [*((case, 3) for case in TYPICAL_OWN), (TYPICAL_OWN[0], 1)]


@pytest.mark.parametrize(("case", "batch"), EXPORTED)
def test_an_exported_prefill_takes_chunks_of_any_length(case, batch):
    model = shallow(case, batch)
    row = [torch.tensor([1])] if batch > 1 else []
    length = Dim("length", max=model.max_chunk)
    program = torch.export.export(
        Method(shallow(case, batch), "prefill"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.arange(3), *row),
        dynamic_shapes=((({1: length}, {0: length}, *[None] * len(row))),),
    ).module()
    tokens = prompt(model.max_seq_len)
    # One after another, and then the longest from position 0 on.
    for start, end in [*pairwise([0, *odd_ends(case, model)]), (0, model.max_chunk)]:
        inputs = tokens[:, start:end], torch.arange(start, end), *row
        assert_near(program(*inputs), model.prefill(*inputs))


@pytest.mark.parametrize(
    ("case", "batch", "name"),
    [(*each, "decode") for each in EXPORTED]
    + [(case, batch, "decode_embedded") for case, batch in EXPORTED if case in FIRST],
)
def test_an_exported_step_gives_the_logits_of_the_model(case, batch, name):
    model = shallow(case, batch)
    take = model.embed if name == "decode_embedded" else torch.clone
    inputs = take(torch.zeros(batch, 1, dtype=torch.int64)), torch.zeros(batch, dtype=torch.int64)
    program = torch.export.export(Method(shallow(case, batch), name), inputs).module()
    for step in range(20):
        token, position = prompt(batch, seed=step).T, torch.arange(batch) + step
        assert_near(program(take(token), position), model.decode(token, position))
