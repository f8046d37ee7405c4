"""The command line as a module: python -m cuobs."""

import sys

try:
    from cuobs_cli import main
except ModuleNotFoundError as error:
    if error.name != "cuobs_cli":
        raise
    sys.exit("cuobs_cli: found no such package, expected cuobs to be installed: pip install -e .")

if __name__ == "__main__":
    main(prog_name="cuobs")
