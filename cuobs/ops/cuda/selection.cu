// Mask selection: the cheapest candidate mask of each scope, one thread a scope.
//
//   select(w, its 4 strides, C, its 5 strides, m, n, blocks, mask, mask_row, best, gap)
//     w       REAL, (c, m, r, n): weights by place, row group, row and column group
//     C       REAL, (c, c, m, r, n): diagonal blocks of the inverse Hessian, with strides of 0
//             where rows share one
//     blocks  bool, (N_BLOCKS, m, n), true = pruned, or null
//     mask    bool, (m r, n c) with rows mask_row elements apart, true = kept, or null
//     best, gap   REAL, (m, n): the winner's cost, what the second costs more, or null
//
// The diagonal blocks of U'U, U upper triangular, of c columns each: partial sums over slices of
// the rows of U.
//
//   factor_scope_blocks(U, row, K, out)
//     U    REAL, (K, K), rows `row` elements apart
//     out  REAL, (slices, c, c, n)
//   LANES x DEPTH threads: a lane holds a scope, DEPTH rows of threads share a slice's rows.
//
// factor_scope_blocks takes REAL, PLACES, LANES and DEPTH alone. Macros of select, beside those of
// scope.cuh:
//   THREADS
//   N_CANDIDATES
//   PRUNED      {places that candidate n prunes in row q, as bits}, candidate by candidate
//   CHOICE      {blocks that candidate n prunes, as bits}
//   ENUMERATED  1: a candidate is a whole mask; 0: each is one block, the cheapest are taken
#include "scope.cuh"

constexpr int PAIRS = PLACES * (PLACES + 1) / 2;

#ifdef N_CANDIDATES
// The two lowest costs so far, and what the lowest prunes.
struct Winner {
    REAL lowest, second;
    unsigned pruned;

    __device__ __forceinline__ void consider(const REAL cost, const unsigned choice) {
        const bool wins = cost < lowest;
        second = wins ? lowest : cost < second ? cost : second;
        lowest = wins ? cost : lowest;
        pruned = wins ? choice : pruned;
    }
};

// Add the cost w_P (C_PP)^-1 w_P' of every candidate to cost[], and after the last row compare
// them. Candidates come in lexicographic order: each shares the factor of its places before the
// first in which it differs from the last candidate.
template <int ROW>
__device__ __forceinline__ void add_costs(const REAL (&w)[PLACES], const REAL (&C)[PAIRS],
                                          REAL (&cost)[N_CANDIDATES], Winner& winner) {
    REAL unit[PLACES][PLACES], inverse_pivot[PLACES], value[PLACES], sum[PLACES];
    auto add = [&](auto index) {
        constexpr int n = decltype(index)::value;
        constexpr unsigned pruned[N_CANDIDATES * ROWS] = PRUNED, choice[N_CANDIDATES] = CHOICE;
        constexpr unsigned set = pruned[n * ROWS + ROW];
        constexpr unsigned changed = n ? set ^ pruned[(n ? n - 1 : 0) * ROWS + ROW] : set;
        constexpr unsigned first = changed & (~changed + 1);
        REAL total = 0;
#pragma unroll
        for (int i = 0; i < PLACES; i++) {
            if (!(set >> i & 1)) continue;
            if (first && (1u << i) >= first) {
                REAL scaled[PLACES];
                REAL pivot = C[i * (i + 1) / 2 + i];
                value[i] = w[i];
#pragma unroll
                for (int j = 0; j < i; j++) {
                    if (!(set >> j & 1)) continue;
                    scaled[j] = C[i * (i + 1) / 2 + j];
#pragma unroll
                    for (int k = 0; k < j; k++) {
                        if (set >> k & 1) scaled[j] -= scaled[k] * unit[j][k];
                    }
                    unit[i][j] = scaled[j] * inverse_pivot[j];
                    pivot -= scaled[j] * unit[i][j];
                    value[i] -= unit[i][j] * value[j];
                }
                inverse_pivot[i] = 1 / pivot;
                sum[i] = total + value[i] * value[i] * inverse_pivot[i];
            }
            total = sum[i];
        }
        cost[n] += total;
        if constexpr (ROW == ROWS - 1) winner.consider(cost[n], choice[n]);
    };
    for_each<0, N_CANDIDATES>(add);
}

