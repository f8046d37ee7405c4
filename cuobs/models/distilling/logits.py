"""Logits of a language model, a few tokens at a time.

The logits of a batch of windows are the largest tensor that a model makes: a row of the vocabulary
for each token. A model is therefore cut before its head, and what the head and all that follows it
make of a few tokens is computed by the model's own forward, whatever that does.
"""

import contextlib

import torch

# Elements of float32 logits that are held at once.
CHUNK = {"cpu": 2**24, "cuda": 2**26}
# Logits of the two parts of a model and of the whole of it differ by rounding alone.
TOLERANCE = 1e-2
# Tokens that show where a model can be cut.
SHOWN = 8


class Cut:
    """A model in two parts: up to what its head reads, and from there to the logits.

    Parameters
    ----------
    model : torch.nn.Module
        Called with ``input_ids`` if it is one of transformers, else with the tokens alone; returns
        logits, or an object that has them.
    tokens : tensor of int, shape (windows, length)
        A few of them run through the model once.

    Attributes
    ----------
    head : torch.nn.Module or None
        Makes logits of what is given to `logits`; the rest of the model has no part in that.
    whole : bool
        Whether the model can't be cut: `hidden` gives logits then, and `logits` passes them on.
    """

    def __init__(self, model, tokens):
        self.model = model
        self.head = _head_of(model)
        self._body, self._form = None, None
        self.whole = self.head is None or not self._fits(tokens[:1, :SHOWN])

    def hidden(self, tokens, mask=None):
        """What the head reads.

        Parameters
        ----------
        tokens : tensor of int, shape (B, T)
        mask : tensor of int, shape (B, T), optional
            0 where a token is padding.

        Returns
        -------
        tensor, shape (B, T, D)
            The logits, D the vocabulary, where the model can't be cut.
        """
        if self.whole:
            return _run(self.model, tokens, mask)
        seen = []

        def note(hidden):
            seen.append(hidden)
            return hidden[..., :1]  # what follows the head has next to nothing to do

        with _acting(self.head, note):
            _run(self.model, tokens, mask)
        return seen[0]

    def logits(self, hidden):
        """The logits of some tokens in float32.

        Parameters
        ----------
        hidden : tensor, shape (n, D)

        Returns
        -------
        tensor, shape (n, vocabulary)
        """
        if self.whole:
            return hidden.float()
        # Windows of one token, since a model has no positions for as many as there may be here.
        out = self._form(hidden[:, None])
        tokens = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        with _acting(self._body, lambda *args, **kwargs: out):
            return _run(self.model, tokens, None)[:, 0].float()

    @torch.no_grad()
    def _fits(self, tokens):
        """Find the module whose output the head reads, and see whether the parts fit together."""
        read, given = [], []
        hooks = [self.head.register_forward_pre_hook(lambda _, args: read.append(args[0]))]
        for module in self.model.modules():
            if module not in (self.model, self.head):
                hooks.append(
                    module.register_forward_hook(lambda m, _, out: given.append((m, out)))
                )
        try:
            whole = _run(self.model, tokens, None).float()
        finally:
            for hook in hooks:
                hook.remove()
        if len(read) != 1 or read[0].ndim != 3:
            return False
        # Modules end from the inside out: the last one is the outermost.
        for module, out in reversed(given):
            first, form = _formed(out)
            if torch.is_tensor(first) and _same_place(first, read[0]):
                self._body, self._form, self.whole = module, form, False
                found = self.logits(self.hidden(tokens)[0])
                return bool((found - whole[0]).norm() <= TOLERANCE * whole[0].norm())
        return False


def chunk_tokens(device, vocabulary):
    """Tokens whose logits are held at once."""
    return max(1, CHUNK.get(device.type, CHUNK["cpu"]) // vocabulary)


def _run(model, tokens, mask):
    """A model's logits."""
    if hasattr(model, "config"):
        extra = {} if mask is None else {"attention_mask": mask}
        out = model(input_ids=tokens, use_cache=False, **extra)
    else:
        out = model(tokens)
    return out if torch.is_tensor(out) else out.logits


def _head_of(model):
    find = getattr(model, "get_output_embeddings", None)
    return find() if find else None


def _formed(out):
    """The first tensor of a module's output, and what puts another one into its form."""
    if torch.is_tensor(out):
        return out, lambda hidden: hidden
    if isinstance(out, dict):  # as outputs of transformers are
        kind, key = type(out), next(iter(out))
        return out[key], lambda hidden: kind(**{key: hidden})
    if isinstance(out, tuple) and out:
        rest = out[1:]
        return out[0], lambda hidden: (hidden, *rest)
    return None, None


def _same_place(a, b):
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


@contextlib.contextmanager
def _acting(module, forward):
    """Let a module do something else meanwhile."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
