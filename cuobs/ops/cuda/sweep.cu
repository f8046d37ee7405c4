// Left-to-right sweeps over the scopes of a block of n columns, one warp a row group. All lanes
// find the same decisions for a scope; each then updates its share of the columns to the right.
//
//   sparsegpt_block(W, W_row, S, S_row, F, F_row, scale, mask, mask_row, groups, n)
//     W      REAL, (groups r, n): the target
//     S      REAL, (groups r, n): compensation from the left of the block; the deviations on exit
//     F      REAL, (n, n): the block of R / diag(R), unit upper triangular
//     scale  REAL, (n,): diag(R)^2
//     mask   bool, (groups r, n): on exit, true = kept
//
//   solve_scopes(W, W_row, C, C_row, mask, mask_row, M, n)
//     W      REAL, (M, n): weights; on exit the multipliers λ, 0 where kept
//     C      REAL, (n, n): the inverse Hessian, frozen
//     mask   bool, (M, n), true = kept
//
// X_row is the distance between rows of X in elements. n is a multiple of c.
// Shared memory: n (n + c) / 2 elements of F or C, see `at`; then for each warp its rows of REAL
// (sparsegpt_block: w and s of r rows; solve_scopes: w) and n / c words.
//
// Macros, beside those of scope.cuh: WARPS in a block, threads WARP of one. solve_scopes needs REAL,
// PLACES, WARPS and WARP alone.
#include "scope.cuh"
#include "masked_solve.cuh"

extern __shared__ __align__(16) unsigned char shared[];

// Of scope t's rows of a matrix only the columns from its own first on are held: where they begin.
__device__ __forceinline__ int at(const int t, const int n) {
    return PLACES * (n * t - PLACES * (t * (t - 1) / 2));
}

__device__ __forceinline__ void load_upper(REAL* held, const REAL* __restrict__ A,
                                           const long long A_row, const int n) {
    for (int i = threadIdx.y; i < n; i += WARPS) {
        const int t = i / PLACES, first = t * PLACES;
        REAL* row = held + at(t, n) + (i - first) * (n - first) - first;
        for (int j = first + threadIdx.x; j < n; j += WARP) row[j] = A[i * A_row + j];
    }
}

#ifdef N_BLOCKS
extern "C" __global__ void __launch_bounds__(WARP * WARPS)
sparsegpt_block(const REAL* __restrict__ W, const long long W_row, REAL* S, const long long S_row,
                const REAL* __restrict__ F, const long long F_row, const REAL* __restrict__ scale,
                bool* __restrict__ mask, const long long mask_row, const int groups,
                const int n) {
    REAL* const factor = reinterpret_cast<REAL*>(shared);
    REAL* const w = factor + n * (n + PLACES) / 2 + threadIdx.y * 2 * ROWS * n;
    REAL* const s = w + ROWS * n;
    unsigned* const chosen =
        reinterpret_cast<unsigned*>(factor + n * (n + PLACES) / 2 + WARPS * 2 * ROWS * n) +
        threadIdx.y * (n / PLACES);
    const int group = blockIdx.x * WARPS + threadIdx.y, lane = threadIdx.x;
    const long long row = group * (long long)ROWS;

    load_upper(factor, F, F_row, n);
    if (group < groups) {
        for (int q = 0; q < ROWS; q++) {
            for (int j = lane; j < n; j += WARP) {
                w[q * n + j] = W[(row + q) * W_row + j];
                s[q * n + j] = S[(row + q) * S_row + j];
            }
        }
    }
    __syncthreads();
    if (group >= groups) return;

    for (int t = 0; t < n / PLACES; t++) {
        const int a = t * PLACES, width = n - a;
        const REAL* f = factor + at(t, n);
        REAL target[ROWS][PLACES], e[ROWS][PLACES], score[N_BLOCKS];
#pragma unroll
        for (int b = 0; b < N_BLOCKS; b++) score[b] = 0;
#pragma unroll
        for (int q = 0; q < ROWS; q++) {
            // The values that the columns have when all before them are kept.
            REAL kept[PLACES];
#pragma unroll
            for (int i = 0; i < PLACES; i++) {
                target[q][i] = w[q * n + a + i];
                e[q][i] = kept[i] = s[q * n + a + i];
#pragma unroll
                for (int j = 0; j < i; j++) kept[i] -= f[j * width + i] * kept[j];
                const REAL value = target[q][i] + kept[i];
                score[BLOCK_OF[q * PLACES + i]] += value * value * scale[a + i];
            }
        }
        const unsigned pruned = prune_lowest(score);
#pragma unroll
        for (int q = 0; q < ROWS; q++) {
#pragma unroll
            for (int i = 0; i < PLACES; i++) {
#pragma unroll
                for (int j = 0; j < i; j++) e[q][i] += f[j * width + i] * e[q][j];
                e[q][i] = pruned >> BLOCK_OF[q * PLACES + i] & 1 ? target[q][i] : -e[q][i];
            }
        }
        __syncwarp();
        if (lane == 0) {
            chosen[t] = pruned;
#pragma unroll
            for (int q = 0; q < ROWS; q++) {
#pragma unroll
                for (int i = 0; i < PLACES; i++) s[q * n + a + i] = e[q][i];
            }
        }
        for (int j = PLACES + lane; j < width; j += WARP) {
            REAL step[ROWS];
#pragma unroll
            for (int q = 0; q < ROWS; q++) step[q] = s[q * n + a + j];
#pragma unroll
            for (int i = 0; i < PLACES; i++) {
                const REAL factor_ij = f[i * width + j];
#pragma unroll
                for (int q = 0; q < ROWS; q++) step[q] += factor_ij * e[q][i];
            }
#pragma unroll
            for (int q = 0; q < ROWS; q++) s[q * n + a + j] = step[q];
        }
        __syncwarp();
    }
    for (int q = 0; q < ROWS; q++) {
        for (int j = lane; j < n; j += WARP) {
            S[(row + q) * S_row + j] = s[q * n + j];
            mask[(row + q) * mask_row + j] =
                !(chosen[j / PLACES] >> BLOCK_OF[q * PLACES + j % PLACES] & 1);
        }
    }
}

