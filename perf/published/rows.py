"""The rows of the published benchmark and of ours: what is run, and what is known of it.

The published figures are of another layer of the same size (Qwen3 4B layer 0) on a GPU: the order
of the methods and the ratios to SparseGPT carry over, the percentages do not. `package` is what
the published benchmark's own package takes on one H100 for the layer of `layer.py`.
"""

from typing import NamedTuple

PATTERNS = ("2:4", "coupled-2:4", "4:8", "block16-row8")


class Row(NamedTuple):
    """One line of the benchmark.

    Attributes
    ----------
    pattern, method : str
        As in `cuobs.prune`, or the method "gram" (XᵀX) or "resolve" (the exact re-solve of
        SparseGPT's mask).
    options : dict
        Further arguments of `cuobs.prune`.
    first : int or None
        Only the first rows of the weight.
    published : (loss %, seconds) or None
    package, target, aim : float or None
        Seconds: of the published benchmark's package, to be reached, to be hoped for.
    loss, most : float or None
        The loss % to be met within `within`, or not to be exceeded.
    """

    pattern: str
    method: str
    options: dict = {}
    first: int | None = None
    published: tuple | None = None
    package: float | None = None
    target: float | None = None
    aim: float | None = None
    loss: float | None = None
    within: float = 0.05
    most: float | None = None

    @property
    def label(self):
        """Method and options, ``true-obs 256 gap``."""
        return " ".join([self.method, *map(str, self.options.values())])

    @property
    def name(self):
        """Pattern and label, ``2:4/true-obs-256-gap``, for --rows."""
        first = f"/first-{self.first}" if self.first else ""
        return f"{self.pattern}/{self.label.replace(' ', '-')}{first}"

    def loss_is_met(self, percent):
        """Whether a loss is as it should be; None where nothing is known."""
        if self.loss is not None:
            return abs(percent - self.loss) <= self.within
        return percent <= self.most if self.most is not None else None


def _group(number, order="gap"):
    return {"group": number, "order": order}


EXACT = {"refine": "exact"}
SLOW = {"schedule": "slow"}

