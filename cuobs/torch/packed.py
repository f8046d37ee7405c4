"""Linear layers that hold packed weights."""

import re
import warnings
from functools import lru_cache, partial

import numpy as np
import torch
from torch import nn

from cuobs import ops
from cuobs.arrays import cupy_fault, receive, stream_of
from cuobs.packed import check_obeys
from cuobs.pattern import parse
from cuobs.torch.graphs import record

# Unsigned integers of as many bytes as a float has, as NumPy calls them.
BITS = {2: (torch.int16, "uint16"), 4: (torch.int32, "uint32"), 8: (torch.int64, "uint64")}
HALVES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed; no autograd: it runs, and does not learn.

    On a CUDA device (compute capability 8.0 and newer) kernels multiply float16 and bfloat16 with
    the packed weight: few tokens, on Hopper any number. Otherwise and on the CPU it is unpacked
    for each product. `torch.compile` and CUDA graphs take it, once it has run for as many tokens.

    Parameters
    ----------
    in_features, out_features : int
        K and M of the weight.
    pattern : str or Pattern
        See `cuobs.patterns`.
    bias : bool
    device, dtype
        Of the buffers, which are empty until a state is loaded into them.

    Attributes
    ----------
    weight : tensor, shape (tile rows, tile columns, loads, 32, 8)
        The kept values.
    index : tensor of int32, shape (tile rows, groups of tile columns, words, 32)
        The numbers of the masks.
    bias : tensor, shape (M,), or None

    See Also
    --------
    from_weight : pack a weight.
    """

    def __init__(
        self, in_features, out_features, pattern="2:4", bias=True, device=None, dtype=None
    ):
        super().__init__()
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.pattern = pattern_text(pattern)
        form = ops.tiling(_layout(self.pattern, self.out_features, self.in_features))
        options = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.register_buffer("weight", torch.empty(form.values_shape, **options))
        self.register_buffer(
            "index", torch.empty(form.index_shape, device=device, dtype=torch.int32)
        )
        self.register_buffer("bias", torch.empty(out_features, **options) if bias else None)

    @classmethod
    def from_weight(cls, weight, pattern="2:4", bias=None):
        """Pack a weight (M, K) that obeys a pattern, on its device.

        Raises
        ------
        ValueError
            It does not obey it.
        """
        M, K = weight.shape
        packed = cls(K, M, pattern, bias is not None, device="meta", dtype=weight.dtype)
        values, index = pack_tensor(weight, packed.pattern)
        packed.weight, packed.index = values, index
        packed.bias = None if bias is None else bias.detach().clone()
        return packed

    def unpack(self) -> torch.Tensor:
        """The dense weight (M, K)."""
        return unpack_tensor(
            self.weight, self.index, self.pattern, self.out_features, self.in_features
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X Wᵀ + bias over the last dimension of ``x``."""
        flat = x.reshape(-1, x.shape[-1])
        out = packed_linear(
            flat, self.weight, self.index, self.bias, self.pattern, self.out_features,
            self.in_features,
        )  # fmt: skip
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"pattern={self.pattern}, bias={self.bias is not None}"
        )


def pattern_text(pattern):
    """A pattern as a text that every installation of cuobs reads back."""
    pattern = parse(pattern)
    everywhere = re.fullmatch(r"[0-9]+:[0-9]+(x[0-9]+)?|coupled-2:4|block16-row8", pattern.name)
    return pattern.name if everywhere and parse(pattern.name) == pattern else str(pattern)


@lru_cache(maxsize=256)
def _layout(pattern, rows, columns):
    return parse(pattern).compile(rows, columns)


