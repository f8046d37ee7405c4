"""The command line: parse, call cuobs, print. It knows no method, no pattern and no algebra."""

import sys


def __getattr__(name):
    # NumPy and the rest are imported on the way, which a user may interrupt too.
    if name != "main":
        raise AttributeError(f"module 'cuobs_cli' has no attribute {name!r}")
    try:
        from cuobs_cli.group import main
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        raise SystemExit(130) from None
    return main
