"""The console command `tokenloop`: `tokenloop export`, `run`, `compare` and `serve`.

The runner's own sub-commands are named here. The others are entry points of the installed package,
so that the runner does not know the export.
"""

import sys
from importlib import import_module

from tokenloop.runner import process

# Of each the file and its function of the arguments after the name.
OWN = {"run": ("run", "main"), "compare": ("run", "main_compare"), "serve": ("serve", "main")}
GROUP = "tokenloop.commands"


def main(arguments: list[str] | None = None) -> int:
    """Run the sub-command that the first of `arguments` names with the others; its exit status.
    Without `arguments` they are the process's, and the process is the command's."""
    if arguments is None:
        process.end_when_interrupted()
    process.open_streams()
    name, *others = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in OWN:
        module, function = OWN[name]
        return getattr(import_module(f"tokenloop.runner.{module}"), function)(others)
    # This takes longer than all that `tokenloop run` imports before it knows its arguments.
    from importlib.metadata import distribution

    package = distribution("tokenloop")
    entries = {entry.name: entry for entry in package.entry_points if entry.group == GROUP}
    if name in entries:
        return entries[name].load()(others)
    names = ", ".join([*entries, *OWN])
    if name in ("-h", "--help"):
        print(
            f"usage: tokenloop COMMAND ...\n\n{package.metadata['Summary']}.\n\n"
            f"commands: {names}\n`tokenloop COMMAND --help` lists a command's flags, and "
            "`tokenloop --version` prints the version."
        )
        return 0
    if name == "--version":
        print(f"tokenloop {package.version}")
        return 0
    fault = f"{name} is not a command" if name else "no command is given"
    process.say(f"tokenloop: error: {fault}; the commands are {names}")
    return 2
