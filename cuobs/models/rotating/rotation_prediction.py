"""What learning and folding a rotation takes, predicted before it starts."""

from dataclasses import dataclass

from cuobs import validation
from cuobs.arrays import size_text
from cuobs.models import memory
from cuobs.models.pruning.prediction import (
    HOST_OF_GPU,
    Passing,
    groups_by_shape,
    host_bytes,
    stages_of,
    untied,
    weight_bytes,
)
from cuobs.models.ranks import current
from cuobs.models.rotating.folding import ROWS
from cuobs.models.rotating.rotation_moments import batch_of, compiled, stays
from cuobs.models.structure import find_blocks, is_linear, linears, oriented

# Windows and their length before they are known: what has no room for these is refused.
FEWEST = 1, 1
# Elements of weights that are rotated at once.
PIECE = 2**27
# Bytes of a weight that is rotated; it is kept in no more.
ITEM = {"cpu": 4, "cuda": 2}
# Bytes that an element of a piece takes beside that until its gradient is there, of linears that
# read the stream and of those that write into it, which are transposed.
TAKEN = {"cpu": (14, 22), "cuda": (16, 18)}
# Float32 numbers that an element of a generator has: itself, its moments and gradient, the basis
# and its gradient, the best so far, what is kept to go back; and those that the way back through
# the exponential takes, which is an exponential of twice the order.
STATE, BACK = 9, 66
# Bytes that PyTorch keeps for its products, 64 MiB on an H100.
WORKSPACE = {"cpu": 0, "cuda": 2**26}
# Bytes of an element of a sum while it is inverted in float64.
INVERSE = 24


@dataclass(frozen=True)
class RotationWork(Passing):
    """What learning a rotation takes, in numbers.

    Attributes
    ----------
    stacks : list of (int, int, int)
        Of the weights that count, those of one name and shape together: blocks, rows, columns.
    squares : int
        Elements of the moments of a norm's output, of all norms of all blocks.
    heads : int
        Likewise of attention's, by head.
    generators : (int, int)
        Elements of those of the stream and of all heads.
    columns : list of int
        Of the linears of a block whose inputs have all their moments made at first.
    block, largest : int
        Bytes of a block, elements of its largest linear.
    vocabulary : int
        Rows of the embedding.
    weights : int
        Elements of the linears of all blocks.
    model, host : int
        Bytes of all weights on the device, and of what the host holds all the time; on the CPU
        both are the latter.
    """

    stacks: list
    squares: int
    heads: int
    generators: tuple
    columns: list
    block: int
    largest: int
    vocabulary: int
    weights: int
    model: int
    host: int

    @property
    def moments(self):
        """Bytes of all moments that learning looks at."""
        return 4 * (self.squares + self.heads)


