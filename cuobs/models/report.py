"""What was done to a model and what became of it: records, as JSON and read again from it."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from typing import NamedTuple

import cuobs
from cuobs.arrays import size_text
from cuobs.models.checkpoints.source import REPORT, unfinished

__all__ = [
    "Agreement",
    "BlockReport",
    "DistillationReport",
    "LayerReport",
    "ModelReport",
    "RotationReport",
    "read_report",
]


@dataclass
class LayerReport:
    """One linear of a model.

    Attributes
    ----------
    name : str
        As in the model, without ``.weight``.
    shape : tuple of int
        (outputs, inputs).
    loss : float or None
        Relative output error on the calibration tokens, ‖X̂(Wp − W)ᵀ‖ / ‖X̂Wᵀ‖ with X̂ the inputs
        in the pruned model; None where the layer was left as it is.
    sparsity : float
        Share of elements that are exactly zero.
    damp : float or None
        λ as used, as a share of the mean of the Hessian's diagonal.
    dense_share, residual_share : float or None
        The shares of the target that were used.
    seconds : float
    note : str
        Why a layer was left as it is, or what else there is to say.
    transposed : bool
        Whether the weight lies as (inputs, outputs) in the model's files.
    pattern : str
        The name of what it was pruned to, or its text form; empty where it was left as it is.
    """

    name: str
    shape: tuple
    loss: float | None = None
    sparsity: float = 0.0
    damp: float | None = None
    dense_share: float | None = None
    residual_share: float | None = None
    seconds: float = 0.0
    note: str = ""
    transposed: bool = False
    pattern: str = ""


@dataclass
class BlockReport:
    """One block of a model.

    Attributes
    ----------
    index : int
    layers : list of LayerReport
    drift : float or None
        ‖h − ĥ‖ / ‖h‖ of the hidden states that leave the block, dense h and pruned ĥ, over the
        tokens that count; None where the dense ones are not followed.
    tuned : tuple of float, or None
        The error that tuning lowered, before and after.
    seconds : float
    resumed : bool
        Whether it was read back from an earlier run.
    """

    index: int
    layers: list
    drift: float | None = None
    tuned: tuple | None = None
    seconds: float = 0.0
    resumed: bool = False

    def labels(self) -> list:
        """Short names of the layers: the last part, or more where two would be alike."""
        inside = [row.name.partition(f".{self.index}.")[2] for row in self.layers]
        last = [name.rpartition(".")[2] for name in inside]
        pairs = zip(last, inside, strict=True)
        return [short if last.count(short) == 1 else name for short, name in pairs]

    @classmethod
    def from_dict(cls, content):
        """The inverse of `dataclasses.asdict`."""
        layers = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in content["layers"]]
        tuned = content["tuned"] and tuple(content["tuned"])
        return cls(**{**content, "layers": layers, "tuned": tuned})


@dataclass
class RotationReport:
    """What rotating a model did.

    Attributes
    ----------
    pattern : str
    steps : int
    score : str
    permuted : bool
        Whether the inner columns were dealt out to the scopes, and the stream's scopes ordered.
    before, after : float
        Share of the score that the pattern prunes, by the size of the layers.
    heads : int
        Key-value heads whose values were rotated.
    deviation : float
        ‖z' − z‖ / ‖z‖ of the logits on some tokens, in the model's own dtype.
    untied : int
        Bytes that a head of its own adds to the model.
    learning, seconds : float
        Of learning alone, moments included; and of everything.
    memory_peak, memory_predicted : int
        Bytes on the device (on the CPU: of the process).
    """

    pattern: str
    steps: int
    score: str
    permuted: bool
    before: float
    after: float
    heads: int
    deviation: float
    untied: int
    learning: float
    seconds: float
    memory_peak: int
    memory_predicted: int = 0

    def summary(self) -> list:
        """Names and values of what there is to say in a table."""
        told = f" ({size_text(self.memory_predicted)} predicted)" if self.memory_predicted else ""
        heads = f", the values of {self.heads} heads" if self.heads else ""
        untied = f"adds {size_text(self.untied)}" if self.untied else "was one already"
        return [
            ("rotated", f"the residual stream{heads}, for {self.pattern}"),
            ("pruned share", f"{self.before:.4f} of the score before, {self.after:.4f} after"),
            ("logits", f"differ by {self.deviation:.1e} of their norm"),
            ("head of its own", untied),
            ("rotation", f"{self.seconds:.1f} s, {size_text(self.memory_peak)} at most{told}"),
        ]

    def lines(self) -> list:
        """The same as lines of a table."""
        rows = self.summary()
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {value}" for name, value in rows]


@dataclass
class DistillationReport:
    """What distillation did.

    Attributes
    ----------
    settings : dict
        Passes, rate, seed, windows of a step.
    windows, aside : int
        That were learned from, each once a pass or as often as told, and that were kept aside.
    steps : int
        Of all passes.
    divergence : list of float
        KL(dense ‖ pruned), nats a token, on the windows kept aside: before, and after each pass.
    kept : int
        The pass whose weights the model has now; 0 where none helped and all were taken back.
    seconds : float
        Of this run.
    memory_predicted, memory_peak : int
        Bytes on the device (on the CPU: of the process).
    """

    settings: dict = field(default_factory=dict)
    windows: int = 0
    aside: int = 0
    steps: int = 0
    divergence: list = field(default_factory=list)
    kept: int = 0
    seconds: float = 0.0
    memory_predicted: int = 0
    memory_peak: int = 0

    def summary(self) -> list:
        """Rows of a table: names and values."""
        cost = ("", f"{self.seconds:.1f} s, {size_text(self.memory_peak)} at most")
        return [("distillation", self.text()), *([cost] if self.divergence else [])]

    def text(self) -> str:
        """What it gave, in words."""
        if not self.divergence:
            return "nothing to learn from"
        before, after = self.divergence[0], self.divergence[self.kept]
        kept = f"pass {self.kept} of {self.settings['passes']}" if self.kept else "none of it kept"
        return f"KL {before:.4f} before, {after:.4f} after ({kept})"


class Agreement(NamedTuple):
    """How near a model is to another one, the dense.

    Attributes
    ----------
    divergence : float
        KL(dense ‖ model) of the next-token distributions, nats a token.
    same_top : float
        Share of tokens after which both hold the same next one for the likeliest.
    """

    divergence: float
    same_top: float

    def text(self) -> str:
        """For people."""
        return f"KL {self.divergence:.4f}, the same likeliest token in {self.same_top:.1%}"


@dataclass
class ModelReport:
    """A pruned model.

    Attributes
    ----------
    settings : dict
        Everything that decides the result: method, pattern, target, damping and so on.
    protocol : dict
        The calibration tokens: windows, length, source, seed.
    blocks : list of BlockReport
    left : list of str
        Linears outside the blocks, which stay as they are.
    carried : list of str
        Tensors of the source that the loaded class does not hold, written as they are.
    left_out : dict of str to str
        Files of the source that are not written, and why.
    seconds : float
        Of this run: blocks that were read back count as long as reading took.
    memory_predicted, memory_peak : int
        Bytes on the device (on the CPU: of the process), of the rotation and the blocks.
    whole_seconds, whole_peak : float, int
        From the start of a run over a folder to the writing of another: windows that the model
        writes, rotation, distillation and evaluation included. 0 for a model in memory.
    rotation : RotationReport or None
        Where the model was rotated first.
    masks : dict of tensor of bool
        Where they were asked for, by the name of a linear, in the form of its weight, True = kept.
        Not in JSON.
    perplexity : dict
        By the name of a text, the perplexity before and after; null in JSON where it is no finite
        number.
    perplexity_pruned : dict
        By the name of a text, that of the pruned model before it was distilled.
    agreement : dict
        By the name of a text, ``divergence`` and ``same_top``, see `cuobs.models.Agreement`.
    distillation : DistillationReport or None
    """

    settings: dict
    protocol: dict
    blocks: list = field(default_factory=list)
    left: list = field(default_factory=list)
    carried: list = field(default_factory=list)
    left_out: dict = field(default_factory=dict)
    seconds: float = 0.0
    memory_predicted: int = 0
    memory_peak: int = 0
    whole_seconds: float = 0.0
    whole_peak: int = 0
    perplexity: dict = field(default_factory=dict)
    rotation: object = None
    masks: dict = field(default_factory=dict, repr=False)
    perplexity_pruned: dict = field(default_factory=dict)
    agreement: dict = field(default_factory=dict)
    distillation: object = None

    @property
    def layers(self):
        """Every linear of every block."""
        return [row for block in self.blocks for row in block.layers]

    @property
    def sparsity(self):
        """Share of exact zeros among the weights of the linears in the blocks."""
        sizes = [row.shape[0] * row.shape[1] for row in self.layers]
        zeros = sum(row.sparsity * n for row, n in zip(self.layers, sizes, strict=True))
        return zeros / max(sum(sizes), 1)

    def to_json(self) -> str:
        """The report as text."""
        content = {"cuobs": cuobs.__version__, **asdict(replace(self, masks={}))}
        del content["masks"]
        return json.dumps(_finite(content), indent=2) + "\n"

    @classmethod
    def from_json(cls, text):
        """The inverse of `to_json`; what is not known is left out."""
        content = json.loads(text)
        known = {key: content[key] for key in (f.name for f in fields(cls)) if key in content}
        known["blocks"] = [BlockReport.from_dict(block) for block in content["blocks"]]
        known["perplexity"] = {
            name: tuple(math.nan if value is None else value for value in pair)
            for name, pair in content["perplexity"].items()
        }
        if known.get("rotation"):
            known["rotation"] = RotationReport(**known["rotation"])
        if known.get("distillation"):
            known["distillation"] = DistillationReport(**known["distillation"])
        return cls(**known)


def _finite(value):
    """A value for JSON, which has no number for infinity."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_report(folder: str | PathLike) -> "ModelReport":
    """The report of a pruned model's folder.

    Raises
    ------
    FileNotFoundError, ValueError
        There is none, or it is damaged.
    """
    path = os.path.join(folder, REPORT)
    if not os.path.isfile(path):
        what = f"no {REPORT}" if os.path.isdir(folder) else "no such folder"
        what = "an unfinished run" if unfinished(folder) else what
        raise FileNotFoundError(
            f"{folder}: found {what}, expected a folder that 'cuobs prune-model' wrote"
        )
    with open(path, "rb") as file:
        try:
            return ModelReport.from_json(file.read())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}: found no report of pruning, expected one") from None
