"""Renders a chat template in a process of its own, whose time, memory and files are limited.

runner/chat_template.py runs this file and talks to it in lines of JSON. A template is a program of
someone else's: whatever it does ends with this process. Imports nothing of tokenloop.
"""

import codecs
import json
import resource
import signal
import sys
import time
from datetime import datetime


def main() -> None:
    setup = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = setup["path"]
    import_all()
    # Nothing is opened, written or started from here on.
    for name, most in (("AS", setup["memory"]), ("NOFILE", 3), ("FSIZE", 0), ("NPROC", 0)):
        limit(getattr(resource, f"RLIMIT_{name}"), most)
    limit(resource.RLIMIT_CORE, 0)
    template = None
    for line in sys.stdin.buffer:
        # The signal at its end, in time of the processor, ends the process.
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        try:
            template = template or compile_template(setup["source"])
            # Nothing is rendered for null.
            context = json.loads(line)
            text = "" if context is None else render(template, context, setup["characters"])
            answer = {"text": text}
        except MemoryError:
            answer = {"error": f"it takes more than {setup['memory'] >> 20} MB of memory"}
        # A template can raise anything.
        except Exception as error:
            answer = {"error": str(error) or type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def import_all() -> None:
    """Import what jinja2 imports only when a template needs it."""
    import pprint  # noqa: F401
    import textwrap  # noqa: F401
    import unicodedata  # noqa: F401

    import jinja2.constants
    import jinja2.debug
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401

    codecs.lookup("unicode-escape")
    time.localtime()


def limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(kind, (most, most))


def render(template, context: dict, characters: int) -> str:
    pieces, length = [], 0
    for piece in template.generate(context):
        pieces.append(piece)
        length += len(piece)
        if length > characters:
            raise ValueError(f"its text has more than {characters} characters")
    return "".join(pieces)


def compile_template(source: str):
    """`source` as a jinja2 template, in the environment that transformers 5 gives it
    (utils/chat_template_utils.py)."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, within which the assistant's words stand: of no effect on the text,
        but for the scope that its variables have."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_words")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _words(self, caller):
            return caller()

    class Dict:
        """`dict`, without the type's own attributes."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    class Namespace(jinja2.utils.Namespace):
        """`namespace`, without names that begin with an underscore."""

        def __init__(*args, **kwargs):
            self, values = args[0], dict(*args[1:], **kwargs)
            jinja2.utils.Namespace.__init__(self)
            for name, value in values.items():
                self[name] = value

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(
                    f"a namespace has the name {name!r}; it must not begin with an underscore"
                )
            super().__setitem__(name, value)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own filter escapes for HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    def strftime_now(format):
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Namespace
    )
    return environment.from_string(source)


if __name__ == "__main__":
    main()
