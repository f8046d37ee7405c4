"""Time PyTorch's 2:4 with the algorithm that cuSPARSELt's search finds, in a process of its own.

An error inside cuSPARSELt can make CUDA unusable for the process that it happens in.
"""

import json
import sys

import torch

from cuobs.models.packed.timing import WEIGHTS, graph_seconds, keep_largest
from cuobs.pattern import parse


@torch.no_grad()
def main(plan):
    """Print ``MxKxtokens seconds`` for each product of a plan, a dict in JSON."""
    plan = json.loads(plan)
    dtype = getattr(torch, plan["dtype"])
    for rows, columns in plan["shapes"]:
        W = keep_largest(torch.randn(rows, columns, dtype=dtype, device="cuda"), parse("2:4"))
        first = torch._cslt_compress(W)
        weights = [first, *(first.clone() for _ in range(WEIGHTS - 1))]
        for tokens in plan["batches"]:
            # As PyTorch pads them.
            padded = -(-tokens // 16) * 16
            x = torch.randn(padded, columns, dtype=dtype, device="cuda").T
            found = torch._cslt_sparse_mm_search(first, x, transpose_result=True)
            torch.cuda.synchronize()
            seconds = graph_seconds([
                lambda w=w, x=x, found=found: torch._cslt_sparse_mm(
                    w, x, transpose_result=True, alg_id=found)
                for w in weights
            ])  # fmt: skip
            print(f"{rows}x{columns}x{tokens} {seconds}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