def pack_tensor(weight, pattern, name="weight"):
    """Values and index of a weight, on its device and in its dtype.

    Raises
    ------
    ValueError
        The weight does not obey the pattern.
    """
    if not weight.is_floating_point() or weight.dtype.itemsize not in BITS:
        raise TypeError(f"{name}: found {weight.dtype}, expected float16, bfloat16 or wider")
    if weight.ndim != 2:
        raise ValueError(f"{name}: found {weight.ndim} dimensions, expected 2 (rows, columns)")
    layout = _layout(pattern, *weight.shape)
    try:
        with _on_device(weight):
            values, index = ops.pack(_bits(weight.detach()), layout)
    except ValueError:
        check_obeys(weight, pattern, name)
        raise
    return _tensor(values, weight.dtype), _tensor(index, torch.int32)


def unpack_tensor(values, index, pattern, rows, columns):
    """The dense weight (rows, columns) of packed tensors."""
    layout = _layout(pattern, rows, columns)
    if values.is_cuda:
        if kernels := _kernels(values, layout):
            return _unpack_by_kernel(kernels, values, index, layout)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"pattern: found {pattern}, which no kernel unpacks on {values.device}, in a CUDA "
                "graph that is captured, expected one that a kernel does"
            )
    with _on_device(values):
        weight = ops.unpack(_bits(values), receive(index), layout)
    return _tensor(weight, values.dtype)


@torch.library.custom_op("cuobs::packed_linear", mutates_args=())
def packed_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    pattern: str,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """X Wᵀ + bias with a packed weight (rows, columns), x of shape (tokens, columns)."""
    if x.dtype != values.dtype:
        raise TypeError(f"x: found {x.dtype}, expected {values.dtype}, that of the packed weight")
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"x: found the shape {tuple(x.shape)}, expected (tokens, {columns})")
    if not len(x):
        return x.new_empty(0, rows)
    layout = _layout(pattern, rows, columns)
    if x.is_cuda:
        if x.dtype in HALVES and (kernels := _kernels(values, layout)):
            return _multiply_by_kernel(kernels, x, values, index, bias, layout)
    elif x.device.type == "cpu":
        _say_once()
    weight = unpack_tensor(values, index, pattern, rows, columns)
    return nn.functional.linear(x, weight, bias)


@packed_linear.register_fake
def _(x, values, index, bias, pattern, rows, columns):
    return x.new_empty(x.shape[0], rows)


@lru_cache(maxsize=1)
def _say_once():
    warnings.warn(
        "cuobs: packed weights are unpacked for each product on the CPU, which is not faster than "
        "dense ones: they pay on NVIDIA GPUs",
        stacklevel=3,
    )


def _bits(tensor):
    """The elements of a tensor as unsigned integers, an array on its memory."""
    signed, unsigned = BITS[tensor.dtype.itemsize]
    return receive(tensor.contiguous().view(signed)).view(unsigned)


def _tensor(array, dtype):
    """A tensor on an array's memory, its elements read as a dtype of their size."""
    signed = {2: np.int16, 4: np.int32, 8: np.int64}[array.dtype.itemsize]
    return torch.from_dlpack(array.view(signed)).view(dtype)


def _on_device(tensor):
    if tensor.is_cuda and (fault := cupy_fault()):
        raise ValueError(f"device: found a packed weight on {tensor.device}, but {fault}")
    return stream_of(tensor)


def _kernels(values, layout):
    """The module that launches kernels, or None where they do not take this weight."""
    if cupy_fault():
        return None
    from cuobs.ops.cuda import packed

    return packed if packed.supported(layout, values.device.index) else None


def _unpack_by_kernel(kernels, values, index, layout):
    """The dense weight; of values of four or eight bytes, each two bytes on their own."""
    count = values.dtype.itemsize // 2
    parts = values.contiguous().view(torch.int16).unflatten(-1, (-1, count))
    index, found = index.contiguous(), []
    with torch.cuda.device(values.device):
        tables = kernels.tables(layout, values.device.index)
        for n in range(count):
            part = parts[..., n].contiguous()
            found.append(torch.empty(layout.shape, dtype=torch.int16, device=values.device))
            kernels.unpack_into(
                layout, HALVES.get(values.dtype, "float16"), part.data_ptr(), index.data_ptr(),
                *tables, found[-1].data_ptr(), _stream(kernels),
            )  # fmt: skip
    whole = found[0] if count == 1 else torch.stack(found, dim=-1).flatten(1)
    return whole.view(values.dtype)


