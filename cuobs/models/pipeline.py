"""A model of a folder pruned into another one, once all that can be known before is checked."""

import copy
import math
import os
import time
from dataclasses import dataclass
from functools import partial

import torch

from cuobs import arrays
from cuobs.config import to_toml
from cuobs.models import dry_run, memory
from cuobs.models.blocks import plain_torch
from cuobs.models.checkpoints import loading
from cuobs.models.checkpoints.card import CARD, model_card
from cuobs.models.checkpoints.checkpoint import check, finished, set_aside, write_masks
from cuobs.models.checkpoints.destination import changed_tensors, finish
from cuobs.models.checkpoints.marker import abandon, take_back
from cuobs.models.checkpoints.names import check_all_known, ignored, match
from cuobs.models.checkpoints.shards import reserve
from cuobs.models.checkpoints.source import (
    FLOATS,
    HOLDERS,
    MASKS,
    RECIPE,
    REPORT,
    SHARDS,
    some,
)
from cuobs.models.distilling.distillation import split_windows
from cuobs.models.evaluate import agreement, perplexity
from cuobs.models.laid import Laid, filled, lay_out_run
from cuobs.models.packed.packing import pack_changed, packed_config, packed_forms
from cuobs.models.parked import park
from cuobs.models.planning import View, whole_for, whole_text
from cuobs.models.pruning.prune import (
    batch_of,
    check_arguments,
    choose,
    choose_device,
    prune_model,
)
from cuobs.models.pruning.warming import Warming
from cuobs.models.ranks import joined
from cuobs.models.recovery import agreements, check_room, recover
from cuobs.models.rotating.folding import untied_config
from cuobs.models.rotating.rotation_prediction import FEWEST, check_rotation, rotation_work
from cuobs.models.structure import find_blocks, is_transposed, linears
from cuobs.models.summary import outcome, summary
from cuobs.models.tokens.calibration import load_tokens
from cuobs.models.tokens.mixture import Unwritten, WindowReader, gather, read_given
from cuobs.models.tokens.windows import check_windows

# Windows that the model wrote for a run, while it goes on.
WRITTEN = ".cuobs_written.npz"


@plain_torch()
def prune(run, view, options):
    """Prune the model of a folder into another one.

    Parameters
    ----------
    run : cuobs.models.planning.Run
    view : cuobs.models.planning.View
    options : dict
        Of `prune_model`.

    Returns
    -------
    ModelReport
        None in all processes but the first.
    """
    with joined(run.device) as ranks:
        if not ranks.leads:
            nothing = lambda *_: None  # noqa: E731
            view = View(nothing, None, nothing, nothing)
        existed, began = os.path.isdir(run.dst), time.perf_counter()
        try:
            return _prune(run, view, options, ranks, began)
        except (ValueError, TypeError, OSError) as error:
            others = isinstance(error, FileExistsError)  # a run that began there meanwhile
            if ranks.leads and not run.resume and not others:
                abandon(run.dst, existed)
            raise


@dataclass
class _Job:
    """What the steps of a run share.

    Attributes
    ----------
    run : cuobs.models.planning.Run
    view : cuobs.models.planning.View
    ranks : Ranks
    recipe : ModelRecipe
    place : torch.device
    model : transformers.PreTrainedModel
    names : dict of str to str
        See `names_in_files`.
    mixture : Mixture
        The windows to learn from, and which of their tokens are padding.
    mask : ndarray or None
    texts : dict of str to ndarray
        The windows of each text that is measured.
    laid : Laid
        The files of weights that are written block by block, see `_lay_out`.
    warming : Warming
        What compiles meanwhile.
    peak : int
        Bytes at the peak before the first block.
    """

    run: object
    view: object
    ranks: object
    recipe: object
    place: torch.device
    model: torch.nn.Module
    names: dict
    mixture: object
    mask: object
    texts: dict
    laid: Laid
    warming: object
    peak: int = 0

    def measure(self, stage, told=True):
        """The perplexity on each text, which is said at once or with all else at the end."""
        found = {}
        for name, part in self.texts.items():
            label = f"perplexity, {name}, {stage}"
            found[name] = _perplexity(
                self.model, part, self.place, self.progress(label), self.ranks
            )
            if told:
                self.view.say(f"{label}: {found[name]:.2f}")
        return found

    def progress(self, label):
        """Who is told how far a step is, or None."""
        return self.view.progress and partial(self.view.progress, label)


