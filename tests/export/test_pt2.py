"""How a package's methods are compiled."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from tokenloop.export.pt2 import package as pt2


def test_the_same_code_is_compiled_by_one_export_at_a_time(monkeypatch, tmp_path):
    compiling, places = threading.Lock(), []

    def aot_compile(graph, example, options):
        """As Inductor does: where it is told to, in place."""
        assert compiling.acquire(blocking=False)
        file = Path(options["aot_inductor.output_path"], "c0.wrapper.so")
        places.append(file)
        file.write_bytes(b"")
        time.sleep(0.1)
        file.write_bytes(b"compiled")
        source = file.with_suffix(".cpp")
        source.write_bytes(b"// of this place")
        compiling.release()
        return [str(file), str(source)]

    monkeypatch.setattr(pt2, "aot_compile", aot_compile)
    monkeypatch.setattr(pt2, "cache_dir", lambda: str(tmp_path))
    graph = pt2.trace(nn.Linear(2, 2), (torch.ones(1, 2),), None)
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda _: pt2.compile_graph(graph, ()), range(3)))
    assert compiled == [{"c0.wrapper.so": b"compiled", "c0.wrapper.cpp": b""}] * 3
    assert len(places) == 3 and len(set(places)) == 1
