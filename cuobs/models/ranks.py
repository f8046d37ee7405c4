"""Several processes that prune one model, each with its share of the windows and of the rows."""

import contextlib
import contextvars
import datetime
import os
import signal
import sys
import threading

import torch
from torch import distributed

from cuobs.arrays import tensor_view
from cuobs.sharing import shares_of

# The exit code of a process that leaves it to another to say what went wrong.
SILENT = 2
# A process may wait for another that evaluates or writes; torchrun ends all where one dies.
PATIENCE = datetime.timedelta(days=7)
# Seconds that a process may take to end once it was told to, and until a thread has heard of it.
GRACE, HEARD = 5.0, 0.5
_joined = contextvars.ContextVar("joined", default=None)


class Ranks:
    """The processes of a run; one that is alone has nobody to talk to.

    Attributes
    ----------
    rank : int
        The number of this process, from 0.
    size : int
        How many there are.
    """

    def __init__(self, rank=0, size=1):
        self.rank, self.size = rank, size

    @property
    def leads(self):
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def share(self):
        """This process's things out of many: every so-many-th, so that some in a row are shared."""
        return slice(self.rank, None, self.size)

    def before(self, number):
        """How many things this process has before one of a number."""
        return len(range(number)[self.share])

    def add_up(self, *sums):
        """Make tensors that hold sums over this process's windows those over all, in place."""
        self.begin_add_up(*sums)()

    def begin_add_up(self, *sums):
        """A function after which `add_up` is done; until it is called, a GPU may work on."""
        sums = sums if self.size > 1 else ()
        begun = [distributed.all_reduce(tensor, async_op=True) for tensor in sums]

        def finish():
            while begun:
                begun.pop(0).wait()

        return finish

    def add_up_gradients(self, weights):
        """Make gradients of sums over this process's windows those over all, in place."""
        for weight in weights if self.size > 1 else ():
            if weight.grad is None:  # the others may have one
                weight.grad = torch.zeros_like(weight)
            distributed.all_reduce(weight.grad)

    def add_up_slices(self, tensor):
        """This process's slice of the sum of everyone's flat tensor, as long as all others'."""
        if self.size == 1:
            return tensor
        own = tensor.new_empty(len(tensor) // self.size)
        _named("reduce_scatter_single", "reduce_scatter_tensor")(own, tensor)
        return own

    def total(self, numbers):
        """The sum of a number over all processes, or those of each number in lists."""
        if self.size == 1:
            return numbers
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
        distributed.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, own, counts):
        """A tensor of which each process has its own rows, so many of them."""
        return self.begin_gather(own, counts)()

    def begin_gather(self, own, counts):
        """A function that gives what `gather` does; until it is called, a GPU may work on."""
        whole = own.new_empty((sum(counts), *own.shape[1:]))
        own, parts = _plain(own.contiguous()), _plain(whole).split(counts)
        if len(set(counts)) == 1:
            gathered = _named("all_gather_single", "all_gather_into_tensor")
            begun = [gathered(_plain(whole), own, async_op=True)]
        else:
            parts[self.rank].copy_(own)
            begun = [
                distributed.broadcast(part, rank, async_op=True)
                for rank, part in enumerate(parts) if counts[rank]
            ]  # fmt: skip

        def finish(own=own):  # which is held until then
            for one in begun:
                one.wait()
            return whole

        return finish

    def by_rows(self, function, rows):
        """An array of so many rows, some of them made by each process and sent to all."""
        shares = shares_of(rows, self.size)
        own = torch.from_dlpack(function(shares[self.rank]))
        return tensor_view(self.gather(own, [share.stop - share.start for share in shares]))

    def least(self, number):
        """The smallest of a number over all processes."""
        if self.size == 1:
            return number
        found = [None] * self.size
        distributed.all_gather_object(found, number)
        return min(found)

    def agree(self, value):
        """What the first process has, for all."""
        if self.size == 1:
            return value
        found = [value]
        distributed.broadcast_object_list(found)
        return found[0]


def _named(new, old):
    """What newer releases of PyTorch call by another name."""
    return getattr(distributed, new, None) or getattr(distributed, old)


def _plain(tensor):
    """A tensor as NCCL takes it, which knows no bool."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def current():
    """The processes that this one has `joined`, or this one alone."""
    return _joined.get() or Ranks()


@contextlib.contextmanager
def apart():
    """Leave the other processes alone meanwhile."""
    token = _joined.set(None)
    try:
        yield Ranks()
    finally:
        _joined.reset(token)


@contextlib.contextmanager
def joined(device="auto"):
    """Share what is pruned meanwhile with the processes that torchrun has started, if it has.

    Where PyTorch's default group is there already, it is taken as it is. Each of its processes has
    to come here, with the same arguments.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        On GPUs each process of a host takes its own, and sums of tensors go by NCCL; those of
        numbers go by gloo, beside what a GPU is doing, and so does all where there are no GPUs.

    Yields
    ------
    Ranks
    """
    store, mine = None, distributed.is_available() and distributed.is_initialized()
    if not mine and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store = _begin(device)
    ranks = Ranks()
    if store is not None or mine:
        ranks = Ranks(distributed.get_rank(), distributed.get_world_size())
    token, told = _joined.set(ranks), threading.Event()
    try:
        with _told_to_end(told, store, ranks):
            yield ranks
    except KeyboardInterrupt:
        if store is None or not told.wait(HEARD):
            raise
        if not _first(store):
            raise SystemExit(SILENT) from None
        raise ConnectionError(_all_end(ranks)) from None
    except Exception as error:
        # The first that fails says why; those that fail after it, for it or for the same, do not.
        if store is not None and not _first(store):
            raise SystemExit(SILENT) from None
        if ranks.size > 1 and _left_alone(error):
            raise ConnectionError(_all_end(ranks)) from error
        raise
    finally:
        _joined.reset(token)
    if store is not None:
        distributed.destroy_process_group()


def _first(store):
    """Whether no other process has failed before."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # it was in one that has ended
        return False


def _left_alone(error):
    """Whether an error is that of a process which waits for one that is gone."""
    if isinstance(error, distributed.DistError):
        return True
    return type(error) is RuntimeError and "gloo" in str(error)


def _all_end(ranks):
    return (
        f"torchrun: found that its {ranks.size} processes end, as they do where one has, expected "
        "all to go on; an unfinished run can be resumed, with any number of them"
    )


@contextlib.contextmanager
def _told_to_end(told, store, ranks):
    """Note a SIGTERM, by which torchrun ends the others, and end this process where that is stuck.

    NCCL waits without end for one that is gone, and in such a wait Python does not come to handle a
    signal. The thread here is told of it by the C library.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if store is None or not in_main or not callable(signal.getsignal(signal.SIGTERM)):
        yield  # a process that does not handle it has ended already
        return
    (heard, tell), over = os.pipe(), threading.Event()
    os.set_blocking(tell, False)
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(heard, told, over, store, ranks), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(tell)


def _listen(heard, told, over, store, ranks):
    with open(heard, "rb", buffering=0) as signals:
        while (number := signals.read(1)) and number[0] != signal.SIGTERM:
            pass
    if not number:
        return
    told.set()
    if over.wait(GRACE):
        return
    if _first(store):
        print(f"Error: {_all_end(ranks)}", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM)


def _begin(device):
    """Make the default group; the store by which its processes found each other."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(distributed.rendezvous("env://", timeout=PATIENCE))
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store, rank=rank, world_size=size, timeout=PATIENCE,
    )  # fmt: skip
    return store
