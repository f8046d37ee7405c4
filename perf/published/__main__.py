"""python -m perf.published run|report|picture|memory|pack, from the repository's folder."""

import sys
from importlib import import_module

COMMANDS = {
    "run": "time the rows on this device, into a folder",
    "report": "perf/RESULTS.rst from results.json",
    "picture": "loss against time, from results.json",
    "memory": "the most memory that pruning a layer from files takes",
    "pack": "make the pack of seven layers that the published size is made of",
}


def main(arguments):
    """Hand the arguments to the module that is named first."""
    if not arguments or arguments[0] not in COMMANDS:
        width = max(map(len, COMMANDS))
        print("usage: python -m perf.published COMMAND ...\n")
        print("\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()))
        return 0 if arguments in (["-h"], ["--help"]) else 2
    return import_module(f"perf.published.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
