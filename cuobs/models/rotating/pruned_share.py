"""The share of a layer's score that a pattern prunes, for gradient descent, in PyTorch."""

import numpy as np
import torch


class Scopes:
    """A compiled pattern as PyTorch looks at it: scores (L, M, K) to those of blocks and back.

    Parameters
    ----------
    layout : cuobs.pattern.Layout
    device : torch.device
    """

    def __init__(self, layout, device):
        m, r, n, c = layout.row_groups, layout.rows, layout.column_groups, layout.columns
        self.layout = layout
        self.shape, self.keep, self.n_blocks = (m, r, n, c), layout.keep, layout.n_blocks
        order = np.argsort(layout.blocks.ravel(), kind="stable")
        columns = layout.column_order
        if r == 1:  # then a block's elements can lie side by side from the start
            columns, order = columns[:, order], np.arange(c)
        self.rows = _places(layout.row_order.ravel(), device)
        self.columns = _places(columns.ravel(), device)
        self.order = _places(order, device)

    def gather(self, S):
        """Elements by scope and block: (L, M, K) to (L, m, n, blocks, elements)."""
        m, r, n, c = self.shape
        S = _take(S, 1, self.rows, 0)
        S = _take(S, 2, self.columns, 0).reshape(-1, m, r, n, c)
        if r > 1:
            S = _take(S.transpose(2, 3).reshape(-1, m, n, r * c), 3, self.order, 0)
        return S.reshape(-1, m, n, self.n_blocks, r * c // self.n_blocks)

    def scatter(self, chosen):
        """The inverse, of what is the same in a block: (L, m, n, blocks) to (L, M, K)."""
        m, r, n, c = self.shape
        L = len(chosen)
        size = r * c // self.n_blocks
        E = chosen[..., None].expand(*chosen.shape, size).reshape(L, m, n, r * c)
        E = _take(E, 3, self.order, 1)
        E = E.reshape(L, m, n, r, c).transpose(2, 3).reshape(L, m * r, n * c)
        return _take(_take(E, 1, self.rows, 1), 2, self.columns, 1)


class _PrunedShare(torch.autograd.Function):
    """Pruned score over score of each layer; the mask is constant in the gradient."""

    @staticmethod
    def forward(ctx, W, h, scopes):
        W = W.float()
        S = W.square().mul_(h[:, None])
        scores = scopes.gather(S)
        scores = scores.sum(-1) if scores.shape[-1] > 1 else scores[..., 0]
        pruned = scopes.n_blocks - scopes.keep
        mask = scores <= smallest(scores, pruned)[..., None]
        total = S.sum((1, 2)).clamp_min(1e-30)
        share = scores.masked_fill_(~mask, 0).sum((1, 2, 3)) / total
        ctx.save_for_backward(W, h, scopes.scatter(mask), share, total)
        return share

    @staticmethod
    def backward(ctx, gradient):
        W, h, mask, share, total = ctx.saved_tensors
        # d(pruned/total) = (mask - share) dS / total, S = W² h
        V = mask.float().sub_(share[:, None, None]).mul_(W)
        V.mul_((gradient / total)[:, None, None])
        to_h = (V * W).sum(1)
        return V.mul_(2 * h[:, None]), to_h, None


def pruned_share(W, h, scopes):
    """What a pattern prunes of the score ``S = W² diag(h)``, as a share of all of it.

    Parameters
    ----------
    W : tensor, shape (L, M, K)
        Weights of L layers of one shape.
    h : tensor of float32, shape (L, K)
    scopes : Scopes

    Returns
    -------
    tensor of float32, shape (L,)
        Differentiable in W and h.
    """
    return _PrunedShare.apply(W, h, scopes)


def smallest(scores, k):
    """The k-th smallest along the last dimension, by whichever end is nearer.

    A few comparisons of whole slices: a sort of many short rows takes much longer.
    """
    items = list(scores.unbind(-1))
    ends = torch.minimum, torch.maximum
    if k > len(items) - k:
        k, ends = len(items) - k + 1, ends[::-1]
    out, back = ends
    for last in range(k):
        for i in range(len(items) - 1):
            a, b = items[i], items[i + 1]
            items[i + 1] = out(a, b)
            if last + 1 < k:
                items[i] = back(a, b)
        found = items.pop()
    return found


def _places(order, device):
    """An order and its inverse, None where nothing moves."""
    if np.array_equal(order, np.arange(order.size)):
        return None
    return tuple(torch.from_numpy(o.copy()).to(device) for o in (order, np.argsort(order)))


def _take(x, dim, places, which):
    return x if places is None else x.index_select(dim, places[which])
