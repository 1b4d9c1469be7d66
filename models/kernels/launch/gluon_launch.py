"""Programmatic dependent launch for kernels in Gluon (see dependent_launch.py)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tokenloop.models.kernels.launch.dependent_launch import RELEASE_WAIT

_RELEASE_WAIT = gl.constexpr(RELEASE_WAIT.value)


@gluon.jit
def after_wait(number):
    """The same int32, once the kernels ahead are done; the next one may begin before.

    The warps that a kernel begins with wait. What its other warps do must depend on the number.
    """
    return gl.inline_asm_elementwise(
        _RELEASE_WAIT, "=r,r", [number], dtype=gl.int32, is_pure=True, pack=1
    )