def _open(run, view, options, ranks):
    """Read the model and all texts, and say what they are; a `_Job`."""
    recipe, place = check_arguments(device=run.device, **options)
    source = run.source
    if run.resume and ranks.leads:
        take_back(run.dst)
    # A GGUF takes seconds to be read for its config alone.
    if source.gguf is None or run.host_memory is not None:
        empty = loading.empty_as_stored(source, run.trust_remote_code)
        _, layers = choose(empty, recipe, place, run.host_memory, empty=True)
        if recipe.rotate:
            work = rotation_work(empty, FEWEST, layers.patterns, recipe.rotation, place)
            check_rotation(work, place, run.host_memory)
        if run.packed:
            packed_forms(empty, recipe)
    warming = None if source.gguf else _warm(source, recipe, place)
    skipped = lambda name: recipe.of(name) is None  # noqa: E731
    if whole_for(run, recipe) is None:
        model, names = open_parked(source, run.trust_remote_code, skipped=skipped)
    else:
        model = loading.load_model(source, run.trust_remote_code)
        names = names_in_files(source, model, skipped)
    forms = packed_forms(model, recipe) if run.packed else {}
    warming = warming or _warm(source, recipe, place)  # now that the GGUF is known to be whole
    if recipe.rotate:
        check_all_known(model, source, names)
    for line in what_is_written(source, model, names, run.save_dtype):
        view.say(line)
    # Texts are read, and windows of the model's own written, by one for all.
    found = None
    if ranks.leads:
        found = _read_all(run, model, recipe.distill, place, view, alone=warming.finish)
    mixture, mask, texts = ranks.agree(found)
    for line in _protocol_lines(run, mixture, texts) if ranks.leads else ():
        view.say(line)
    laid = _lay_out(run, recipe, names, forms)
    return _Job(
        run, view, ranks, recipe, place, model, names, mixture, mask, texts, laid, warming
    )


def _prune(run, view, options, ranks, began):
    job, before = _open(run, view, options, ranks), {}
    dtypes = stored_dtypes(run.source, job.names)
    compared = job.recipe.distill or (job.texts and ranks.leads)
    # A GGUF takes far longer to read again than to copy.
    copied = compared and run.source.gguf is not None
    dense = copy.deepcopy(job.model) if copied else None
    try:
        report = prune_model(
            job.model, job.mixture.pruning, attention_mask=job.mask, checkpoint_folder=run.dst,
            resume=run.resume, protocol=_protocol(run, job.mixture, job.texts),
            keep_masks=job.recipe.distill > 0, dtypes=dtypes, places=job.laid.places,
            warming=job.warming,
            device=run.device, host_memory=run.host_memory,
            starting=partial(_starting, job, before), rotating=job.progress("rotation"),
            on_block=partial(_on_block, job), **{**options, "distill": 0},
        )  # fmt: skip
        if compared and not copied:
            if whole_for(run, job.recipe) is None:
                dense, _ = open_parked(run.source, run.trust_remote_code, job.names)
            else:
                dense = loading.load_model(run.source, run.trust_remote_code)
        if job.recipe.distill:
            _distill(job, dense, report)
        save_dtype = written_dtype(run.source, run.save_dtype)
        if save_dtype is not None:
            loading.cast_stored(job.model, save_dtype)  # what is measured is what is written
        else:
            loading.round_stored(job.model, dtypes)
        if report.rotation is not None and report.rotation.untied:
            report.rotation.untied = job.model.get_output_embeddings().weight.nbytes
        after = job.measure("distilled" if job.recipe.distill else "pruned", told=False)
        if not ranks.leads:
            return None
        report.agreement = agreements(job.model, dense, job.texts, job.place, view.progress)
    except torch.cuda.OutOfMemoryError:
        raise MemoryError(
            "memory: found the device full, expected fewer samples, shorter windows or fewer "
            "batch_tokens"
        ) from None
    report.perplexity = {name: (before[name], after[name]) for name in job.texts}
    steps = [s for s in (report, report.rotation, report.distillation) if s is not None]
    report.whole_peak = max(job.peak, memory.peak(job.place), *(s.memory_peak for s in steps))
    report.whole_seconds = time.perf_counter() - began
    _write(job, report, save_dtype)
    for line in ("", *summary(report), "", *outcome(report)):
        view.say(line)
    return report


