"""Selection as ExecuTorch methods on the CPU: sampler's functions, at the cost of what a row asks.

A top-k or sort of a whole vocabulary is slow there, and so are int64 operators. A row takes the
first way that its parameters and logits allow. The first is an argmax. The second takes only the
largest logits, found by groups. The third adds noise to the whole vocabulary, with or without a
sort of it. All give the token of sampler.sample.
"""

import torch
from torch import Tensor, nn

# Not torch.cond, which would trace every branch once more with Dynamo.
from torch._higher_order_ops.cond import cond_op
from torch._higher_order_ops.map import map_impl
from torch.export import ExportedProgram

from tokenloop.export.methods import adjust_example, mask_example
from tokenloop.export.pte.xnnpack_arithmetic import Recorded, Recorder
from tokenloop.sampler.greedy import greedy
from tokenloop.sampler.philox import WORDS, steps, uniform, vocabulary_gumbel, words
from tokenloop.sampler.restrict import BITS, adjust
from tokenloop.sampler.sample import (
    LEAST_TEMPERATURE,
    exp2_38,
    noisiest,
    numbers,
    restrict,
    scale,
    threshold,
)

CANDIDATES = 512
TOKENS_PER_GROUP = 64


class Greedy(nn.Module):
    """logits float32 [B, V] -> token int64 [B, 1], as sampler.greedy. It costs one argmax unless
    there is a NaN, which argmax takes for the greatest."""

    def forward(self, logits: Tensor) -> Tensor:
        token = torch.argmax(logits, dim=-1, keepdim=True)
        nans = torch.isnan(torch.gather(logits, 1, token)).long().sum()
        token = cond_op(nans > 0, lambda logits, _: greedy(logits), taken, (logits, token))
        # A branch's result lies in planned memory, which the next method overwrites. The result of
        # an operator outside the branches does not.
        return token.clamp(min=0)


def selection_methods(
    batch: int, vocab_size: int, delegates: bool = True
) -> dict[str, ExportedProgram]:
    """`greedy` and `sample` of all rows, and what changes the logits of one. Several rows also have
    them of one that was prefilled."""
    methods = methods_of_rows(batch, vocab_size, delegates) | changing_methods(vocab_size)
    if batch > 1:
        row = methods_of_rows(1, vocab_size, delegates)
        methods |= {f"{name}_row": method for name, method in row.items()}
    return methods


def methods_of_rows(
    rows: int, vocab_size: int, delegates: bool = True
) -> dict[str, ExportedProgram]:
    """`greedy` and `sample` of `rows` rows."""
    logits = torch.zeros(rows, vocab_size)
    # temperature, top_k, top_p, seed and position are each a tensor of its own, because
    # torch.export takes one that is passed twice for one argument.
    dtypes = torch.float32, torch.int64, torch.float32, torch.int64, torch.int64
    parameters = [torch.ones(rows, dtype=dtype) for dtype in dtypes]
    sample = Sample(vocab_size, delegates)
    return {
        "greedy": torch.export.export(Greedy(), (logits,)),
        "sample": torch.export.export(sample, (logits, *parameters)),
    }


def changing_methods(vocab_size: int) -> dict[str, ExportedProgram]:
    """`mask_row` and `adjust_row`, which give logits float32 [1, V]."""
    example, shapes = adjust_example(vocab_size)
    return {
        "mask_row": torch.export.export(Mask(), mask_example(vocab_size)),
        "adjust_row": torch.export.export(Adjust(), example, dynamic_shapes=shapes),
    }


class Mask(nn.Module):
    """As sampler.restrict.mask: a byte's row of a table is added to 8 logits. In ExecuTorch that
    takes a twentieth of the time of shifting and comparing bits. A logit of +inf that is not
    allowed becomes NaN, which selection takes for -inf, too."""

    def __init__(self):
        super().__init__()
        bits = torch.bitwise_right_shift(torch.arange(2**BITS)[:, None], torch.arange(BITS)) & 1
        self.register_buffer("added", torch.where(bits == 1, 0.0, -torch.inf))

    def forward(self, logits: Tensor, allowed: Tensor) -> Tensor:
        added = nn.functional.embedding(allowed.to(torch.int32), self.added)
        return logits + added.flatten(1)[:, : logits.shape[1]]


