"""A GGUF model in one file, or in the parts that llama.cpp's gguf-split makes of it:
NAME-00001-of-00003.gguf and so on. The first has the metadata of all."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from tokenloop.export.checkpoint.gguf_reader import GgufTensor, read_header
from tokenloop.export.errors import ExportError

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class Parts(NamedTuple):
    """The first part's metadata, the tensors of all parts, and the files in order."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    files: tuple[Path, ...]


def read_parts(path: Path) -> Parts:
    """Read the headers of the file `path`, and of the others if it is one of several parts.

    Errors: those of `read_header`, and ExportError for a part whose name is not as above, for one
    that is missing or of another model, for a tensor that is in two of them, and for tensors that
    are in none.
    """
    metadata, tensors = read_header(path)
    count = metadata.get("split.count", 1)
    if count <= 1:
        return Parts(metadata, tensors, (path,))
    named = PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise ExportError(
            f"{path} is one of {count} parts, which are found by their names: "
            f"NAME-00001-of-{count:05}.gguf and so on are right"
        )
    files = tuple(path.with_name(f"{named[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count))
    if missing := next((file for file in files if not file.is_file()), None):
        raise ExportError(f"{missing} is missing; {path.name} is one of {count} parts")
    first, found = {}, {}
    for i, file in enumerate(files):
        metadata, tensors = read_header(file)
        if metadata.get("split.count", 1) != count or metadata.get("split.no") != i:
            raise ExportError(
                f"{file}: split.no is {metadata.get('split.no')} and split.count "
                f"{metadata.get('split.count')}; {i} and {count} are right for its name"
            )
        first = first or metadata
        if twice := found.keys() & tensors.keys():
            raise ExportError(f"{file}: another part has the tensor {min(twice)} too")
        found |= tensors
    total = first.get("split.tensors.count", len(found))
    if total != len(found):
        raise ExportError(
            f"{files[0]} says that its {count} parts have {total} tensors; they have {len(found)}"
        )
    return Parts(first, found, files)
