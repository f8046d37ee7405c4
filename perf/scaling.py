"""Seconds a block on several GPUs, on paper: what divides, what does not, what crosses the links.

    python -m perf.scaling

For a Llama of 8B shape, admm with the target mixed, 2:4, 128 windows of 2048 tokens: the seconds of
one GPU, and how much of each step is left on two, come from ``perf.whole_model`` on H100, those of
N are

    T(N) = windows / N + rows / N + leaves + products / N + each + links(N)

where windows are forwards and sums, rows what pruning does with rows of weights, leaves and
products what of factors and inverses divides between two and what does not, and each what else does
not: finding groups, passes over Hessians, launches and small products of row solves. Several GPUs
make targets and losses by other products than one, so that there is less of rows. Sums cross the
links by an all-reduce, 2 (N - 1) / N of their bytes a GPU; rows and factors are gathered,
(N - 1) / N of theirs.
"""

from typing import NamedTuple

# (K, rows of all its linears, whether it writes into the residual stream) of each group.
GROUPS = ((4096, 6144, False), (4096, 4096, True), (4096, 28672, False), (14336, 4096, True))
WIDTH = 4096
# Seconds of one GPU, by step, and those of rows that several divide.
WINDOWS, ROWS, ROWS_OF_SEVERAL, EACH = 0.915, 0.741, 0.631, 0.066
# Those of factors and inverses, by what one and two GPUs take; how often the largest Hessian is
# inverted, and the orders of the largest pieces that are factored whole, of two side by side and of
# one.
LEAVES, PRODUCTS = 0.085, 0.262
INVERSES, LEAF, LEAF_OF_ONE = 4, 8192, 4096
# Numbers that all agree on, one a step of ADMM, and seconds of one such sum in a host and of one
# between hosts; bytes a second that a sum and a gather move into a GPU from its host's links, and
# what an adapter moves between hosts.
STEPS, LATENCY = 165, (1.04e-4, 2e-4)
SUMS, GATHERS, ADAPTER = 3.15e11, 2.2e11, 5e10
GPUS_OF_A_HOST = 8


class Case(NamedTuple):
    """So many GPUs, with so many network adapters of 400 Gb/s in each host."""

    name: str
    gpus: int
    adapters: int = 8


CASES = (
    Case("1 GPU", 1), Case("2", 2), Case("8", 8), Case("64, 8 adapters", 64),
    Case("64, 1 adapter", 64, 1),
)  # fmt: skip


def bytes_of_sums(groups=GROUPS, width=WIDTH):
    """Bytes of all sums of a block: of each group Ĥ and (X − X̂)ᵀX̂, of writers (h − ĥ)ᵀX̂."""
    return sum(4 * (2 * K * K + width * K * writes) for K, _, writes in groups)


def bytes_of_rows(groups=GROUPS):
    """Bytes of a block's weights, two each, and their masks."""
    return sum(3 * K * rows for K, rows, _ in groups)


def bytes_of_factors(groups=GROUPS):
    """Bytes that factors and inverses gather: small Hessians', first inverses beside, the rest."""
    found = 0
    for K, _, _ in groups:
        found += bytes_of_pair(K, LEAF)
        if K > LEAF:
            found += (INVERSES - 1) * bytes_of_factor(K, LEAF_OF_ONE) + INVERSES * 4 * K * K
    return found


def bytes_of_pair(K, leaf):
    """Bytes that a factor with its inverse and another inverse gather, made side by side."""
    if K <= leaf:
        return 4 * 4 * K * K
    m = K // 2
    return 2 * 4 * m * (m + 2 * (K - m)) + bytes_of_pair(K - m, leaf) + bytes_of_pair(m, leaf)


def bytes_of_factor(K, leaf, inverted=True):
    """Bytes that one factor gathers, or one and its inverse: two corners or three, and halves."""
    if K <= leaf:
        return 0
    m, corners = K // 2, 3 if inverted else 2
    halves = bytes_of_factor(K - m, leaf) + bytes_of_factor(m, leaf, inverted)
    return 4 * m * (m * (corners > 1) + (K - m) * (corners - 1)) + halves


def rate(case, within):
    """Bytes a second that move into each GPU, of which so many could within a host."""
    if case.gpus <= GPUS_OF_A_HOST:
        return within
    return min(within, case.adapters * ADAPTER)


def seconds(case):
    """Seconds of a block by step, the links' by what crosses them."""
    n, others = case.gpus, (case.gpus - 1) / case.gpus
    latency = STEPS * LATENCY[n > GPUS_OF_A_HOST] * (n > 1)
    return {
        "forwards and sums": WINDOWS / n,
        "rows": ROWS if n == 1 else ROWS_OF_SEVERAL / n,
        "factors": LEAVES + PRODUCTS / n,
        "not divided": EACH,
        "links: sums": 2 * others * bytes_of_sums() / rate(case, SUMS),
        "links: rows": others * bytes_of_rows() / rate(case, GATHERS),
        "links: factors": others * bytes_of_factors() / rate(case, GATHERS),
        "links: numbers": latency,
    }


def table():
    """The table of the documents, as reStructuredText."""
    found = [seconds(case) for case in CASES]
    names = [case.name for case in CASES]
    whole = [sum(one.values()) for one in found]
    rows = [["seconds a block", *names]]
    rows += [[step, *(f"{one[step]:.3f}" for one in found)] for step in found[0]]
    rows += [["together", *(f"{s:.2f}" for s in whole)]]
    rows += [["times as fast", *(f"{whole[0] / s:.2f}" for s in whole)]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = "  ".join("=" * width for width in widths)
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows
    ]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def main():
    """Print the bytes and the table."""
    for name, count in (
        ("sums", bytes_of_sums()), ("rows", bytes_of_rows()), ("factors", bytes_of_factors())
    ):  # fmt: skip
        print(f"{name}: {count / 1e9:.2f} GB")
    print(table())


if __name__ == "__main__":
    main()
