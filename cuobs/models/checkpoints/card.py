"""The card of a pruned model: what was done to it, below what its source's card says.

``huggingface_hub.ModelCard`` reads what is written here, but does not write it: of the metadata
of a source it drops entries that are null, those fields of a ``model-index`` that it has no class
for, and all of one that it can't parse; a head that is no mapping it refuses. Here they stay.
"""

import os
import re

import cuobs
from cuobs.arrays import size_text
from cuobs.models.summary import target_text
from cuobs.pattern import parse

CARD = "README.md"
# Where this part of a card begins: a model that is pruned again has one such part.
MARK = "<!-- cuobs -->"
TAGS = ("cuobs", "pruned")
PERPLEXITY = "Windows do not overlap; all tokens but the first of each are predicted."
LIKE_THE_BASE = """\
, by the names and dtypes of the base model: what
opens that opens this"""
DENSE = """\
The weights are stored dense, with exact zeros{like}. It takes less memory and time only
where a program packs the weights.
`cuobs verify PATH` checks the pattern; `cuobs_report.json` says what was done to each layer."""

PACKED = """\
The pruned weights hold only what was kept, and run as they are.
`cuobs unpack-model PATH OTHER` gives them back dense, with exact zeros;
`cuobs_report.json` says what was done to each layer."""


def model_card(
    report, original="", model_class="AutoModelForCausalLM", base_model=None, packed=False
):
    """A card for a pruned model.

    Parameters
    ----------
    report : ModelReport
    original : str
        The card of the source; kept whole, but for what an earlier run of cuobs added.
    model_class : str
        The class of transformers that opens the model.
    base_model : str, optional
        The name of the source on the Hub.
    packed : bool
        Whether the pruned weights hold only what was kept.

    Returns
    -------
    str
        Markdown, with metadata at its head.
    """
    head, body = _split(original)
    body = body.partition(MARK)[0].rstrip()
    part = "\n".join(_part(report, model_class, packed))
    return _head(head, report, base_model) + (body and body + "\n\n") + part + "\n"


def stored_otherwise(report, card, packed):
    """The card of a pruned model that is packed or unpacked; as it is where cuobs did not write it.

    Parameters
    ----------
    report : ModelReport
    card : str
    packed : bool
        How the weights are stored now.
    """
    _, mark, part = card.partition(MARK)
    if not mark:
        return card
    opened = re.search(r"^model = (\w+)\.from_pretrained\(", part, re.MULTILINE)
    return model_card(report, card, *(opened.groups() if opened else ()), packed=packed)


def _part(report, model_class, packed):
    settings, protocol = report.settings, report.protocol
    pattern = parse(settings["pattern_view"])
    losses = [row.loss for row in report.layers if row.loss is not None]
    rows = {
        "base model": os.path.basename(str(protocol.get("source", "")).rstrip("/")),
        "pattern": f"{settings['pattern']}: {pattern.keeps}",
        "method": f"{settings['method']}, damping {settings['damp']:g}",
        "target": target_text(settings),
        "tuning": f"{settings['tune']} passes" if settings.get("tune") else "none",
        "calibration": _calibration(protocol),
        "pruned": f"{len(losses)} of {len(report.layers)} linear layers in the blocks, "
        f"{report.sparsity:.2%} of their weights are zero",
        "output error of a layer": f"{sum(losses) / len(losses):.2%} mean, {max(losses):.2%} "
        "largest",
    }
    if report.rotation is not None:
        added = report.rotation.untied
        own = f"; a head of its own adds {size_text(added)}" if added else ""
        rows["rotated"] = f"before it was pruned{own}"
    if report.distillation is not None:
        rows["distilled"] = report.distillation.text()
    yield from (MARK, "", "## Pruned by cuobs", "")
    yield from _table(("", ""), rows.items())
    yield ""
    if report.perplexity:
        yield from ("### Perplexity", "")
        yield from _perplexities(report)
        yield from ("", PERPLEXITY, "")
    yield from ("### How to run it", "", "```python", *_imports(model_class, packed), "")
    yield from (f'model = {model_class}.from_pretrained("PATH", dtype="auto")', "```", "")
    like = "" if str(protocol.get("source")).endswith(".gguf") else LIKE_THE_BASE
    yield PACKED if packed else DENSE.format(like=like)
    yield f"(cuobs {cuobs.__version__})"


def _calibration(protocol):
    """What the model was pruned by, and what else it was distilled by."""
    sources, windows, length = (
        protocol.get(key, "tokens") for key in ("calibration", "windows", "length")
    )
    if isinstance(sources, str):
        return f"{os.path.basename(sources)}: {windows} windows of {length} tokens"
    each = ", ".join(f"{count} of {os.path.basename(name)}" for name, count in sources.items())
    alone = "" if sum(sources.values()) == windows else f", pruned by {windows} of them"
    return f"windows of {length} tokens: {each}{alone}"


def _perplexities(report):
    between = report.perplexity_pruned
    header = ("text", "dense", "pruned", *(["distilled"] if between else []), "windows")
    rows = []
    for name, (dense, after) in report.perplexity.items():
        values = (dense, *([between[name]] if between else []), after)
        found = (f"{value:.2f}" for value in values)
        rows.append((name, *found, _windows(report.protocol, name)))
    return _table(header, rows)


def _imports(model_class, packed):
    if packed:
        yield "import cuobs.models  # how packed weights are opened"
    yield f"from transformers import {model_class}"


def _windows(protocol, name):
    shape = protocol.get("evaluated", {}).get(name)
    return f"{shape[0]} of {shape[1]} tokens" if shape else ""


def _table(header, rows):
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(_cell(value) for value in row) + " |"


def _cell(value):
    text = " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|")
    return re.sub(r"([<>`*_\[\]])", r"\\\1", text)


def _split(text):
    """The metadata at the head of a card, without its fences, and the rest."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    return (found[1], text[found.end() :]) if found else ("", text)


def _head(head, report, base_model):
    """The metadata with the tags of a pruned model; as it was where it is none that is known."""
    import yaml

    try:
        content = yaml.safe_load(head) if head.strip() else {}
    except yaml.YAMLError:
        content = None
    if not isinstance(content, dict):
        return f"---\n{head}\n---\n"
    tags = content.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    wanted = (*TAGS, report.settings["pattern"])
    content["tags"] = tags + [tag for tag in wanted if tag not in tags and len(tag) < 40]
    if base_model:
        content["base_model"] = base_model
    content.setdefault("library_name", "transformers")
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n"
