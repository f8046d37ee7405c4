"""The published benchmark at its own size: what it ran, what we run, side by side."""

import argparse
import json
from pathlib import Path


def from_results(argv, command, function):
    """Call ``function(results, target)`` with what a command's two arguments name."""
    parser = argparse.ArgumentParser(f"perf.published {command}", description=function.__doc__)
    parser.add_argument("results", type=Path, help="what 'run' wrote")
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args(argv)
    function(json.loads(arguments.results.read_text()), arguments.target)
