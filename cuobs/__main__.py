"""The command line as a module: python -m cuobs."""

from cuobs_cli import main

if __name__ == "__main__":
    main(prog_name="cuobs")
