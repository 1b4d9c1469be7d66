"""A program whose logits come of its state alone, and whose state comes of the state before it: a
full cache, a ring, and a value that goes on with every token. A copy that is wrong, late or of
another row gives another text."""

import zlib

import numpy as np

from tests.threads import VOCABULARY, YieldingProgram
from tokenloop.runner.loop import Loop
from tokenloop.runner.model import Model
from tokenloop.runner.program import Packing

WINDOW = 6
KINDS = ("dense", "rings", "hybrid", "running")
FULL, RING = "layers.0.attn.cache.k", "layers.1.attn.cache.k"
RUNNING = "layers.2.linear_attn.cache.recurrent"


class StatefulProgram(YieldingProgram):
    """Of a `kind` of KINDS. A step rounds otherwise than a prefill. Without `packed` so does a
    token in another chunk; a packed prompt may be cut where 4 divides the position."""

    def __init__(self, batch: int, kind: str, packed: bool, max_seq_len: int = 64):
        super().__init__(batch, max_seq_len, max_prefill=8 if packed else 4)
        shapes = {FULL: max_seq_len, RING: WINDOW, RUNNING: 1}
        wanted = {
            "dense": [FULL], "rings": [FULL, RING], "hybrid": [FULL, RING, RUNNING],
            "running": [RUNNING],
        }[kind]  # fmt: skip
        # What is there before a sequence is of no account.
        self.state = {name: [np.full((batch, shapes[name], 1), 77)] for name in wanted}
        if "dense" in kind:
            # A cache may lie in several memories.
            whole = self.state[FULL][0]
            self.state[FULL] = [whole[:, :10].copy(), whole[:, 10:].copy()]
        self.manifest["state"] = [{"name": name} for name in wanted]
        self.packing = Packing(8, batch, 4) if packed else None
        # Tokens of prompts that were computed.
        self.computed = 0

    def prefill_packed(self, chunk):
        def run():
            logits = np.zeros((self.manifest["batch"], VOCABULARY), np.float32)
            for i, part in enumerate(chunk):
                assert part.first % 4 == 0 and (part.ends or len(part.ids) % 4 == 0)
                for position, token in enumerate(part.ids, part.first):
                    self._take(part.row, position, token, 0)
                logits[i] = self._logits(part.row, part.first + len(part.ids) - 1)
            self.computed += sum(len(part.ids) for part in chunk)
            return logits

        return self._run(run)

    def _prefill(self, tokens, positions, row=(0,)):
        assert len(positions) <= self.manifest["max_prefill"]
        for position, token in zip(positions, tokens[0]):
            self._take(row[0], position, token, 1 + positions[0])
        self.computed += len(positions)
        return self._logits(row[0], positions[-1])

    def _decode(self, fed, positions):
        for row, position in enumerate(positions):
            self._take(row, position, fed[row, 0], -1)
        rows = [self._logits(row, position) for row, position in enumerate(positions)]
        self.logits = np.concatenate(rows)
        return self.logits

    def _take(self, row: int, position: int, token: int, rounding: int) -> None:
        """What is stored for a token comes of all that the row remembers."""
        values = np.array([self._seen(row, position), token, position, rounding], np.int64)
        value = zlib.crc32(values.tobytes())
        for name, pieces in self.state.items():
            if name == FULL:
                slot = position
                for piece in pieces:
                    if 0 <= slot < piece.shape[1]:
                        piece[row, slot] = value
                    slot -= piece.shape[1]
            elif name == RING:
                pieces[0][row, position % WINDOW] = value
            else:
                before = pieces[0][row, 0, 0] if position else 0
                pieces[0][row, 0] = (before * 31 + value) % 2**40

    def _seen(self, row: int, position: int) -> int:
        """Of what the row remembers of the positions before this one."""
        found = [np.zeros(1, np.int64)]
        for name, pieces in self.state.items():
            if name == FULL:
                found.append(np.concatenate([piece[row, :, 0] for piece in pieces])[:position])
            elif name == RING:
                before = range(max(0, position - WINDOW + 1), position)
                found.append(pieces[0][row, [p % WINDOW for p in before], 0])
            elif position:
                found.append(pieces[0][row, 0])
        return zlib.crc32(np.concatenate(found).tobytes())

    def _logits(self, row, last):
        logits = np.zeros((1, VOCABULARY), np.float32)
        generator = np.random.default_rng(self._seen(row, last + 1))
        logits[0, 2:90] = generator.random(88)
        return logits


def stateful_model(batch: int, kind: str, packed: bool, max_seq_len: int = 64) -> Model:
    """A model of StatefulProgram, which no artifact is needed for."""
    from tests.threads import Tokenizer

    model = Model.__new__(Model)
    model.loop = Loop(StatefulProgram(batch, kind, packed, max_seq_len))
    model.manifest = model.loop.program.manifest
    model.vocab_size, model.max_seq_len = VOCABULARY, max_seq_len
    model.batch, model.tokenizer, model.load_s = batch, Tokenizer(), 0.0
    return model
