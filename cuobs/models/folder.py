"""From a checkpoint's folder to that of a pruned model.

What can be known before is checked here; PyTorch is imported afterwards.
"""

from cuobs import validation
from cuobs.arrays import DEVICES
from cuobs.models.calibration import check_cut
from cuobs.models.planning import Run, View, check_folders, check_model, check_text
from cuobs.models.recipe import read_arguments
from cuobs.models.source import find_source, unfinished

DEFAULT_SAMPLES = 128


def prune_folder(
    src,
    dst,
    calibration,
    *,
    samples=DEFAULT_SAMPLES,
    sequence_length=None,
    seed=0,
    attention_mask=None,
    evaluate=(),
    resume=False,
    save_masks=False,
    packed=False,
    shard_size="5GB",
    save_dtype=None,
    trust_remote_code=False,
    device="auto",
    say=None,
    progress=None,
    starting=None,
    drop_first_token=True,
    on_block=None,
    **options,
):
    """Prune the model of a folder (or a GGUF) into another folder.

    Parameters
    ----------
    src : path
        A checkpoint of transformers, the name of one in the Hub's cache, or a GGUF that
        transformers opens. Never written.
    dst : path
        A new or empty folder, or with ``resume`` that of an unfinished run. It holds the tensors
        of SRC, by the same names, as plain dense safetensors with exact zeros where they are
        pruned, all its further files, and ``cuobs_report.json``.
    calibration : str
        A text file, or ``tokens.npz:key``.
    samples : int
        Windows: drawn from a text by the seed, taken from the front of tokens.
    sequence_length : int, optional
        Tokens of a window; of a text 2048, or what the model allows; of tokens their own.
    seed : int
        Of the draw.
    attention_mask : str, optional
        An array like the calibration tokens, 0 where one is padding.
    evaluate : sequence of str
        Texts or tokens whose perplexity is measured before and after, in windows as long as those
        of the calibration.
    resume : bool
        Go on with an unfinished run, with the same arguments.
    save_masks : bool
        Write ``cuobs_masks.safetensors`` too.
    packed : bool
        Write the pruned linears packed, see `pack_folder`.
    shard_size : int or str
        The largest file of weights: bytes, or a size like "5GB".
    save_dtype : {"float16", "bfloat16", "float32"}, optional
        What the weights are written in. By default each in the dtype that it has; of a GGUF in
        half precision unless its matrices are held in float32.
    trust_remote_code : bool
        Run the code that SRC holds, where its model needs it.
    device : {"auto", "cpu", "cuda"}
    say : callable, optional
        Called with lines of text: the protocol, what will be done, and what was found.
    progress : callable, optional
        Called with (label, done, total) while a text is evaluated.
    starting : callable, optional
        See `prune_model`; called before the dense model is evaluated.
    drop_first_token, on_block, **options
        Of `prune_model`.

    Returns
    -------
    ModelReport
    """
    settings = {"device": device, "drop_first_token": drop_first_token, **options}
    read_arguments({key: value for key, value in settings.items() if key != "batch_tokens"})
    source, shard_bytes, save_dtype = check_folders(
        src, dst, calibration, samples, sequence_length, seed, attention_mask, evaluate, resume,
        shard_size, save_dtype,
    )  # fmt: skip
    run = Run(
        source, dst, calibration, tuple(evaluate), samples, sequence_length, seed, attention_mask,
        resume, save_masks, packed, shard_bytes, save_dtype, trust_remote_code, device,
    )  # fmt: skip
    nothing = lambda *_: None  # noqa: E731
    view = View(say or nothing, progress, starting or nothing, on_block or nothing)
    if resume and not unfinished(dst):
        view.say(f"resume       found no unfinished run in {dst}: a new one begins")
    from cuobs.models import pipeline

    return pipeline.prune(run, view, {"drop_first_token": drop_first_token, **options})


def evaluate_folder(
    folder, text, sequence_length=None, *, device="auto", progress=None, trust_remote_code=False
):
    """The perplexity of the model of a folder (or a GGUF) on a text or on tokens.

    Returns
    -------
    perplexity : float
    tokens : ndarray of int64, shape (windows, length)
    """
    validation.name_of("device", device, DEVICES)
    check_cut(None, sequence_length)
    source = find_source(folder, packed=None)
    check_model(source)
    check_text(source, text, None, sequence_length)
    from cuobs.models import pipeline

    return pipeline.evaluate(source, text, sequence_length, device, progress, trust_remote_code)
