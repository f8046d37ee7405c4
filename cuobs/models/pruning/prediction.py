"""What pruning a model takes, predicted before it starts."""

from dataclasses import dataclass

import torch

from cuobs.arrays import size_text
from cuobs.models import memory
from cuobs.models.blocks import capture
from cuobs.models.parked import at_hand, home_of, parked
from cuobs.models.pruning.groups import probe
from cuobs.models.pruning.streams import Passage, Streams
from cuobs.models.pruning.tuning import STEP_WINDOWS
from cuobs.models.ranks import current
from cuobs.models.structure import linears, oriented
from cuobs.recipe import methods

# A process that has imported PyTorch and transformers and holds no model.
LIBRARIES = 400 * 2**20
# What PyTorch and CuPy keep of the host's memory for a GPU.
HOST_OF_GPU = 2 * 2**30
# Share of a large product's rate that a block reaches over all.
REACHED = 0.4
# `Method.operations` of a method that says nothing.
UNSAID = 2, 4
# Rows of an embedding that come into memory where one is looked at, about.
PAGE_ROWS = 8
# Share of the memory that is free which forwards that wait inside a block may fill up to.
HOLDING = {"cpu": 0.5, "cuda": 0.85}


@dataclass(frozen=True)
class Stage:
    """What a window takes while it waits before a group, and until then.

    Attributes
    ----------
    waits : int
        Bytes that a forward holds where it stands there.
    runs : int
        Bytes that it takes at most on the way there, those that it holds included.
    """

    waits: int
    runs: int


@dataclass(frozen=True)
class Passing:
    """How windows pass through a block, in numbers.

    Attributes
    ----------
    groups : list of (int, int)
        Columns and rows in all of the linears of each group.
    stages : list of Stage
        One for each group, and one for what leaves the block.
    windows, length, width : int
        Of the hidden states.
    batch : int
        Windows in a batch, as many as there are at most.
    element : int
        Bytes of an element of the hidden states and weights.
    """

    groups: list
    stages: list
    windows: int
    length: int
    width: int
    batch: int
    element: int


