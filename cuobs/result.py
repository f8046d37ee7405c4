"""What pruning a weight gives."""

from dataclasses import dataclass
from html import escape
from os import PathLike
from typing import Any

from cuobs import arrays


@dataclass(eq=False, repr=False)
class Result:
    """A pruned weight and what became of it.

    Two are equal where weights, masks, costs, losses and recipes are; times and settings aside.

    Attributes
    ----------
    weight : array, shape (M, K)
        In the kind, dtype and place of the weight that came in; exact zeros where pruned.
    mask : array of bool, shape (M, K)
        True = kept.
    loss : float
        Relative output error ‖X(Wp − W)ᵀ‖ / ‖XWᵀ‖, a fraction, by the undamped Hessian.
    sparsity : float
        Share of elements of `weight` that are exactly zero.
    seconds : float
        From the Hessian to the pruned weights, the measurement of the loss apart.
    hessian_seconds : float
        What the Hessian took: reading X and its products, or checking the one that came.
    recipe : Recipe
        What was done, defaults filled in.
    settings : Settings
        How it was run, on the device that was found.
    cost : array, shape (M,), or None
        The damped cost of each row, summed by the method as it went (true-obs, obs-ordered).
    tokens : int or None
        Rows of X that the Hessian is of, where that is known.
    converged : bool
        Whether all that was solved by iteration came to its end; a warning says so where not.
    """

    weight: object
    mask: object
    loss: float
    sparsity: float
    seconds: float
    hessian_seconds: float
    recipe: object
    settings: object
    cost: object = None
    tokens: int | None = None
    converged: bool = True

    @property
    def method(self):
        """The method's name."""
        return self.recipe.method

    @property
    def pattern(self):
        """The `Pattern`."""
        return self.recipe.pattern

    @property
    def refine(self):
        """ "exact" where the weights were solved again for the mask, else None."""
        return "exact" if self.recipe.exact else None

    @property
    def damp(self):
        """λ as a share of the mean of the Hessian's diagonal."""
        return self.recipe.damp

    @property
    def options(self):
        """The method's options, defaults filled in."""
        return self.recipe.options

    @property
    def device(self):
        """ "cpu" or "cuda": where it was computed."""
        return self.settings.device

    def __eq__(self, other):
        if not isinstance(other, Result):
            return NotImplemented
        return (self.loss, self.sparsity, self.recipe, self.tokens) == (
            other.loss, other.sparsity, other.recipe, other.tokens
        ) and all(
            _same(getattr(self, name), getattr(other, name)) for name in ("weight", "mask", "cost")
        )  # fmt: skip

    __hash__ = None

    def __repr__(self):
        facts = self._facts()
        first = ", ".join(facts[name] for name in ("shape", "pattern", "method"))
        return (
            f"Result({first},\n       loss {facts['loss']}, sparsity {facts['sparsity']}, "
            f"{facts['time']})"
        )

    def _repr_html_(self):
        rows = "".join(
            f"<tr><th>{name}</th><td>{escape(value)}</td></tr>"
            for name, value in self._facts().items()
        )
        return f"<table>{rows}</table>"

    def _facts(self):
        """What a person wants to know, by name."""
        return {
            "shape": " x ".join(map(str, self.weight.shape)),
            "pattern": f"{self.pattern.label}: {self.pattern.keeps}",
            "method": self.method + (" with weights solved again" if self.refine else ""),
            "loss": f"{self.loss:.3%}",
            "sparsity": f"{self.sparsity:.2%}",
            "time": f"{self.seconds:.2f} s on {self.device}",
        }

    def plot(self, path: str | PathLike | None = None, force: bool = False) -> Any:
        """Draw the mask: a corner of it element by element, and the whole weight from afar.

        Parameters
        ----------
        path : str, optional
            Where to write it: .png, .svg or .pdf.
        force : bool
            Overwrite an existing file.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from cuobs import plotting

        title = f"{self.pattern.label} by {self.method}, loss {self.loss:.2%}"
        figure = plotting.mask_figure(self.weight, self.mask, self.pattern, title)
        if path is not None:
            plotting.save(figure, path, force)
        return figure


def _same(a, b):
    """Whether two arrays of any kind, or None, have the same dtype, shape and elements."""
    if a is None or b is None:
        return a is b
    if arrays.dtype_of(a) != arrays.dtype_of(b) or tuple(a.shape) != tuple(b.shape):
        return False
    a, b = (arrays.to_numpy(arrays.receive(array)) for array in (a, b))
    return bool((a == b).all())