def open_parked(source, trust_remote_code=False, names=None, skipped=lambda name: False):
    """A model whose blocks stay in their files, see `names_in_files`; and the names.

    It is of the dtype that holds all weights, but no more of them than one block's are made so.
    """
    stored = source.stored
    main, dtype = loading.main_dtype(stored), loading.weights_dtype(stored)
    model = loading.load_model(source, trust_remote_code, main)
    names = names or names_in_files(source, model, skipped)
    own = model.state_dict(keep_vars=True)
    if main != dtype and {id(own[name]) for name in names} != {id(t) for t in own.values()}:
        # What is put together from several tensors is not to be rounded on the way.
        model = loading.load_model(source, trust_remote_code)
    by_own = {own: stored[name] for own, name in names.items()}
    park(model, *find_blocks(model), source, by_own, None if main == dtype else dtype)
    return model, names


def _lay_out(run, recipe, names, forms):
    """The files of weights that are written as blocks finish; none where that can't be.

    Weights that are not final before the last block are kept beside the finished blocks until the
    end. So are those of a run that goes on with files of other sizes than it began with.
    """
    if whole_for(run, recipe):
        return Laid()
    stored = run.source.stored
    return lay_out_run(run.dst, stored, names, forms, run.save_dtype, run.shard_bytes)


def _starting(job, before, report):
    """Show what will be done, and measure the dense model into ``before``."""
    if job.laid.files and job.ranks.leads:
        reserve(os.path.join(job.run.dst, SHARDS), job.laid.files)
    report.left = [_file_name(name, job.names) for name in report.left]
    job.view.starting(report)
    before.update(job.measure("dense"))
    job.peak = memory.peak(job.place)
    if bad := [name for name, value in before.items() if math.isnan(value)]:
        raise ValueError(
            f"model: found that its perplexity on {bad[0]} is no number, expected finite weights; "
            "where activations overflow float16, a copy of the model in bfloat16 may hold them: "
            "model.bfloat16().save_pretrained(FOLDER)"
        )


def _on_block(job, report, blocks):
    """Call the layers of a finished block as their tensors in the files, and show it."""
    for row in report.blocks[-1].layers:
        row.transposed = is_transposed(job.model.get_submodule(row.name))
        if row.loss is not None:
            row.pattern = job.recipe.of(row.name).pattern.label
        row.name = _file_name(row.name, job.names)
    job.view.on_block(report, blocks)


def _distill(job, dense, report):
    """Let all kept weights learn together what the dense model says."""
    run, recipe = job.run, job.recipe
    report.perplexity_pruned = job.measure("pruned")
    report.settings |= {"distill": recipe.distill, "distill_rate": recipe.distill_rate}
    report.distillation = recover(
        job.model, dense, report.masks, job.mixture.distilling, job.mask, job.mixture.times,
        passes=recipe.distill, rate=recipe.distill_rate, seed=run.seed, device=job.place,
        folder=run.dst, say=job.view.say, progress=job.progress("distillation"),
    )  # fmt: skip


@plain_torch()
def plan(run, view, options):
    """Say what `prune` would do and take, without reading weights; a report without blocks."""
    recipe, place = check_arguments(device=run.device, **options)
    model = loading.empty_as_stored(run.source, run.trust_remote_code)
    if run.packed:
        packed_forms(model, recipe)
    mixture, mask, texts = _read_all(run, model, recipe.distill, place, view, Unwritten)
    for line in _protocol_lines(run, mixture, texts):
        view.say(line)
    windows = check_windows(model, mixture.pruning, mask, recipe.drop_first_token)
    if run.resume:
        check(run.dst, {"tokens": windows.digest()})
    batch = batch_of(options.get("batch_tokens"), windows, place)
    protocol = _protocol(run, mixture, texts)
    in_files = whole_for(run, recipe) is None
    report = dry_run.plan(
        model, windows, recipe, place, batch, protocol, view.say, in_files, run.host_memory
    )
    if not in_files:
        least, why = whole_text(run, recipe)
        view.say(f"host         {arrays.size_text(least)} at least: {why}")
    if recipe.distill:
        size = check_room(model, recipe, place, run.host_memory)
        view.say(
            f"distilling   {arrays.size_text(size)} on {place.type} at least: the model and the "
            "dense one in float32, gradients and moments"
        )
    view.starting(report)
    return report


@plain_torch()
def evaluate(source, other, text, length, device, progress, trust_remote_code):
    """The perplexity of the model of a folder on a text, its tokens, and its agreement with
    another model's folder, if there is one."""
    place = choose_device(device)
    model = loading.load_model(source, trust_remote_code)
    reader = WindowReader(source, model, trust_remote_code=trust_remote_code)
    tokens = reader.read(text, None, length)
    found = perplexity(model, tokens, place, progress and partial(progress, "perplexity"))
    if other is None:
        return found, tokens, None
    dense = loading.load_model(other, trust_remote_code)
    step = progress and partial(progress, "agreement")
    return found, tokens, agreement(model, dense, tokens, place, step)


