// ADMM's passes over all elements.
//
//   project_update(B, V, D, mask, operand, rho, inverse_rho, m, n, changed)    one thread a scope
//     D <- project(B + V / rho), V <- V + rho (B - D), operand <- B where it is not null
//   right_side(D, V, G, B, product, rho, out, operand, size)          one thread an element
//     rho (D - B) - V + G - product, to the one of out and operand that is not null
//
//     B, V, D, G, product, out   REAL, (m r, n c); out may be product
//     mask                       bool, (m r, n c), true = kept
//     operand                    half, (m r, n c)
//     changed                    one number, to which the mask's changed elements are added
//
// Macros: THREADS, and those of project.cuh; right_side needs REAL and THREADS alone.
#include <cuda_fp16.h>
#ifdef N_BLOCKS
#include "project.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
project_update(const REAL* __restrict__ B, REAL* __restrict__ V, REAL* __restrict__ D,
               bool* __restrict__ mask, __half* __restrict__ operand, const REAL rho,
               const REAL inverse_rho, const int m, const int n, unsigned long long* changed) {
    each_scope(m, n, changed, [&](const long long first, const long long row) {
        REAL x[ROWS][PLACES];
#pragma unroll
        for (int q = 0; q < ROWS; q++) {
            REAL b[PLACES];
            load(B + first + q * row, b);
            load(V + first + q * row, x[q]);
#pragma unroll
            for (int i = 0; i < PLACES; i++) x[q][i] = x[q][i] * inverse_rho + b[i];
            if (operand) {
                __half rounded[PLACES];
#pragma unroll
                for (int i = 0; i < PLACES; i++) rounded[i] = __float2half((float)b[i]);
                store(operand + first + q * row, rounded);
            }
        }
        const unsigned pruned = project(x);
        const int count = replace_mask(mask, first, row, pruned);
        // Where kept, D = B + V / rho makes the new V zero; where pruned, D = 0.
#pragma unroll
        for (int q = 0; q < ROWS; q++) {
            REAL multiplier[PLACES];
#pragma unroll
            for (int i = 0; i < PLACES; i++) {
                const bool kept = is_kept(pruned, q, i);
                multiplier[i] = kept ? REAL(0) : rho * x[q][i];
                x[q][i] = kept ? x[q][i] : REAL(0);
            }
            store(D + first + q * row, x[q]);
            store(V + first + q * row, multiplier);
        }
        return count;
    });
}

#else

extern "C" __global__ void __launch_bounds__(THREADS)
right_side(const REAL* __restrict__ D, const REAL* __restrict__ V, const REAL* __restrict__ G,
           const REAL* __restrict__ B, const REAL* product, const REAL rho, REAL* out,
           __half* __restrict__ operand, const long long size) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < size;
         i += gridDim.x * (long long)blockDim.x) {
        const REAL value = rho * (D[i] - B[i]) - V[i] + G[i] - product[i];
        if (out) out[i] = value;
        else operand[i] = __float2half((float)value);
    }
}
#endif
