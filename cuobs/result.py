"""What pruning a weight gives."""

from dataclasses import dataclass


@dataclass
class Result:
    """A pruned weight and what became of it.

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