def _warm(source, recipe, device):
    """Begin to compile what pruning will need, while something else is done; a `Warming`."""
    if source.gguf is None:
        stored = source.stored
        dtype = loading.weights_dtype(stored)
        shapes = {name: tensor.shape for name, tensor in stored.items() if "embed" not in name}
    else:
        dtype = torch.float32
        tensors = loading.gguf_tensors(source)
        shapes = {name: shape[::-1] for name, _, shape in tensors if name.startswith("blk.")}
    shapes = [tuple(shape) for shape in shapes.values() if len(shape) == 2]
    return Warming(recipe.config.recipe, recipe.config.settings, shapes, dtype, device)


@plain_torch()
def write(source, windows, length, temperature, seed, device, progress, trust_remote_code):
    """Windows that the model of a folder samples itself."""
    model = loading.load_model(source, trust_remote_code)
    reader = WindowReader(
        source, model, seed, choose_device(device), trust_remote_code=trust_remote_code,
        progress=progress,
    )  # fmt: skip
    return reader.write(windows, length, temperature)


def _read_all(run, model, distill, place, view, kind=WindowReader, alone=None):
    """The windows to learn from, their mask or None, and the windows of each text by its name."""
    reader = kind(
        run.source, model, run.seed, place, trust_remote_code=run.trust_remote_code,
        stored=os.path.join(run.dst, WRITTEN),
        progress=view.progress and partial(view.progress, "windows of the model's own"),
        alone=alone,
    )  # fmt: skip
    sources = run.calibration, run.distill_calibration, reader
    given, length = read_given(*sources, samples=run.samples, length=run.sequence_length)
    # Before the model writes for minutes.
    texts = {
        name: reader.read(spec, None, length)
        for name, spec in zip(_short_names(run.evaluate), run.evaluate, strict=True)
    }
    mixture = gather(given, *sources, samples=run.samples, length=length, distill=distill)
    if distill:
        split_windows(len(mixture.distilling))
    mask = run.attention_mask and load_tokens(run.attention_mask, run.samples, length, kinds="biu")
    return mixture, mask, texts


def _protocol(run, mixture, texts):
    """Where the numbers of a report come from."""
    return {
        "source": run.source.name,
        "calibration": mixture.sources(),
        "windows": len(mixture.pruning),
        "length": mixture.pruning.shape[1],
        "seed": run.seed if mixture.drawn else None,
        "evaluated": {name: list(part.shape) for name, part in texts.items()},
        "command": run.command,
    }


def _protocol_lines(run, mixture, texts):
    for line in mixture.lines(run.seed):
        yield f"calibration  {line}"
    for name, part in texts.items():
        yield f"evaluation   {name}: {len(part)} windows of {part.shape[1]} tokens, no overlap"


def _perplexity(model, windows, place, progress, ranks):
    """The perplexity on windows that processes share."""
    if ranks.size == 1:
        return perplexity(model, windows, place, progress)
    own = windows[ranks.share]
    found = math.log(perplexity(model, own, place, progress)) if len(own) else 0.0
    mean = ranks.total(len(own) * found) / len(windows)
    return math.inf if mean > 700 else math.exp(mean)


def written_dtype(source, save_dtype):
    """The dtype that the weights are written in; None where each keeps its own."""
    if save_dtype is not None:
        return getattr(torch, save_dtype)
    return None if source.gguf is None else loading.gguf_dtype(source)[0]


def stored_dtypes(source, names):
    """The dtypes of a model's floating-point tensors in its files, by its own names."""
    if source.gguf is not None:
        return {}
    return {
        own: loading.DTYPES[source.stored[name].dtype]
        for own, name in names.items() if source.stored[name].dtype in FLOATS
    }  # fmt: skip


def _short_names(specs):
    """The names of files without their folders, unless two are then alike."""
    names = [os.path.basename(spec) for spec in specs]
    return names if len(set(names)) == len(names) else [os.fspath(spec) for spec in specs]


