// ADMM's passes over all elements.
//
//   project_update(B, V, D, mask, rho, inverse_rho, m, n, changed)    one thread a scope
//     D <- project(B + V / rho), V <- V + rho (B - D)
//   project_mask(B, mask, m, n, changed)                              one thread a scope
//     mask <- that of project(B)
//   right_side(D, V, G, B, rho, out, size)                                 one thread an element
//     out <- rho D - V + G, or rho (D - B) - V + G where B is not null
//
//     B, V, D, G, out   REAL, (m r, n c)
//     mask              bool, (m r, n c), true = kept
//     changed           one number, to which the mask's changed elements are added
//
// A scope keeps the blocks with the largest sum of squares. Macros: those of scope.cuh, and THREADS.
#include "scope.cuh"

#ifdef N_BLOCKS
// The blocks of a scope to prune, as bits.
__device__ __forceinline__ unsigned project(const REAL (&x)[ROWS][PLACES]) {
    REAL score[N_BLOCKS];
#pragma unroll
    for (int b = 0; b < N_BLOCKS; b++) score[b] = 0;
#pragma unroll
    for (int q = 0; q < ROWS; q++) {
#pragma unroll
        for (int i = 0; i < PLACES; i++)
            score[BLOCK_OF[q * PLACES + i]] += x[q][i] * x[q][i];
    }
    return prune_lowest(score);
}

__device__ __forceinline__ bool is_kept(const unsigned pruned, const int q, const int i) {
    return !(pruned >> BLOCK_OF[q * PLACES + i] & 1);
}

// Store a scope's mask; returns how many of its elements differ from what was there.
__device__ __forceinline__ int replace_mask(bool* mask, const long long first,
                                            const long long row, const unsigned pruned) {
    int changed = 0;
#pragma unroll
    for (int q = 0; q < ROWS; q++) {
        bool kept[PLACES];
        load(mask + first + q * row, kept);
#pragma unroll
        for (int i = 0; i < PLACES; i++) {
            changed += kept[i] != is_kept(pruned, q, i);
            kept[i] = is_kept(pruned, q, i);
        }
        store(mask + first + q * row, kept);
    }
    return changed;
}

__device__ __forceinline__ void add_to(unsigned long long* total, int count) {
    for (int offset = 16; offset; offset /= 2)
        count += __shfl_down_sync(0xffffffffu, count, offset);
    if (threadIdx.x == 0 && count) atomicAdd(total, (unsigned long long)count);
}

extern "C" __global__ void __launch_bounds__(THREADS)
project_update(const REAL* __restrict__ B, REAL* __restrict__ V, REAL* __restrict__ D,
               bool* __restrict__ mask, const REAL rho, const REAL inverse_rho, const int m,
               const int n, unsigned long long* changed) {
    const int g = blockIdx.x * blockDim.x + threadIdx.x;
    const long long row = n * (long long)PLACES;
    int count = 0;
    for (int group = blockIdx.y * blockDim.y + threadIdx.y; g < n && group < m;
         group += gridDim.y * blockDim.y) {
        const long long first = group * ROWS * row + g * PLACES;
        REAL x[ROWS][PLACES];
#pragma unroll
        for (int q = 0; q < ROWS; q++) {
            REAL b[PLACES];
            load(B + first + q * row, b);
            load(V + first + q * row, x[q]);
#pragma unroll
            for (int i = 0; i < PLACES; i++) x[q][i] = x[q][i] * inverse_rho + b[i];
        }
        const unsigned pruned = project(x);
        count += replace_mask(mask, first, row, pruned);
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
    }
    add_to(changed, count);
}

extern "C" __global__ void __launch_bounds__(THREADS)
project_mask(const REAL* __restrict__ B, bool* __restrict__ mask, const int m, const int n,
             unsigned long long* changed) {
    const int g = blockIdx.x * blockDim.x + threadIdx.x;
    const long long row = n * (long long)PLACES;
    int count = 0;
    for (int group = blockIdx.y * blockDim.y + threadIdx.y; g < n && group < m;
         group += gridDim.y * blockDim.y) {
        const long long first = group * ROWS * row + g * PLACES;
        REAL x[ROWS][PLACES];
#pragma unroll
        for (int q = 0; q < ROWS; q++) load(B + first + q * row, x[q]);
        count += replace_mask(mask, first, row, project(x));
    }
    add_to(changed, count);
}

#else
extern "C" __global__ void __launch_bounds__(THREADS)
right_side(const REAL* __restrict__ D, const REAL* __restrict__ V, const REAL* __restrict__ G,
           const REAL* __restrict__ B, const REAL rho, REAL* __restrict__ out,
           const long long size) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < size;
         i += gridDim.x * (long long)blockDim.x)
        out[i] = rho * (B ? D[i] - B[i] : D[i]) - V[i] + G[i];
}
#endif
