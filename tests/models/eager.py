"""What tests of the networks share: driving one greedily, in chunks and steps, alone or in rows,
and holding what it gives against transformers' one pass over everything."""

from itertools import pairwise

import torch


def prompt(length: int, seed: int = 0, vocabulary: int = 48) -> torch.Tensor:
    """Random ids int64 [1, length] below `vocabulary`."""
    generator = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(vocabulary, (1, length), generator=generator)


def prefill(
    model: torch.nn.Module, tokens: torch.Tensor, ends: list[int], row: int | None = None
) -> list[torch.Tensor]:
    """Logits after each chunk of a prompt from position 0, in chunks that end at `ends`."""
    rows = [] if row is None else [torch.tensor([row])]
    with torch.inference_mode():
        return [
            model.prefill(tokens[:, start:end], torch.arange(start, end), *rows)
            for start, end in pairwise([0, *ends])
        ]


def even_ends(length: int, chunk: int) -> list[int]:
    return [*range(chunk, length, chunk), length]


def generate(
    model: torch.nn.Module, tokens: torch.Tensor, steps: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy ids, and the logits [steps, V] that each was chosen from."""
    length = tokens.shape[1]
    rows = prefill(model, tokens, even_ends(length, model.max_chunk))[-1:]
    ids = [rows[-1].argmax().item()]
    with torch.inference_mode():
        for position in range(length, length + steps - 1):
            rows.append(model.decode(torch.tensor([[ids[-1]]]), torch.tensor([position])))
            ids.append(rows[-1].argmax().item())
    return ids, torch.cat(rows)


def feed(model: torch.nn.Module, tokens: torch.Tensor, start: int) -> list[torch.Tensor]:
    """Logits after each of tokens int64 [1, T] from position `start` on, which come in steps."""
    with torch.inference_mode():
        return [
            model.decode(tokens[:, [position]], torch.tensor([position]))
            for position in range(start, tokens.shape[1])
        ]


class Method(torch.nn.Module):
    """A method of a model as a module's forward, which torch.export takes."""

    def __init__(self, model: torch.nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.name)(*inputs)


class Batch:
    """A model of several rows, driven greedily: every row's text, and the logits [1, V] that its
    ids after the prompt were chosen from."""

    def __init__(self, model: torch.nn.Module, reference: torch.nn.Module):
        self.model, self.reference = model, reference
        self.texts: list[list[int]] = [[] for _ in range(model.batch)]
        self.logits: list[list[torch.Tensor]] = [[] for _ in range(model.batch)]

    def begin(self, row: int, tokens: torch.Tensor) -> None:
        """A prompt int64 [1, T] in a row, whatever was there."""
        ends = even_ends(tokens.shape[1], self.model.max_chunk)
        self.texts[row], self.logits[row] = tokens[0].tolist(), []
        self._choose(row, prefill(self.model, tokens, ends, row)[-1])

    def step(self, count: int = 1) -> None:
        """An id more in every row; a row without a text computes along at position 0."""
        for _ in range(count):
            token = torch.tensor([text[-1:] or [0] for text in self.texts])
            position = torch.tensor([max(len(text) - 1, 0) for text in self.texts])
            with torch.inference_mode():
                logits = self.model.decode(token, position)
            for row, text in enumerate(self.texts):
                if text:
                    self._choose(row, logits[row : row + 1])

    def check(self, row: int) -> None:
        """That the row's ids and logits are those of transformers, given this row's text alone."""
        text, logits = self.texts[row], self.logits[row]
        with torch.inference_mode():
            expected = self.reference(torch.tensor([text])).logits[0, -len(logits) - 1 : -1]
        assert text[-len(logits) :] == expected.argmax(-1).tolist()
        assert_near(torch.cat(logits), expected)

    def _choose(self, row: int, logits: torch.Tensor) -> None:
        self.logits[row].append(logits)
        self.texts[row].append(logits.argmax().item())


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-4 of the largest logit."""
    assert actual.dtype == torch.float32
    tolerance = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)