extern "C" __global__ void __launch_bounds__(THREADS)
select(const REAL* __restrict__ w, const long long w_place, const long long w_group,
       const long long w_row, const long long w_scope, const REAL* __restrict__ C,
       const long long C_i, const long long C_j, const long long C_group, const long long C_row,
       const long long C_scope, const int m, const int n, bool* __restrict__ blocks,
       bool* __restrict__ mask, const long long mask_row, REAL* __restrict__ best,
       REAL* __restrict__ gap) {
    const int g = blockIdx.x * blockDim.x + threadIdx.x;
    if (g >= n) return;
    for (int group = blockIdx.y * blockDim.y + threadIdx.y; group < m;
         group += gridDim.y * blockDim.y) {
        const REAL infinity = __int_as_float(0x7f800000);
        // Where all costs are NaN, the first candidate is taken, as on the CPU.
        constexpr unsigned choice[N_CANDIDATES] = CHOICE;
        Winner winner = {infinity, infinity, choice[0]};
        REAL cost[N_CANDIDATES];
#pragma unroll
        for (int i = 0; i < N_CANDIDATES; i++) cost[i] = 0;
        auto add_row = [&](auto index) {
            constexpr int row = decltype(index)::value;
            REAL v[PLACES], block[PAIRS];
            const REAL* w_scoped = w + group * w_group + row * w_row + g * w_scope;
            const REAL* C_scoped = C + group * C_group + row * C_row + g * C_scope;
#pragma unroll
            for (int i = 0; i < PLACES; i++) {
                v[i] = w_scoped[i * w_place];
#pragma unroll
                for (int j = 0; j <= i; j++)
                    block[i * (i + 1) / 2 + j] = C_scoped[i * C_i + j * C_j];
            }
            add_costs<row>(v, block, cost, winner);
        };
        for_each<0, ROWS>(add_row);

#if ENUMERATED
        const REAL margin = winner.second - winner.lowest;
#else
        // Each candidate is one block; the cheapest go together.
        winner = {0, infinity, prune_lowest(cost)};
        REAL dearest = -infinity;
#pragma unroll
        for (int i = 0; i < N_CANDIDATES; i++) {
            if (winner.pruned >> i & 1) {
                winner.lowest += cost[i];
                dearest = cost[i] > dearest ? cost[i] : dearest;
            } else {
                winner.second = cost[i] < winner.second ? cost[i] : winner.second;
            }
        }
        const REAL margin = winner.second - dearest;
#endif
        const long long scope = (long long)group * n + g;
        if (best) best[scope] = winner.lowest;
        if (gap) gap[scope] = margin;
        if (blocks) {
#pragma unroll
            for (int b = 0; b < N_BLOCKS; b++)
                blocks[b * (long long)m * n + scope] = winner.pruned >> b & 1;
        }
        if (mask) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                bool kept[PLACES];
#pragma unroll
                for (int i = 0; i < PLACES; i++)
                    kept[i] = !(winner.pruned >> BLOCK_OF[row * PLACES + i] & 1);
                store_in_row(mask + (group * (long long)ROWS + row) * mask_row + g * (long long)PLACES,
                             mask_row, kept);
            }
        }
    }
}

#else
extern "C" __global__ void __launch_bounds__(LANES * DEPTH)
factor_scope_blocks(const REAL* __restrict__ U, const long long row, const int K,
                    REAL* __restrict__ out) {
    __shared__ REAL part[DEPTH][LANES];
    const int n = K / PLACES;
    const int g = blockIdx.x * LANES + threadIdx.x;
    const int begin = blockIdx.y * (long long)K / gridDim.y;
    const int end = (blockIdx.y + 1) * (long long)K / gridDim.y;
    REAL sum[PAIRS];
#pragma unroll
    for (int e = 0; e < PAIRS; e++) sum[e] = 0;
    if (g < n) {
        // Below its last diagonal element a scope's columns are 0.
        for (int k = begin + threadIdx.y; k < min(end, (g + 1) * PLACES); k += DEPTH) {
            REAL u[PLACES];
            load(U + k * row + g * PLACES, u);
#pragma unroll
            for (int i = 0; i < PLACES; i++) {
#pragma unroll
                for (int j = 0; j <= i; j++) sum[i * (i + 1) / 2 + j] += u[i] * u[j];
            }
        }
    }
    REAL* const target = out + blockIdx.y * (long long)PLACES * PLACES * n;
#pragma unroll
    for (int i = 0; i < PLACES; i++) {
#pragma unroll
        for (int j = 0; j <= i; j++) {
            part[threadIdx.y][threadIdx.x] = sum[i * (i + 1) / 2 + j];
            __syncthreads();
            if (threadIdx.y == 0 && g < n) {
                REAL total = 0;
                for (int d = 0; d < DEPTH; d++) total += part[d][threadIdx.x];
                target[(i * PLACES + j) * (long long)n + g] = total;
                target[(j * PLACES + i) * (long long)n + g] = total;
            }
            __syncthreads();
        }
    }
}
#endif