#else
extern "C" __global__ void __launch_bounds__(WARP * WARPS)
solve_scopes(REAL* W, const long long W_row, const REAL* __restrict__ C, const long long C_row,
                const bool* __restrict__ mask, const long long mask_row, const int M,
                const int n) {
    REAL* const inverse = reinterpret_cast<REAL*>(shared);
    REAL* const w = inverse + n * (n + PLACES) / 2 + threadIdx.y * n;
    unsigned* const pruned =
        reinterpret_cast<unsigned*>(inverse + n * (n + PLACES) / 2 + WARPS * n) +
        threadIdx.y * (n / PLACES);
    const long long row = blockIdx.x * (long long)WARPS + threadIdx.y;
    const int lane = threadIdx.x;

    load_upper(inverse, C, C_row, n);
    if (row < M) {
        for (int j = lane; j < n; j += WARP) w[j] = W[row * W_row + j];
        for (int t = lane; t < n / PLACES; t += WARP) {
            bool kept[PLACES];
            load_in_row(mask + row * mask_row + t * PLACES, mask_row, kept);
            unsigned set = 0;
#pragma unroll
            for (int i = 0; i < PLACES; i++) set |= unsigned(!kept[i]) << i;
            pruned[t] = set;
        }
    }
    __syncthreads();
    if (row >= M) return;

    for (int t = 0; t < n / PLACES; t++) {
        const int a = t * PLACES, width = n - a;
        const REAL* c = inverse + at(t, n);
        const auto entry = [&](int i, int j) { return c[j * width + i]; };
        REAL multiplier[PLACES];
#pragma unroll
        for (int i = 0; i < PLACES; i++) multiplier[i] = w[a + i];
        masked_solve(entry, pruned[t], multiplier);
        __syncwarp();
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < PLACES; i++) w[a + i] = multiplier[i];
        }
        for (int j = PLACES + lane; j < width; j += WARP) {
            REAL step = w[a + j];
#pragma unroll
            for (int i = 0; i < PLACES; i++) step -= c[i * width + j] * multiplier[i];
            w[a + j] = step;
        }
        __syncwarp();
    }
    for (int j = lane; j < n; j += WARP) W[row * W_row + j] = w[j];
}
#endif
