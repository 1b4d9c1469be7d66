"""Triton's interpreter, which does the same in less than half of the time.

Each call of a kernel's function replaces what is in `triton.language` by what NumPy computes, also
where the kernel that calls it has done so; it looks at each name there. And each operation makes
types anew, of which there are few.
"""

from collections.abc import Callable
from types import ModuleType


def do_nothing_twice(interpreter: ModuleType) -> None:
    """Have `triton.runtime.interpreter` replace what is not replaced yet, and remember what follows
    from a type."""
    language, patch = interpreter.tl, interpreter._patch_lang
    tensor, block, builder = language.tensor, language.block_type, interpreter.InterpreterBuilder
    numpy_type, numpy_types = interpreter._get_np_dtype, {}

    def patch_lang(function):
        seen = function.__globals__.values()
        places = [language, *(value for value in seen if value is language.core)]
        # It is one of the names that are replaced, and put back with the others.
        if all(place.static_print is print for place in places):
            return interpreter._LangPatchScope()
        return patch(function)

    def numpy_type_of(kind):
        # Blocks are of their elements' type.
        scalar = kind.scalar
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = numpy_type(scalar)
        return numpy_types[scalar.name]

    begin, blocks = tensor.__init__, {}

    def begin_tensor(self, handle, type):
        # All but the handle follows from the type.
        like = type.__dict__.get("_like")
        if like is None:
            begin(self, handle, type)
            type._like = {name: value for name, value in vars(self).items() if name != "handle"}
        else:
            vars(self).update(like)
            self.handle = handle

    def block_of(make: Callable, element, shape):
        key = element.name, *shape.values
        if key not in blocks:
            blocks[key] = make()
        return blocks[key]

    with_element, get_block = block.with_element_ty, builder.get_block_ty
    tensor.__init__ = begin_tensor
    block.with_element_ty = lambda self, element: block_of(
        lambda: with_element(self, element), element, self.shape
    )
    builder.get_block_ty = lambda self, element, shape: block_of(
        lambda: get_block(self, element, shape), element, shape
    )
    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, numpy_type_of
