"""KL(dense ‖ pruned) of next-token distributions, a few tokens at a time."""

import torch

from cuobs.models.distilling.logits import chunk_tokens


class _Divergence(torch.autograd.Function):
    """The divergence of rows of logits, weighted and summed; its gradient is made at once."""

    @staticmethod
    def forward(context, logits, goals, counts):
        log_q, log_p = logits.log_softmax(1), goals.log_softmax(1)
        p = log_p.exp()
        lost = (log_p.sub_(log_q).mul_(p).sum(1) * counts).sum()
        context.save_for_backward(log_q.exp_().sub_(p).mul_(counts[:, None]))
        return lost

    @staticmethod
    def backward(context, gradient):
        return context.saved_tensors[0] * gradient, None, None


def divergence(pruned, dense, hidden, goals, counts):
    """KL(dense ‖ pruned) in nats, weighted and summed over tokens.

    Parameters
    ----------
    pruned, dense : Cut
    hidden, goals : tensor, shape (n, D)
        What their heads read; D may differ.
    counts : tensor, shape (n,)
        The weight of each token; 0 keeps it out.

    Returns
    -------
    tensor, shape ()
        In float64.
    """
    with torch.no_grad():
        parts = [
            _Divergence.apply(pruned.logits(h), dense.logits(g), c).double()
            for h, g, c in _chunks(pruned, dense, hidden, goals, counts)
        ]
    return sum(parts)


@torch.no_grad()
def comparison(pruned, dense, hidden, goals):
    """`divergence` over tokens that all count, and for how many of them the likeliest next token
    is the same.

    Returns
    -------
    lost, same : tensor, shape ()
        Sums in float64.
    """
    lost = same = 0.0
    counts = torch.ones(len(hidden), device=hidden.device)
    for h, g, c in _chunks(pruned, dense, hidden, goals, counts):
        logits, goal = pruned.logits(h), dense.logits(g)
        lost = lost + _Divergence.apply(logits, goal, c).double()
        same = same + (logits.argmax(1) == goal.argmax(1)).sum().double()
    return lost, same


def divergence_gradient(pruned, dense, hidden, goals, counts, weights):
    """The gradient of `divergence`, one chunk of logits after the other.

    Parameters
    ----------
    pruned, dense, hidden, goals, counts
        As in `divergence`.
    weights : list of tensor
        Parameters of the pruned model; those that follow ``hidden`` in it have a gradient here.

    Returns
    -------
    at_hidden : tensor, shape (n, D)
    at_weights : list of (tensor or None)
    """
    hidden = hidden.detach()
    at_hidden, at_weights = torch.empty_like(hidden), [None] * len(weights)
    start = 0
    for h, g, c in _chunks(pruned, dense, hidden, goals, counts):
        with torch.no_grad():
            goal = dense.logits(g)
        h = h.requires_grad_()
        lost = _Divergence.apply(pruned.logits(h), goal, c)
        found = torch.autograd.grad(lost, [h, *weights], allow_unused=True)
        at_hidden[start : start + len(h)] = found[0]
        start += len(h)
        for i, gradient in enumerate(found[1:]):
            if gradient is not None:
                own = at_weights[i]
                at_weights[i] = gradient if own is None else own.add_(gradient)
    return at_hidden, at_weights


def _chunks(pruned, dense, hidden, goals, counts):
    """Rows of the tensors whose logits are made at once."""
    with torch.no_grad():
        sizes = [cut.logits(h[:1]).shape[1] for cut, h in ((pruned, hidden), (dense, goals))]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"dense: found a vocabulary of {sizes[1]}, expected that of the model: {sizes[0]}"
        )
    rows = chunk_tokens(hidden.device, sizes[0])
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        yield hidden[part], goals[part], counts[part]