def _multiply_by_kernel(kernels, x, values, index, bias, layout):
    dtype, number = HALVES[values.dtype], values.device.index
    values, index = _aligned(values), _aligned(index)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    with torch.cuda.device(values.device):
        out = x.new_empty(len(x), layout.shape[0])
        rows, _ = kernels.tables(layout, number)
        inputs = arranged(x, layout)

        def run(way, weight):
            values, index = weight
            if way.kernel == "unpack":
                return _unpack_and_multiply(kernels, x, values, index, bias, layout, way.splits)
            size = kernels.room_bytes(layout, way, len(x))
            room = torch.empty(size, dtype=torch.uint8, device=out.device)
            kernels.multiply(layout, dtype, way, kernels.Operands(
                values.data_ptr(), index.data_ptr(), inputs.data_ptr(),
                0 if bias is None else bias.data_ptr(), out.data_ptr(), room.data_ptr(),
                rows, len(x),
            ), _stream(kernels))  # fmt: skip
            return out

        return run(_way(layout, dtype, x, (values, index), run), (values, index))


def _unpack_and_multiply(kernels, x, values, index, bias, layout, count):
    """A dense product with what is unpacked, a slice of rows at a time."""
    if count == 1:
        weight = _unpack_by_kernel(kernels, values, index, layout)
        return nn.functional.linear(x, weight, bias)
    (M, K), number = layout.shape, values.device.index
    parts, height = kernels.slices(layout, count)
    out, room = x.new_empty(len(x), M), x.new_empty(height, K)
    for n, part in enumerate(parts):
        top = n * height
        bottom = min(top + height, M)
        kernels.unpack_into(
            layout, HALVES[values.dtype], values.data_ptr(), index.data_ptr(),
            *kernels.tables(layout, number), room.data_ptr() - top * K * room.element_size(),
            _stream(kernels), part,
        )  # fmt: skip
        mine, weight = out[:, top:bottom], room[: bottom - top].T
        if bias is None:
            torch.mm(x, weight, out=mine)
        else:
            torch.addmm(bias[top:bottom], x, weight, out=mine)
    return out


def _way(layout, dtype, x, weight, run):
    """The way for so many tokens; nothing is measured while a graph is captured."""
    from cuobs.ops.cuda.packed_ways import Trial, chosen, known, turns

    number = x.device.index
    way = known(layout, dtype, len(x), number)
    if way is not None:
        return way
    if torch.cuda.is_current_stream_capturing():
        return chosen(layout, dtype, len(x), number)

    def trial():
        copies = turns(sum(part.nbytes for part in weight)) - 1
        copied = [tuple(part.clone() for part in weight) for _ in range(copies)]
        return Trial(run, [weight, *copied], partial(record, warm_up=0))

    with stream_of(x):
        return chosen(layout, dtype, len(x), number, trial)


def arranged(x, layout):
    """Inputs in the packed order of the columns, contiguous and with zeros where there are none."""
    from cuobs.ops.cuda.packed_layout import columns_of, order

    width = len(columns_of(layout))
    if order(layout) is None:
        padded = nn.functional.pad(x, (0, 1))
        return padded.index_select(1, _input_columns(layout, x.device))
    if width > x.shape[1]:
        return nn.functional.pad(x, (0, width - x.shape[1]))
    return _aligned(x)


@lru_cache(maxsize=256)
def _input_columns(layout, device):
    from cuobs.ops.cuda.packed_layout import columns_of

    columns = torch.from_numpy(columns_of(layout)).long()
    return torch.where(columns < 0, layout.shape[1], columns).to(device)


def _aligned(tensor):
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _stream(kernels):
    return kernels.Stream(torch.cuda.current_stream().cuda_stream)
