// The diagonal blocks of U'U, U upper triangular, of c columns each: partial sums over slices of
// the rows of U.
//
//   factor_scope_blocks(U, row, K, out)
//     U    REAL, (K, K), rows `row` elements apart
//     out  REAL, (slices, c, c, G)
//   32 x 8 threads: a lane holds a scope, the 8 warps share a slice's rows.
//
// Macros: REAL, PLACES (columns c of a scope).
#include "scope.cuh"

constexpr int PAIRS = PLACES * (PLACES + 1) / 2;
constexpr int DEPTH = 8;

extern "C" __global__ void __launch_bounds__(32 * DEPTH)
factor_scope_blocks(const REAL* __restrict__ U, const long long row, const int K,
                    REAL* __restrict__ out) {
    __shared__ REAL part[DEPTH][32];
    const int G = K / PLACES;
    const int g = blockIdx.x * 32 + threadIdx.x;
    const int begin = blockIdx.y * (long long)K / gridDim.y;
    const int end = (blockIdx.y + 1) * (long long)K / gridDim.y;
    REAL sum[PAIRS];
#pragma unroll
    for (int n = 0; n < PAIRS; n++) sum[n] = 0;
    if (g < G) {
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
    REAL* const target = out + blockIdx.y * (long long)PLACES * PLACES * G;
#pragma unroll
    for (int i = 0; i < PLACES; i++) {
#pragma unroll
        for (int j = 0; j <= i; j++) {
            part[threadIdx.y][threadIdx.x] = sum[i * (i + 1) / 2 + j];
            __syncthreads();
            if (threadIdx.y == 0 && g < G) {
                REAL total = 0;
                for (int d = 0; d < DEPTH; d++) total += part[d][threadIdx.x];
                target[(i * PLACES + j) * (long long)G + g] = total;
                target[(j * PLACES + i) * (long long)G + g] = total;
            }
            __syncthreads();
        }
    }
}
