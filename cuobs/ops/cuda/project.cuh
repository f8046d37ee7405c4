// The projection of a scope onto its pattern: the blocks with the largest sum of squares stay.
//
// Macros: those of scope.cuh.
#include "scope.cuh"

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

// Call scope(first, row), the offset of a scope's first element and of one row to the next, on the
// scopes of this thread; the elements that it counts are added to `changed`.
template <class Scope>
__device__ __forceinline__ void each_scope(const int m, const int n, unsigned long long* changed,
                                           const Scope scope) {
    const int g = blockIdx.x * blockDim.x + threadIdx.x;
    const long long row = n * (long long)PLACES;
    int count = 0;
    for (int group = blockIdx.y * blockDim.y + threadIdx.y; g < n && group < m;
         group += gridDim.y * blockDim.y)
        count += scope(group * ROWS * row + g * PLACES, row);
    add_to(changed, count);
}
