"""Checks of what an op is given, cheap beside a launch.

Each raises with one sentence that names the argument, what was found and what was expected.
"""

PRECISIONS = ("tensor", "fp32")


def same_dtype(name, array, other_name, other):
    """Refuse two arrays of different dtypes."""
    if array.dtype != other.dtype:
        raise TypeError(
            f"{other_name}: found dtype {other.dtype}, expected {array.dtype}, that of {name}"
        )


def shaped(name, array, shape):
    """Refuse an array that has not this shape."""
    if array.shape != shape:
        raise ValueError(f"{name}: found shape {array.shape}, expected {shape}")


def square(name, array):
    """Refuse anything but a square matrix."""
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"{name}: found shape {array.shape}, expected a square matrix")


def real(name, array):
    """Refuse anything but float32 and float64."""
    if array.dtype != "float32" and array.dtype != "float64":
        raise TypeError(f"{name}: found dtype {array.dtype}, expected float32 or float64")


def boolean(name, array):
    """Refuse anything but bool."""
    if array.dtype != bool:
        raise TypeError(f"{name}: found dtype {array.dtype}, expected bool")


def contiguous(name, array):
    """Refuse an array whose elements do not follow each other row after row."""
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: found strides {array.strides}, expected row after row")


def rows_in_a_piece(name, matrix):
    """Refuse a matrix whose rows are no runs of memory."""
    if matrix.shape[1] > 1 and matrix.strides[1] != matrix.itemsize:
        raise ValueError(f"{name}: found strides {matrix.strides}, expected contiguous rows")


def precise(precision):
    """Refuse an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: found {precision!r}, expected 'tensor' or 'fp32'")
