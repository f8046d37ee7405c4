"""Rows, or groups of them, a piece at a time: what is made on the way stays small beside a weight.

An element of a result must not depend on its company, so that pieces change no bit.
"""

from cuobs.arrays import device_name

# Bytes that a piece may make on the way: about a cache on the CPU, few launches on a GPU.
PIECE = {"cpu": 2**19, "cuda": 2**28}


def pieces(xp, count, bytes_each):
    """Slices that cover 0 to count, each of as many as make `PIECE` bytes, or of one."""
    step = max(1, PIECE[device_name(xp)] // bytes_each)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def piece_bytes(count, bytes_each, device="cpu"):
    """Bytes that the largest of `pieces` makes on the way."""
    return min(count, max(1, PIECE[device] // bytes_each)) * bytes_each


def strips(count, most, tile=1):
    """(start, stop) of at most so many strips that cover 0 to count, as high as whole tiles."""
    height = -(-count // (most * tile)) * tile
    for start in range(0, count, height):
        yield start, min(start + height, count)