def names_in_files(source, model, skipped=lambda name: False):
    """The names that a model's tensors have in its files, by those that they have in memory.

    Parameters
    ----------
    source : Source
    model : transformers.PreTrainedModel
        As it was loaded.
    skipped : callable
        Whether a linear of a name stays as it is.

    Raises
    ------
    ValueError
        A linear that would be pruned lies in the files in another form.
    """
    if source.gguf is not None:
        return {name: name for name in model.state_dict()}
    names = match(model, source, source.stored)
    prefix, blocks = find_blocks(model)
    for inner in linears(blocks):
        name = f"{prefix}.{inner}"
        if f"{name}.weight" not in names and not skipped(name):
            raise ValueError(
                f"{source.name}: found that {name} is put together from tensors of other shapes or "
                "values when it is loaded, expected one that lies in the files as it is pruned; "
                "--skip leaves it as it is"
            )
    return names


def what_is_written(source, model, names, save_dtype):
    """Lines of text: the dtype of what is written, and what is carried over untouched."""
    if source.gguf is not None:
        dtype, kinds = loading.gguf_dtype(source)
        dtype = str(save_dtype or dtype).removeprefix("torch.")
        yield f"weights      {', '.join(kinds)} in {source.gguf}, written in {dtype}"
        return
    stored = source.stored
    if kept := ignored(stored, names, model):
        size = sum(stored[name].nbytes for name in kept) / 2**20
        yield (
            f"carried over {len(kept)} tensors that {type(model).__name__} does not hold "
            f"({size:.1f} MiB): {some(kept)}"
        )
    holders = [name for name in source.carried if name.endswith(HOLDERS)]
    if files := [name for name in holders if name != MASKS]:
        yield f"carried over {some(files)}, as they are"
    if MASKS in holders:
        yield f"left out     {MASKS}: the masks of an earlier run"
    yield from source.lines()


def _file_name(linear, names):
    """The name of a linear by that of its weight in the files."""
    return names.get(f"{linear}.weight", f"{linear}.weight").removesuffix(".weight")


def _write(job, report, save_dtype):
    run, model, names, recipe = job.run, job.model, job.names, job.recipe
    source, config, extra = run.source, None, {}
    weights, masks = _finished(job)
    blocks = len(find_blocks(model)[1])
    ready = filled(job.laid, run.dst, blocks, names) if job.laid.files else None
    if source.gguf is None:
        parked = whole_for(run, recipe) is None
        changed = weights if parked else changed_tensors(model, source, names)
        changed |= ready or {}
        report.carried = ignored(source.stored, names, model)
        report.left_out = source.left_out
        config = untied_config(source.config) if report.rotation else None
    else:
        changed, config, extra = loading.as_checkpoint(model)
    if run.packed:
        patterns = job.laid.patterns if ready is not None else pack_changed(
            model, changed, names, partial(_pattern_of, recipe),
            lambda index, tensors: set_aside(run.dst, f"packed-{index:05}", tensors),
        ).modules  # fmt: skip
        packed = packed_config(patterns)
        config = {**(config or source.config), "quantization_config": packed}
    extra[REPORT] = report.to_json()
    extra[RECIPE] = to_toml(recipe.as_config())
    extra[CARD] = _card(source, model, report, run.packed)
    if run.save_masks:
        columns = {n: job.model.get_submodule(n).weight.shape[1] for n in masks}
        extra[MASKS] = partial(
            write_masks, source=source, masks={_file_name(n, names): m for n, m in masks.items()},
            columns={_file_name(n, names): count for n, count in columns.items()},
        )  # fmt: skip
    finish(
        source, run.dst, changed, config=config, extra=extra, without=(REPORT, MASKS),
        save_dtype=save_dtype, shard_size=run.shard_bytes,
        reserved=None if ready is None else os.path.join(run.dst, SHARDS),
    )  # fmt: skip


def _finished(job):
    """Where the weights of finished blocks lie, by their names in SRC, and masks by linear."""
    weights, masks = {}, {}
    for index in range(len(find_blocks(job.model)[1])):
        for name, tensor in finished(job.run.dst, index).items():
            if name.endswith(".mask"):
                masks[name.removesuffix(".mask")] = tensor
            else:
                weights[job.names[name]] = tensor
    return weights, masks


def _pattern_of(recipe, name):
    own = recipe.of(name)
    return own and own.pattern


def _card(source, model, report, packed):
    """The source's card with what was done to the model below it."""
    original = b""
    if CARD in source.carried:
        with open(source.path(CARD), "rb") as file:
            original = file.read()
    name = type(model).__name__
    found = "AutoModelForCausalLM" if name.endswith("ForCausalLM") else name
    hub = source.name if source.gguf is None and not os.path.isdir(source.name) else None
    card = model_card(report, original.decode(errors="surrogateescape"), found, hub, packed)
    return card.encode(errors="surrogateescape")