class Adjust(nn.Module):
    """As sampler.restrict.adjust."""

    def forward(self, logits: Tensor, ids: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return adjust(logits, ids, scale, bias)


def taken(logits: Tensor, token: Tensor, *_) -> Tensor:
    return token.clone()


class Sample(nn.Module):
    """sampler.sample.sample of logits float32 [B, V], with the same arguments and tokens.

    Without `delegates` XNNPACK runs no part of it, and all rows that are not greedy are sorted.
    """

    def __init__(self, vocab_size: int, delegates: bool = True):
        super().__init__()
        groups, rest = divmod(vocab_size, TOKENS_PER_GROUP)
        self.grouped = delegates and rest == 0 and groups >= CANDIDATES
        if self.grouped:
            self.mass, self.scores = mass_delegate(vocab_size), scores_delegate(vocab_size)
        self.scale = scale_delegate(vocab_size) if self.grouped else scale

    def forward(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor,
        position: Tensor,
    ) -> Tensor:  # fmt: skip
        tokens = torch.argmax(logits, dim=-1, keepdim=True)
        largest = torch.gather(logits, 1, tokens)
        rows = tokens, largest, temperature, top_k, top_p, seed, position
        if logits.shape[0] == 1:
            (token,) = self.row(torch.zeros((), dtype=torch.int64), logits, *rows)
            return token[None].clamp(min=0)
        # The same instructions run for each row.
        (tokens,) = map_impl(self.row, [torch.arange(logits.shape[0])], [logits, *rows])
        # The clamp is outside the branches, as in Greedy.
        return tokens.clamp(min=0)

    def row(self, i: Tensor, logits: Tensor, *rows: Tensor) -> tuple[Tensor]:
        """The token int64 [1] of row i int64 [], from the arguments of all rows. `rows` are the ids
        of the largest logits, these logits, temperature, top_k, top_p, seed and position."""
        token, largest, *settings = [x.index_select(0, i[None]) for x in rows]
        random = settings[0][0] != 0
        has_nan = ~random & torch.isnan(largest[0, 0])
        if self.grouped:
            operands = self.competitors(random, logits, i, largest, *settings)
            last, operands = self.noisiest, (*operands, *settings[-2:])
        else:
            last, operands = self.drawn, (largest, *settings)
        token = cond_op(has_nan, greedy_with_nan, taken, (logits, token, i)).clamp(min=0)
        token = cond_op(random, branch(last), taken, (logits, token, i, *operands))
        # The result is a copy: a view of a condition's result would be one of other memory.
        return (token[0],)

    # Conditions follow one another where they could be nested: an export takes twice as long for
    # each level. Their results lie where the next one's branches work, hence the clamps.
    def competitors(self, random, logits, i, largest, temperature, top_k, top_p, seed, position):
        """Scaled logits and ids, [1, N] each, for noisiest. Any will do unless `random`."""
        some = ((top_k > 0) & (top_k < CANDIDATES)) | ((top_k == 0) & (top_p < 1))
        few = random & (some & (largest[:, 0].abs() < torch.inf))[0]
        scaling = logits, i, largest, temperature
        mass = cond_op(few & (top_k[0] == 0), branch(self.total), no_mass, scaling).clamp(min=0)
        row = *scaling, top_k, top_p
        scaled, ids = cond_op(few, branch(self.few), branch(self.none), (mass, *row))
        scaled, ids = scaled.clamp(max=0.0), ids.clamp(min=-1)
        others = random & (ids[0, 0] < 0)
        operands = scaled, ids, *row, seed, position
        scaled, ids = cond_op(others, branch(self.finalists), same, operands)
        return scaled.clamp(max=0.0), ids.clamp(min=0)

    def total(self, logits, i, largest, temperature) -> Tensor:
        """The sum of a row's weights, int64 [1, 1]."""
        return self.mass(row_of(logits, i), largest, temperature).long().sum(-1, keepdim=True)

    def none(self, mass, logits, *_) -> tuple[Tensor, Tensor]:
        """What `few` gives where other tokens may stay as well."""
        shape = 1, CANDIDATES
        return torch.full(shape, 0.0), torch.full(shape, -1, dtype=torch.int64)

    def few(self, mass, logits, i, largest, temperature, top_k, top_p) -> tuple[Tensor, Tensor]:
        """Scaled logits and ids of the largest logits. Ids are -1 if others may stay as well."""
        descending, ids = best(row_of(logits, i), CANDIDATES)
        cut = threshold(descending, largest, temperature, top_k, top_p, mass)
        # Logits equal to the last one might not be here.
        last = descending[:, -1:]
        kth = torch.gather(descending, 1, (top_k[:, None] - 1).clamp(min=0))
        whole = (cut[0] > last) & (kth > last)
        ids, order = ascending(ids)
        scaled = restrict(torch.gather(descending, 1, order), largest, temperature, *cut)
        return scaled, torch.where(whole, ids, -1)

    def noisiest(self, logits, token, i, scaled, ids, seed, position) -> Tensor:
        return noisiest(scaled, ids, seed, position)

    def drawn(self, logits, token, i, *row) -> Tensor:
        """The token, drawn with noise for the whole of a vocabulary that is not in groups."""
        noise = vocabulary_gumbel(*row[-2:], logits.shape[1])
        scores = self.scaled_logits(logits, i, *row[:-2]) + noise
        return torch.argmax(scores, dim=-1, keepdim=True)

    def finalists(
        self, _, __, logits, i, largest, temperature, top_k, top_p, seed, position
    ) -> tuple[Tensor, Tensor]:
        """Scaled logits and ids of the tokens with the largest scores of all."""
        scaled = self.scaled_logits(logits, i, largest, temperature, top_k, top_p)
        blocks = torch.arange(scaled.shape[1] // WORDS)
        noise = [steps(word) for word in words(seed, position, blocks)]
        # XNNPACK's logarithms err by less than the first and the last of these differ.
        ids, _ = ascending(best(self.scores(scaled, *noise), CANDIDATES)[1])
        scaled = torch.gather(scaled, 1, ids)
        # A row of nothing but -inf gives id 0.
        return scaled, torch.where(scaled > -torch.inf, ids, 0)

    def scaled_logits(self, logits, i, largest, temperature, top_k, top_p) -> Tensor:
        """Scaled logits [1, V] of row i, -inf where they are cut."""
        ordinary = largest[:, 0].abs() < torch.inf
        uncut = (top_p >= 1) & ((top_k == 0) | (top_k >= logits.shape[1]))
        operands = row_of(logits, i), largest, temperature, top_k, top_p
        return cond_op((uncut & ordinary)[0], branch(self.scaled_uncut), scaled_cut, operands)

    def scaled_uncut(self, logits, largest, temperature, top_k, top_p) -> Tensor:
        """Scaled logits [1, V] of a row that nothing is cut from."""
        return self.scale(logits, largest, temperature)


def same(scaled: Tensor, ids: Tensor, *_) -> tuple[Tensor, Tensor]:
    return scaled.clone(), ids.clone()


def greedy_with_nan(logits: Tensor, token: Tensor, i: Tensor, *_) -> Tensor:
    return greedy(row_of(logits, i))


def row_of(logits: Tensor, i: Tensor) -> Tensor:
    """Row i of logits [B, V], as [1, V]. It is not copied where it is the only row."""
    return logits if logits.shape[0] == 1 else logits.index_select(0, i[None])


def no_mass(*_) -> Tensor:
    return torch.full((1, 1), 0, dtype=torch.int64)


def branch(method):
    """The bound method as a function. A condition's operands are counted by the code's parameters,
    which include `self` for a bound method."""
    return lambda *operands: method(*operands)


def scaled_cut(logits, largest, temperature, top_k, top_p) -> Tensor:
    """Scaled logits [1, V], -inf where they are cut, found by a sort of all of them."""
    x, largest = numbers(logits)
    descending = torch.topk(x, x.shape[1]).values
    cut = threshold(descending, largest, temperature, top_k, top_p)
    return restrict(x, largest, temperature, *cut)


def best(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of x [1, V], descending, and their ids: float32 and int64 [1, count].

    There are two steps: the largest lie in the groups whose own largest are the largest.
    """
    groups = x.view(-1, TOKENS_PER_GROUP)
    chosen = torch.topk(groups.amax(1), count).indices
    members = nn.functional.embedding(chosen, groups).view(1, -1)
    values, places = torch.topk(members, count)
    group = torch.bitwise_right_shift(places, TOKENS_PER_GROUP.bit_length() - 1)
    first = torch.gather(chosen[None], 1, group) * TOKENS_PER_GROUP
    return values, first + (places & (TOKENS_PER_GROUP - 1))


def ascending(ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids int64 [1, N] in order, and where each was."""
    negative, places = torch.topk(-ids, ids.shape[1])
    return -negative, places


def scale_delegate(size: int):
    """sampler.sample.scale of logits [1, V], largest [1, 1] and temperature [1] as one delegate
    call. XNNPACK takes subnormal numbers for 0, which changes no token."""
    graph = Recorder()
    return graph.delegate(recorded_scale(graph, size), (1, size))


def mass_delegate(size: int):
    """exp2_38 of what scale_delegate gives, as one delegate call."""
    graph = Recorder()
    return graph.delegate(exp2_38(recorded_scale(graph, size)), (1, size))


def recorded_scale(graph: Recorder, size: int) -> Recorded:
    logits, largest, temperature = (graph.argument(*shape) for shape in [(1, size), (1, 1), (1,)])
    return (logits - largest) / temperature.clamp(min=LEAST_TEMPERATURE)


def scores_delegate(size: int):
    """The function (scaled [1, V], steps of each of a counter's four words [V / 4]) -> scaled plus
    noise [1, V], nearly, as one delegate call."""
    graph = Recorder()
    scaled = graph.argument(1, size)
    columns = [graph.argument(size // WORDS) for _ in range(WORDS)]
    noise = -(-uniform(graph.interleave(columns)).log()).log()
    return graph.delegate(scaled + noise, (1, size))
