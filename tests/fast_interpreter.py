"""Triton's interpreter, which does the same in half of the time.

Each call of a kernel's function replaces what is in `triton.language` by what NumPy computes, also
where the kernel that calls it has done so; it looks at each name there. And each operation makes a
table of types anew.
"""

from types import ModuleType


def do_nothing_twice(interpreter: ModuleType) -> None:
    """Have `triton.runtime.interpreter` replace what is not replaced yet, and look once for NumPy's
    type of each of Triton's."""
    language, patch = interpreter.tl, interpreter._patch_lang
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

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, numpy_type_of
