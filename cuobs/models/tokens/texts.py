"""Texts to calibrate and to measure with: files, folders, lines of JSON, cached data sets."""

import contextlib
import json
import os
import re
from typing import NamedTuple

from cuobs import validation

# Files of a folder that are texts.
ENDINGS = (".txt", ".text", ".md", ".rst")
# Fields of a line of JSON that hold a text or a conversation, in the order they are looked for.
FIELDS = ("messages", "conversations", "text", "content")
DATASET = "dataset:"
EXPECTED = (
    "a text, a folder of texts, F.jsonl:FIELD, dataset:NAME[,CONFIG][:SPLIT[:FIELD]] or tokens.npz:"
    "key"
)


class Documents(NamedTuple):
    """What a source of text holds.

    Attributes
    ----------
    items : list
        A str each, or a conversation each: a list of messages with ``role`` and ``content``.
    chats : bool
        Whether they are conversations.
    """

    items: list
    chats: bool = False

    def __str__(self):
        """How many of what."""
        kind = "conversation" if self.chats else "document"
        return f"{len(self.items)} {kind}{'' if len(self.items) == 1 else 's'}"


def read_documents(spec):
    """The documents of a source of text.

    Parameters
    ----------
    spec : str
        A text file; a folder, whose ``.txt``, ``.md`` and ``.rst`` files are taken in order of
        their names; ``F.jsonl``, of each line of which one field is taken (``F.jsonl:FIELD``
        names it), a text or a conversation; or ``dataset:NAME[,CONFIG][:SPLIT[:FIELD]]``, a data
        set in the cache of the package ``datasets``.

    Returns
    -------
    Documents

    Raises
    ------
    FileNotFoundError, ValueError, ImportError
    """
    spec = os.fspath(spec)
    if spec.startswith(DATASET):
        return _dataset(spec)
    lines = re.fullmatch(r"(.+\.jsonl)(?::([^:/]+))?", spec)
    if lines and os.path.isfile(lines[1]):
        return _json_lines(lines[1], lines[2])
    if os.path.isdir(spec):
        return _folder(spec)
    validation.existing_file(spec, EXPECTED)
    return Documents([_read(spec)])


def joined(documents, tokenizer, spec):
    """Documents as one text for a tokenizer, and whether it is to add its own special tokens.

    Texts are joined by an empty line; conversations by nothing, each as the tokenizer's chat
    template writes it.
    """
    if not documents.chats:
        return "\n\n".join(documents.items), True
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{spec}: found conversations, but the model's tokenizer has no chat template, "
            "expected one that has or a field with a text"
        )
    try:
        return "".join(
            tokenizer.apply_chat_template(item, tokenize=False) for item in documents.items
        ), False
    except Exception as error:  # a template is a program of its own
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"{spec}: found a conversation that the model's chat template refuses ({reason})"
        ) from None


def _read(path):
    with open(path, "rb") as file:
        try:
            return file.read().decode()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: found a file that is no UTF-8 text") from None


def _folder(spec):
    found = []
    for place, folders, names in os.walk(spec):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        texts = [n for n in names if n.lower().endswith(ENDINGS) and not n.startswith(".")]
        found += [os.path.join(place, name) for name in sorted(texts)]
    if not found:
        raise ValueError(f"{spec}: found no {', '.join(ENDINGS)} in this folder, expected texts")
    return Documents([_read(path) for path in found])


def _json_lines(path, field):
    rows = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: found no JSON in line {number} ({error})") from None
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{path}: found no object in line {number}, expected {{...}}")
    return _of_rows(path, rows, field)


def _of_rows(name, rows, field):
    """The documents in one field of rows."""
    if not rows:
        raise ValueError(f"{name}: found no rows, expected at least one")
    known = list(rows[0])
    if field is None:
        field = next((key for key in FIELDS if key in known), None)
    if field not in known:
        what = f"no field {field!r}" if field else f"none of the fields {', '.join(FIELDS)}"
        raise ValueError(f"{name}: found {what} among {', '.join(known)}, expected {name}:FIELD")
    items = [row.get(field) for row in rows]
    chats = not isinstance(items[0], str)
    for number, item in enumerate(items, 1):
        if isinstance(item, str) == chats or chats and not _is_chat(item):
            raise ValueError(
                f"{name}: found {type(item).__name__} in {field!r} of row {number}, expected "
                + ("a list of messages with role and content" if chats else "a text")
            )
    return Documents(items, chats)


def _is_chat(item):
    messages = isinstance(item, list) and item
    return messages and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in item)


def _dataset(spec):
    name, *rest = spec.removeprefix(DATASET).split(":")
    name, _, config = name.partition(",")
    split, field = (*rest, None, None)[:2]
    if not name or len(rest) > 2:
        raise ValueError(f"{spec}: found no name, expected dataset:NAME[,CONFIG][:SPLIT[:FIELD]]")
    place = f"{DATASET}{name}{',' * bool(config)}{config}:{split or 'train'}"
    try:
        with _offline() as datasets:
            found = datasets.load_dataset(name, config or None, split=split or "train")
    except ImportError:
        raise ImportError(
            f"{spec}: data sets need the package datasets, which is not installed: "
            "pip install datasets"
        ) from None
    except Exception as error:  # whatever the package and what it calls may raise
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"{spec}: found no such data set in the cache ({reason}), expected one that was loaded "
            "before: nothing is fetched"
        ) from None
    return _of_rows(place, list(found), field)


@contextlib.contextmanager
def _offline():
    """The package ``datasets``, which neither fetches nor runs code meanwhile."""
    import datasets
    from huggingface_hub import constants

    wanted = {
        (constants, "HF_HUB_OFFLINE"): True,
        (datasets.config, "HF_HUB_OFFLINE"): True,
        (datasets.config, "HF_DATASETS_OFFLINE"): True,
        (datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE"): False,
    }
    before = {place: getattr(*place) for place in wanted if hasattr(*place)}
    try:
        for place in before:
            setattr(*place, wanted[place])
        yield datasets
    finally:
        for place, value in before.items():
            setattr(*place, value)
