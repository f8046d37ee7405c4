"""The state of a distillation on disk, from which it goes on to the same bits."""

import json
import os
import time

import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save

from cuobs import files


class State:
    """The state of a run in a file, written every so often."""

    def __init__(self, path, seconds, ranks):
        self._path, self._seconds, self._ranks = path, seconds, ranks
        self._last = time.monotonic()

    def begin(self, identity, resume):
        """Note what decides the result, and refuse a file that holds something else."""
        self._identity = json.loads(json.dumps(identity))
        folder = os.path.dirname(os.path.abspath(self._path))
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"state: found no folder {folder}, expected one to write to")
        if not os.path.exists(self._path):
            return
        if not resume:
            raise FileExistsError(f"{self._path}: found the state of a run, expected resume")
        before = self._content()["identity"]
        for key, value in self._identity.items():
            if before.get(key) != value:
                raise ValueError(
                    f"resume: found that {self._path} was made with another {key}, expected the "
                    "same run"
                )

    def load(self, weights, optimizer, report, split=None):
        """Put the state in place; the steps done, and the best weights if there are any.

        Where weights are shared out, a `Split` says how.
        """
        if self._path is None or not os.path.exists(self._path):
            return 0, None
        content = self._content()
        with safe_open(self._path, "pt") as stored:
            names = set(stored.keys())

            def read(name):
                tensor = stored.get_tensor(name)
                return tensor if split is None else split.own(tensor)

            put(weights, [read(f"weight.{i}") for i in range(len(weights))])
            step = torch.tensor(float(content["done"]))
            moments = {
                i: {"step": step.clone(), "exp_avg": read(f"first.{i}"),
                    "exp_avg_sq": read(f"second.{i}")}
                for i in range(len(weights)) if f"first.{i}" in names
            }  # fmt: skip
            best = [read(f"best.{i}") for i in range(len(weights)) if f"best.{i}" in names]
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        report.divergence[:] = content["divergence"]
        return content["done"], best or None

    def due(self, done, weights, optimizer, best, report, split=None):
        """Write the state where the last one is old enough."""
        early = time.monotonic() - self._last < self._seconds
        if self._path is not None and split is not None:
            early = self._ranks.agree(early)  # all have a part in it
        if self._path is None or early or split is None and not self._ranks.leads:
            return
        tensors = {}

        def put_down(name, i, tensor):
            if split is not None:
                tensor = split.whole(i, tensor.to(weights[i].device))
            if self._ranks.leads:
                tensors[f"{name}.{i}"] = tensor.cpu().contiguous()

        for i, weight in enumerate(weights):
            put_down("weight", i, weight.detach())
            if moments := optimizer.state.get(weight):
                put_down("first", i, moments["exp_avg"])
                put_down("second", i, moments["exp_avg_sq"])
            put_down("best", i, best[i])
        content = {"identity": self._identity, "done": done, "divergence": report.divergence}
        if self._ranks.leads:
            with files.replacing(self._path, force=True) as file:
                file.write(save(tensors, {"state": json.dumps(content)}))
        self._last = time.monotonic()

    def _content(self):
        try:
            with safe_open(self._path, "pt") as stored:
                return json.loads(stored.metadata()["state"])
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"resume: found that {self._path} is damaged, expected a whole file; without it "
                "distillation begins again"
            ) from None


@torch.no_grad()
def put(weights, values):
    """Give weights these values, in place."""
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
