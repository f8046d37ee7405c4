// Compensation inside each scope, one thread a scope of one row.
//
//   scope_compensation(W, C, mask, out, M, n)
//     W, out  REAL, (M, n c)
//     C       REAL, (c, c, n): diagonal blocks of the inverse Hessian
//     mask    bool, (M, n c), true = kept
//   out = w - λ C, λ_P C_PP = w_P, in each scope; 0 where pruned.
//
// Macros: REAL; PLACES, the columns c of a scope; THREADS.
#include "scope.cuh"
#include "masked_solve.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
scope_compensation(const REAL* __restrict__ W, const REAL* __restrict__ C,
                   const bool* __restrict__ mask, REAL* __restrict__ out, const int M,
                   const int n) {
    const int g = blockIdx.x * blockDim.x + threadIdx.x;
    if (g >= n) return;
    const auto entry = [&](int i, int j) { return C[(i * PLACES + j) * (long long)n + g]; };
    for (int row = blockIdx.y * blockDim.y + threadIdx.y; row < M; row += gridDim.y * blockDim.y) {
        const long long first = (row * (long long)n + g) * PLACES;
        REAL w[PLACES], multiplier[PLACES];
        bool kept[PLACES];
        load(W + first, w);
        load(mask + first, kept);
        unsigned pruned = 0;
#pragma unroll
        for (int i = 0; i < PLACES; i++) {
            pruned |= unsigned(!kept[i]) << i;
            multiplier[i] = w[i];
        }
        masked_solve(entry, pruned, multiplier);
#pragma unroll
        for (int i = 0; i < PLACES; i++) {
#pragma unroll
            for (int j = 0; j < PLACES; j++)
                w[i] -= multiplier[j] * (j < i ? entry(i, j) : entry(j, i));
            w[i] = kept[i] ? w[i] : REAL(0);
        }
        store(out + first, w);
    }
}
