// Conjugate gradients on the kept columns of every row, one block a row: what they begin with, and a
// step, after the product Q = P A. Rows that have converged are left as they are; a row in which the
// curvature P·Q is not positive has come as far as the digits go, and ends.
//
//   cg_start(B, mask, start, scale, at_least, least, residual, X, P, rr, limit, K)
//     B, start, at_least   REAL: the residual and X of columns as they are, the latter may be null,
//                          and the limit before it is raised to `least`
//     scale                REAL, (K,): the root of the diagonal of A
//     residual, X, P, rr, limit   as below
//   cg_step(Q, mask, X, residual, P, rr, limit, gained, K)
//     Q, X, residual   REAL, (M, K); the residual is 0 outside the mask
//     P                OPERAND, (M, K): the direction, by the root mean square of the residual
//     mask             bool, (M, K), true = kept
//     rr, limit        REAL, (M,): the squared norm of each row's residual, and where to stop
//     gained           REAL, (M,): raised by what the step takes off a row's energy
//
// Macros: REAL; OPERAND, __half or REAL; THREADS; WIDTH, neighbours that a thread takes at once, which
// divides K; ITEMS, how many times: THREADS * WIDTH * ITEMS >= K.
#include <cuda_fp16.h>

#include "scope.cuh"

// The sum of a value over the block, in every thread.
__device__ __forceinline__ REAL block_sum(REAL value) {
    __shared__ REAL part[THREADS / 32];
    for (int offset = 16; offset; offset /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < THREADS / 32; i++) value += part[i];
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS)
cg_start(const REAL* __restrict__ B, const bool* __restrict__ mask, const REAL* __restrict__ start,
         const REAL* __restrict__ scale, const REAL* __restrict__ at_least, const REAL least,
         REAL* __restrict__ residual, REAL* __restrict__ X, OPERAND* __restrict__ P,
         REAL* __restrict__ rr, REAL* __restrict__ limit, const int K) {
    const long long row = blockIdx.x * (long long)K;
    REAL squares = 0;
    for (int j = threadIdx.x; j < K; j += THREADS) {
        const bool kept = mask[row + j];
        const REAL r = kept ? B[row + j] / scale[j] : REAL(0);
        residual[row + j] = r;
        X[row + j] = kept && start ? start[row + j] * scale[j] : REAL(0);
        squares += r * r;
    }
    squares = block_sum(squares);
    const REAL enough = fmax(at_least[blockIdx.x], least);
    const REAL unit = sqrt(K / (squares > enough ? squares : REAL(1)));
    for (int j = threadIdx.x; j < K; j += THREADS)
        P[row + j] = OPERAND(residual[row + j] * unit);
    if (threadIdx.x == 0) {
        rr[blockIdx.x] = squares;
        limit[blockIdx.x] = enough;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, ITEMS * WIDTH * sizeof(REAL) <= 96 ? 2 : 1)
cg_step(const REAL* __restrict__ Q, const bool* __restrict__ mask, REAL* __restrict__ X,
        REAL* __restrict__ residual, OPERAND* __restrict__ P, REAL* __restrict__ rr,
        const REAL* __restrict__ limit, REAL* __restrict__ gained, const int K) {
    const REAL before = rr[blockIdx.x];
    if (before <= limit[blockIdx.x]) return;
    const long long row = blockIdx.x * (long long)K;
    REAL p[ITEMS][WIDTH], r[ITEMS][WIDTH], curvature = 0;
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        const int j = (n * THREADS + threadIdx.x) * WIDTH;
        OPERAND rounded[WIDTH];
        bool kept[WIDTH];
        if (j < K) {
            load(P + row + j, rounded);
            load(mask + row + j, kept);
            load(Q + row + j, r[n]);
        }
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            p[n][i] = j < K ? REAL(rounded[i]) : REAL(0);
            r[n][i] = j < K && kept[i] ? r[n][i] : REAL(0);
            curvature += p[n][i] * r[n][i];
        }
    }
    curvature = block_sum(curvature);
    if (!(curvature > 0)) {
        if (threadIdx.x == 0) rr[blockIdx.x] = 0;
        return;
    }
    const REAL step = sqrt(K * before) / curvature;
    REAL after = 0;
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        const int j = (n * THREADS + threadIdx.x) * WIDTH;
        if (j >= K) break;
        REAL x[WIDTH], left[WIDTH];
        load(X + row + j, x);
        load(residual + row + j, left);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            x[i] += step * p[n][i];
            r[n][i] = left[i] - step * r[n][i];
            after += r[n][i] * r[n][i];
        }
        store(X + row + j, x);
        store(residual + row + j, r[n]);
    }
    after = block_sum(after);
    const REAL unit = after > 0 ? sqrt(K / after) : REAL(0), momentum = sqrt(after / before);
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        const int j = (n * THREADS + threadIdx.x) * WIDTH;
        if (j >= K) break;
        OPERAND rounded[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) rounded[i] = OPERAND(unit * r[n][i] + momentum * p[n][i]);
        store(P + row + j, rounded);
    }
    if (threadIdx.x == 0) {
        rr[blockIdx.x] = after;
        gained[blockIdx.x] += step * sqrt(K * before);
    }
}