# Cheap rows first: a short lease gets most of the table.
ROWS = (
    Row("2:4", "gram", package=0.89, target=0.050, aim=0.040),
    Row("2:4", "magnitude", loss=31.37),
    Row("2:4", "wanda"),
    Row("2:4", "obs-local", published=(20.66, 0.1), package=0.145, target=0.06, aim=0.045,
        loss=26.50),
    Row("2:4", "obs-full", published=(15.42, 3.9), package=2.12, target=0.10, aim=0.070,
        loss=18.99),
    Row("2:4", "obs-split", {"splits": 64}, package=3.65, target=0.10, aim=0.070, loss=19.29),
    Row("2:4", "obs-interleaved", {"splits": 8}, published=(14.35, 2.9), package=1.68, loss=17.35),
    Row("2:4", "obs-interleaved", {"splits": 16}, published=(14.24, 3.3)),
    Row("2:4", "obs-interleaved", {"splits": 64}, published=(14.16, 6.0), package=3.86,
        target=0.08, aim=0.035, loss=16.84),
    Row("2:4", "sparsegpt", published=(14.12, 1.1), package=1.46, target=0.030, aim=0.020,
        loss=16.77),
    Row("2:4", "sparsegpt", EXACT, most=13.77),
    Row("2:4", "resolve", target=0.060, aim=0.040, most=13.77),
    Row("2:4", "admm", target=0.25, aim=0.18, most=12.41),
    Row("2:4", "admm", SLOW, target=0.45, aim=0.35, most=12.33),
    Row("coupled-2:4", "magnitude", loss=39.45),
    Row("coupled-2:4", "obs-local", published=(27.83, 0.0)),
    Row("coupled-2:4", "obs-full", published=(20.43, 3.1)),
    Row("coupled-2:4", "obs-interleaved", {"splits": 16}, published=(19.14, 2.7)),
    Row("coupled-2:4", "obs-interleaved", {"splits": 64}, published=(19.06, 5.4)),
    Row("coupled-2:4", "sparsegpt", published=(19.01, 1.0)),
    Row("coupled-2:4", "admm", most=16.10),
    Row("coupled-2:4", "admm", SLOW),
    Row("4:8", "magnitude", loss=39.70),
    Row("4:8", "obs-local", published=(27.76, 0.0)),
    Row("4:8", "obs-full", published=(20.34, 3.1)),
    Row("4:8", "obs-interleaved", {"splits": 16}, published=(19.11, 2.7)),
    Row("4:8", "obs-interleaved", {"splits": 64}, published=(19.04, 5.5)),
    Row("4:8", "sparsegpt", published=(19.00, 1.1), package=1.30, loss=21.66),
    Row("4:8", "admm", most=16.10),
    Row("4:8", "admm", SLOW),
    Row("block16-row8", "magnitude", published=(48.83, 0.05), loss=52.90),
    Row("block16-row8", "obs-full", published=(34.19, 9.8)),
    Row("block16-row8", "sparsegpt", published=(33.46, 146.3), package=256.0, target=0.15,
        aim=0.05),
    Row("block16-row8", "admm", most=24.5),
    Row("block16-row8", "admm", SLOW),
    Row("2:4", "sparsegpt", first=32, published=(4.06, 1.2), loss=17.14),
    Row("2:4", "obs-full", first=32, published=(5.42, 0.3)),
    Row("2:4", "obs-interleaved", {"splits": 64}, first=32, published=(4.09, 3.9)),
    Row("2:4", "admm", first=32),
    Row("2:4", "true-obs", _group(256, "left"), first=32, loss=13.76),
    Row("2:4", "true-obs", _group(256, "shared"), first=32, published=(3.42, 1.0), loss=13.51),
    Row("2:4", "true-obs", _group(256, "largest"), first=32, loss=13.39),
    Row("2:4", "true-obs", _group(256), first=32, loss=12.87),
    Row("2:4", "true-obs", _group(64), first=32, loss=12.75),
    Row("2:4", "true-obs", _group(256, "shared"), first=128, package=6.0, loss=13.55),
    Row("4:8", "sparsegpt", first=32, published=(5.64, 1.1)),
    Row("4:8", "true-obs", _group(16, "shared"), first=32, published=(4.54, 5.0), package=4.1,
        loss=17.02),
    Row("coupled-2:4", "true-obs", _group(16, "shared"), first=32, package=3.6, loss=16.99),
    Row("block16-row8", "sparsegpt", first=64, package=6.4, loss=31.74),
    Row("2:4", "obs-ordered", _group(256, "largest"), published=(13.39, 14.8), target=0.6,
        aim=0.3),
    Row("2:4", "true-obs", _group(256), target=2.4, aim=1.5, loss=12.62),
    Row("2:4", "true-obs", _group(256, "shared"), published=(11.87, 105), package=24.0,
        target=2.4, aim=1.5),
    Row("2:4", "true-obs", _group(256, "largest"), target=2.4, aim=1.5),
    Row("2:4", "true-obs", _group(256, "left"), published=(12.09, 75), package=19.0),
    Row("2:4", "true-obs", _group(64), loss=12.51),
    Row("coupled-2:4", "true-obs", _group(16), published=(15.75, 433), target=8, aim=3),
    Row("coupled-2:4", "true-obs", _group(64), published=(15.79, 397)),
    Row("4:8", "true-obs", _group(16), published=(15.92, 558), target=8, aim=3),
    Row("4:8", "true-obs", _group(64), published=(15.97, 463)),
    Row("4:8", "true-obs", _group(256), published=(16.12, 487)),
    Row("block16-row8", "true-obs", _group(16), published=(26.91, 215.5), target=10, aim=4),
    Row("2:4", "true-obs", _group(1), first=32, published=(3.39, 75.9)),
    Row("4:8", "true-obs", _group(2), first=32, published=(4.53, 20.3)),
)