def rotation_work(model, windows, patterns, recipe, device):
    """A `RotationWork` from shapes alone.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        May be on the meta device, in the dtype of its weights.
    windows : (int, int)
        How many there are, and their length.
    patterns : dict of Pattern
        By the name of a linear.
    recipe : RotationRecipe
    device : torch.device
    """
    prefix, blocks = find_blocks(model)
    block, width = blocks[0], model.get_input_embeddings().weight.shape[1]
    shapes = {name: tuple(oriented(m).shape) for name, m in linears(blocks).items()}
    sizes = [M * K for M, K in shapes.values()]
    named = groups_by_shape(block, width)
    groups = [(some[0][1][1], sum(rows for _, (rows, _) in some)) for some in named]
    writers = [K for some in named for _, (M, K) in some if width == M]
    norms, whole = _norms(block, width), recipe.compensated or recipe.permute
    heads, d = _heads(model.config.get_text_config(), width)
    if not any(M == heads * d for M, _ in shapes.values()):
        heads = d = 0  # no linear makes values alone
    count, length = -(-min(windows[0], recipe.windows) // current().size), windows[1]
    element = next(iter(linears(block).values())).weight.element_size()
    host = host_bytes(model, None, False) + untied(model)
    size = weight_bytes(model) + untied(model)
    here = size * (next(model.parameters()).device.type == device.type)
    return RotationWork(
        stacks=_stacks(prefix, shapes, patterns),
        squares=norms * len(blocks) * width**2,
        heads=len(blocks) * d * min(writers, default=0),
        generators=(width**2, len(blocks) * heads * d**2),
        columns=[width] * norms + (writers if whole else []),
        groups=groups,
        stages=stages_of(groups, length, width, element),
        windows=count,
        length=length,
        width=width,
        batch=min(batch_of(length, device), count),
        element=element,
        block=weight_bytes(block),
        largest=max(sizes),
        vocabulary=len(model.get_input_embeddings().weight),
        weights=sum(sizes),
        model=host if device.type == "cpu" else here,
        host=host,
    )


def _stacks(prefix, shapes, patterns):
    """Blocks, rows and columns of the weights that count, by their names in a block."""
    found, divided = {}, {}
    for name, shape in shapes.items():
        pattern = patterns.get(f"{prefix}.{name}")
        if (pattern, shape) not in divided:
            divided[pattern, shape] = compiled(pattern, shape) is not None
        if divided[pattern, shape]:
            key = name.partition(".")[2], shape
            found[key] = found.get(key, 0) + 1
    return [(L, *shape) for (_, shape), L in found.items()]


def _norms(block, width):
    """Norms of the stream in a block: modules beside linears that have a scale as wide as it."""
    modules = [m for m in block.modules() if not is_linear(m)]
    wide = [m for m in modules if any(p.shape == (width,) for p in m.parameters(recurse=False))]
    return len(wide) or 2


def _heads(config, width):
    """Heads of keys and values in a block, and their width."""
    queries = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or queries
    return heads, getattr(config, "head_dim", None) or width // queries


def predict_rotation(work, device, piece=PIECE):
    """Bytes that will be in use at the peak, where the basis is learned.

    Parameters
    ----------
    work : RotationWork
    device : torch.device
    piece : int
        Elements of weights that are rotated at once, or one weight.
    """
    return int(work.model + WORKSPACE[device.type] + max(_phases(work, device, piece)))


def _phases(work, device, piece):
    """Bytes beside the model, phase by phase."""
    item, double, stay = _kept(work, device), 8, stays(work.weights, device)
    sizes = [stay * item * L * M * K for L, M, K in work.stacks]
    kept = sum(sizes)
    # A model is examined, and folded in the end, a block and a piece of the head at a time; a
    # weight in float64 beside two more, its product and what its scale or basis makes of it.
    own = (work.element + double) * work.block // work.element
    yield own + 3 * double * work.largest
    yield 3 * double * min(ROWS, work.vocabulary) * work.width
    states = work.windows * work.length * work.width * work.element
    block = work.block * (work.element != item)  # else a block's weights are those that are kept
    yield kept + work.moments + states + block + _gathering(work)
    yield kept + work.moments + max(sizes, default=0)
    kept += work.moments + 4 * STATE * sum(work.generators)
    reads, writes = TAKEN[device.type]
    # A copy on the device or in float32 stays until the gradient of what reads the stream.
    reads += ITEM[device.type] * (not stay or item < ITEM[device.type])
    pieces = [
        min(L, max(1, piece // (M * K))) * M * K * (writes if work.width == M else reads)
        for L, M, K in work.stacks
    ]
    yield kept + work.moments + max(pieces, default=0)
    yield kept + 4 * BACK * max(work.generators)


def _kept(work, device):
    """Bytes of a weight that is kept."""
    return min(work.element, 4) if device.type == "cpu" else ITEM[device.type]


def _gathering(work):
    """Bytes of the sums of a block, and of a batch that passes it or of an inverse."""
    tokens, most, sums = work.batch * work.length, 0, 4 * sum(K * K for K in work.columns)
    for (K, _), stage in zip(work.groups, work.stages, strict=False):
        # Tokens that count are copied, and once more where they are no float32.
        copies = tokens * K * (work.element + 4 * (work.element != 4))
        most = max(most, work.batch * stage.runs + copies)
    widest = max(work.columns)
    return sums + max(most + sums, work.batch * work.stages[-1].runs, INVERSE * widest**2)


def predict_rotation_host(work, device):
    """Bytes of the host's memory that will be in use at the peak, at least."""
    if device.type == "cpu":
        return predict_rotation(work, device)
    kept = 0 if stays(work.weights, device) else ITEM[device.type] * work.weights
    return work.host + HOST_OF_GPU + work.block + kept


def check_rotation(work, device, limit=None):
    """Refuse a model that there is no room to rotate, however little is rotated at once.

    Parameters
    ----------
    work : RotationWork
    device : torch.device
    limit : int, optional
        Bytes of the host's memory that may be used.
    """
    host = predict_rotation_host(work, device)
    if limit is not None and host > limit:
        raise ValueError(
            f"host_memory: found {size_text(limit)}, expected at least {size_text(host, up=True)} "
            "to rotate: for libraries, the model, and what its basis is learned from"
        )
    least, there = predict_rotation(work, device, piece=1), memory.whole(device)
    if least > there:
        raise ValueError(
            f"rotate: found a model that takes {size_text(least)} while its basis is learned, "
            f"expected one for the {size_text(there)} of the {device.type}"
        )


def settle_rotation(work, device, limit=None):
    """Bytes that rotating will take on the device, of which there may be fewer: that is said.

    Where there can't be enough it is refused, see `check_rotation`.
    """
    check_rotation(work, device, limit)
    taken = predict_rotation(work, device)
    free = memory.free(device) + (memory.resident() if device.type == "cpu" else work.model)
    if taken > free:
        validation.warn(
            f"rotate: found {size_text(free)} free on the {device.type}, expected "
            f"{size_text(taken, up=True)}: the basis may be learned in smaller pieces, or not"
        )
    return taken


def piece_within(free, moments, device):
    """Elements of weights that are rotated at once, by the bytes that are free.

    Parameters
    ----------
    free : int
    moments : int
        Bytes of all moments, as much as is kept beside a piece.
    device : torch.device
    """
    each = max(TAKEN[device.type]) + ITEM[device.type]
    return int(max(1, min(PIECE, (free - moments) // each)))
