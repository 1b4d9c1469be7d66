"""What all tests of the operators share."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_tensors(one_thread):
    """All tests here have tensors that one thread is best for."""


@pytest.fixture(autouse=True, scope="module")
def interpreted_ranges():
    """NumPy 2.4 no longer takes an array of one element as a loop's end, which the interpreter's
    scalars are."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
        yield


@pytest.fixture
def semaphores():
    """Zeros, which every kernel must leave zero."""
    semaphores = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
    yield semaphores
    assert not semaphores.any()


@pytest.fixture
def normal():
    """A function (*shape, dtype, scale) -> normal numbers on the device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0):
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    return normal