@dataclass(frozen=True)
class Work(Passing):
    """What pruning a model takes, in numbers.

    Attributes
    ----------
    block : int
        Bytes of a block.
    model : int
        Bytes of all weights that lie where blocks are pruned, libraries included on the CPU.
    follows : bool
        Whether the dense model is followed too.
    mixed : bool
        Whether its inputs enter the targets.
    method : str
    tune : int
        Windows in a step of tuning; 0 where blocks are not tuned.
    host : int
        Bytes that the host holds all the time, see `host_bytes`.
    processes : int
        That share the rows.
    pruned : list of int
        Rows of each group that are pruned in some block; by default all.
    """

    block: int
    model: int
    follows: bool
    mixed: bool
    method: str
    tune: int
    host: int = 0
    processes: int = 1
    pruned: list = ()

    @property
    def pruned_groups(self):
        """Columns, rows that are pruned and `Stage` of the groups of which some are."""
        pruned = self.pruned or [rows for _, rows in self.groups]
        rows = zip(self.groups, pruned, self.stages, strict=False)
        return [(K, some, stage) for (K, _), some, stage in rows if some]

    @property
    def batches(self):
        """How many batches there are."""
        return -(-self.windows // self.batch)


# What `Method.held` says of a method, for the target of a group where that is not the weights
# themselves.
HELD_BY_TARGET = (2, 5)
# Bytes of float64 in place of float32 on the CPU, where targets are solved for.
TARGET_ITEM = {"cpu": 8, "cuda": 4}


# What backpropagation keeps of a window beside what a forward takes in float32, about; on the CPU
# the heap keeps some more.
KEPT_TO_LEARN = {"cpu": 4, "cuda": 3}


def predict(work, device, held=0, states=True):
    """Bytes that will be in use at the peak, where blocks are pruned.

    Parameters
    ----------
    work : Work
    device : torch.device
    held : int
        Batches whose forwards wait inside a block.
    states : bool
        Whether all hidden states are there too, not only those of a batch that a GPU works on.

    Returns
    -------
    int
    """
    streams = 2 if work.follows else 1
    # On a GPU the next block is copied meanwhile.
    fixed = work.model + work.block * (streams + (device.type == "cuda"))
    share = 1 if states else min(1, work.batch / work.windows) * (device.type == "cuda")
    fixed += share * states_of(work)
    return int(fixed + max(_phases(work, device, held)))


def states_of(work):
    """Bytes of the hidden states of all windows."""
    streams = 2 if work.follows else 1
    return work.windows * work.length * work.width * work.element * streams


def place_of_states(work, device, limit):
    """Where the hidden states of all windows lie.

    Parameters
    ----------
    work : Work
    device : torch.device
    limit : int or None
        Bytes of the host's memory that may be used.

    Returns
    -------
    {"device", "host", "scratch"}
        On the device where they fit; else, where that is a GPU, in the host's memory; in a scratch
        file beyond the limit.
    """
    if device.type == "cuda" and predict(work, device) <= work.model + memory.free(device):
        return "device"
    if limit is not None and predict_host(work, device) > limit:
        return "scratch"
    return "device" if device.type == "cpu" else "host"


def settle(work, device, limit):
    """What `place_of_states`, `hold` and then `predict` give, each in view of those before."""
    place = place_of_states(work, device, limit)
    held = hold(work, device, limit, place == "device")
    return place, held, predict(work, device, held, place == "device")


def predict_host(work, device, states=True):
    """Bytes of the host's memory that will be in use at the peak, at least.

    Parameters
    ----------
    work : Work
    device : torch.device
    states : bool
        Whether all hidden states are there too.
    """
    if device.type == "cpu":
        return predict(work, device, states=states)
    return work.host + HOST_OF_GPU + 2 * work.block + (states_of(work) if states else 0)


def check_host(work, device, limit):
    """Refuse a limit of the host's memory, in bytes or None, in which a model can't be pruned."""
    least = predict_host(work, device, states=False)
    if limit is not None and least > limit:
        raise ValueError(
            f"host_memory: found {size_text(limit)}, expected at least {size_text(least)} for "
            "libraries, the weights that stay in memory, a block, and what it takes to prune it"
        )


def batches_to_hold(work, device, budget, states=True):
    """How many batches may wait inside a block for the peak to stay within a budget, in bytes."""
    least = predict(work, device, states=states)
    each = predict(work, device, work.batches, states) - least
    if each <= 0:
        return work.batches
    return int(max(0, min(work.batches, (budget - least) * work.batches // each)))


def _phases(work, device, held):
    """Bytes beside weights and hidden states, phase by phase."""
    streams = 2 if work.mixed else 1
    if device.type == "cpu":
        yield _probing(work)
    # Until the first group is pruned, the block before is on its way back from a GPU.
    leaving = work.block * (device.type == "cuda")
    for K, rows, stage in work.pruned_groups:
        # Forwards that wait: all that are held, or those of one batch.
        waiting = min(max(held, 1) * work.batch, work.windows) * stage.waits * streams
        sums = 4 * K * K * streams + (4 * K * work.width if work.mixed else 0)
        taken = _taken(work, device, K)
        yield leaving + waiting + sums + max(work.batch * (stage.runs - stage.waits), taken)
        leaving = 0
        yield waiting * (held > 0) + sums + _pruning(work, device, K, rows)
    waiting = min(held * work.batch, work.windows) * work.stages[-2].waits * streams
    yield waiting + work.batch * work.stages[-1].runs
    if work.tune:
        # Adam keeps two numbers of each weight beside it, its gradient and its float32 copy.
        kept = KEPT_TO_LEARN[device.type] * min(work.batch, work.tune) * work.stages[-1].runs
        yield (4 * kept + 16 * work.block) // work.element


def _taken(work, device, K):
    """Bytes of the inputs of a batch's tokens that count, and of how they differ."""
    tokens = work.batch * work.length
    if device.type == "cuda":
        return tokens * K * work.element * (3 if work.mixed else 1)
    # Each is copied where some tokens do not count, and once more where it is no float32.
    columns, differences = (2 * (K + work.width), K + work.width) if work.mixed else (K, 0)
    copies = work.element * columns + 4 * columns * (work.element != 4)
    return tokens * (copies + 4 * differences) + 4 * K * K


def _probing(work):
    """Bytes of a block in float32 and of what one window leaves there: so groups are found."""
    columns = sum(K + 2 * rows for K, rows in work.groups)
    return 4 * (work.block // work.element + work.length * columns)


def _pruning(work, device, K, rows):
    """Bytes that it takes to prune a group beside its sums."""
    rows = -(-rows // work.processes)
    squares, wide = methods()[work.method].held
    method = 4 * (squares * K * K + wide * rows * K)
    if not work.mixed:
        return method
    squares, wide = HELD_BY_TARGET
    target = TARGET_ITEM[device.type] * (squares * K * K + wide * rows * K)
    return max(method + 4 * rows * K, target)


def stages_of(groups, length, width, element, streams=False):
    """The `Stage` of each group and of the end, from shapes alone.

    What enters a group is held beside the residual stream and what is made of that for the block;
    with ``streams`` beside the stream that is followed from writer to writer too. On the way there
    also what the linears before have given.
    """
    window = length * element
    held, before, most, found = (2 + streams) * width, 0, 0, []
    for K, rows in groups:
        most = max(most, held + before + K)
        found.append(Stage((held + K) * window, most * window))
        before = rows
    return [*found, Stage(0, max(most, held + before + K) * window)]


def measure_stages(passing, device):
    """The `Stage` of each place of a walk on a GPU, and of its end.

    Parameters
    ----------
    passing : callable
        Begins a `Walk` of one window.
    device : torch.device
    """
    for _ in range(2):  # what libraries keep for themselves, they have from the first on
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        found = []
        for step in passing():
            torch.cuda.reset_peak_memory_stats(device)
            step()
            waits = torch.cuda.memory_allocated(device) - before
            found.append(Stage(waits, torch.cuda.max_memory_allocated(device) - before))
    return found


def work_of(model, blocks, windows, batch, recipe, device, layers):
    """What pruning will take, in numbers; a window is run through the first block to see."""
    block, own = blocks[0], {inner for _, inner in layers.recipes}
    shown = [(t[:1], None if m is None else m[:1]) for t, m in windows.batches(batch)[:1]]
    entry = capture(model, blocks, shown, device)
    home = home_of(block)
    with at_hand(block, device):
        streams = Streams.begin(entry.hidden, entry.calls, [None], False, memory.Room(1))
        plan = probe(block, *streams.first_window(0))
        modules = linears(block)
        groups = [[(name, oriented(modules[name]).shape) for name in g.names] for g in plan.groups]
        stages = None
        if device.type == "cuda":
            with Passage(streams, 0, block, None, plan, recipe.residual_share != (0, 0)) as passage:
                stages = measure_stages(passage.steps, device)
    width, element = entry.hidden[0].shape[2], entry.hidden[0].element_size()
    head = untied(model) if recipe.rotate else 0
    host = host_bytes(model, windows, parked(block) is not None) + head
    size = weight_bytes(model) + head
    here = host if device.type == "cpu" else size * (home.type == device.type)
    return _work(block, groups, own, stages, windows, batch, recipe, width, element, here, host)


def work_from_shapes(model, blocks, windows, batch, recipe, device, layers, in_files):
    """The same by shapes alone, of a model in the host's memory, or to be; see `host_bytes`."""
    width = model.get_input_embeddings().weight.shape[1]
    groups = groups_by_shape(blocks[0], width)
    element = next(blocks.parameters()).element_size()
    own = {inner for _, inner in layers.recipes}
    host = host_bytes(model, windows, in_files)
    host += untied(model) if recipe.rotate else 0
    here = host if device.type == "cpu" else 0
    return _work(blocks[0], groups, own, None, windows, batch, recipe, width, element, here, host)


def groups_by_shape(block, width):
    """Names and shapes of a block's linears, by what is taken to be their input.

    Those one after the other that take as many columns are a group, which ends with one that gives
    as many outputs as the hidden states have, their width.
    """
    groups, last = [], (0, 0)
    for inner, module in linears(block).items():
        shape = oriented(module).shape
        if last[1] != shape[1] or last[0] == width:
            groups.append([])
        groups[-1].append((inner, shape))
        last = shape
    return groups


def host_bytes(model, windows, in_files):
    """Bytes that the host holds all the time: libraries and weights.

    Parameters
    ----------
    model : torch.nn.Module
        May be on the meta device.
    windows : Windows
    in_files : bool
        Whether the blocks stay in their files, as parked ones do. Of what is around them come
        into memory the pages that are used: of the embedding those of the tokens.
    """
    size = weight_bytes(model)
    if in_files:
        embedding = model.get_input_embeddings().weight
        rows = min(len(embedding), PAGE_ROWS * windows.tokens.numel())
        size = rows * embedding.shape[1] * embedding.element_size()
    memory.trim(torch.device("cpu"))
    return max(memory.resident(), LIBRARIES + size)


def weight_bytes(module):
    """Bytes of a module's parameters, whether they are there or on the meta device."""
    return sum(parameter.nbytes for parameter in module.parameters())


def untied(model):
    """Bytes of a head that is tied to the embedding until a rotation unties it."""
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    return head.weight.nbytes if tied else 0


def _work(block, named, own, stages, windows, batch, recipe, width, element, model, host):
    """A `Work` from the names and shapes of the linears that share inputs, and who is pruned."""
    count, length = windows.tokens.shape
    groups = [(some[0][1][1], sum(rows for _, (rows, _) in some)) for some in named]
    if stages is None:
        stages = stages_of(groups, length, width, element, recipe.residual_share != (0, 0))
    return Work(
        groups, stages, count, length, width, min(batch, count), element,
        block=weight_bytes(block),
        model=model,
        follows=recipe.follows,
        mixed=recipe.target != "pruned",
        method=recipe.config.recipe.method,
        tune=STEP_WINDOWS if recipe.tune else 0,
        host=host,
        processes=current().size if recipe.config.recipe.by_row else 1,
        pruned=[sum(rows for name, (rows, _) in some if name in own) for some in named],
    )  # fmt: skip


def seconds_a_block(work, held, rate):
    """About what a block takes, by the operations that it needs and how many a second there are.

    Parameters
    ----------
    work : Work
    held : int
        Batches whose forwards wait inside a block.
    rate : float
        Floating-point operations a second of a large product.

    Returns
    -------
    float
    """
    tokens, streams = work.windows * work.length, 2 if work.follows else 1
    weights = sum(K * rows for K, rows in work.groups)
    again = 2 - held / work.batches
    operations = 2 * weights * tokens * streams * again
    cubes, products = methods()[work.method].operations or UNSAID
    for K, rows, _ in work.pruned_groups:
        operations += tokens * K * K * (3 if work.mixed else 1)
        operations += cubes * K**3 + products * rows * K**2
    operations += work.tune and 12 * weights * tokens
    return operations / (REACHED * rate)


def hold(work, device, limit, states):
    """How many batches may wait inside a block, by the memory that is free, or may be used."""
    free = memory.free(device)
    if device.type == "cpu":
        free += memory.resident()
    budget = HOLDING[device.type] * free
    if limit is not None and device.type == "cpu":
        budget = min(budget, limit)
    return batches_to_hold(work, device, budget, states)
