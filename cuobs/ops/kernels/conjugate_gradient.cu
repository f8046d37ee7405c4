// One step of conjugate gradients on the kept columns of every row, one block a row, after the
// product Q = P A. Rows that have converged are left as they are.
//
//   cg_step(Q, inverse_diagonal, mask, X, residual, P, rz, limit, gained, K)
//     Q, X, residual, P   REAL, (M, K); P and residual are 0 outside the mask
//     inverse_diagonal    REAL, (K,)
//     mask                bool, (M, K), true = kept
//     rz, limit           REAL, (M,): residual' Z by row with Z = residual / diag(A), and where to stop
//     gained              REAL, (M,): raised by what the step takes off a row's energy
//
// Macros: REAL; ITEMS, columns a thread holds: THREADS * ITEMS >= K.

constexpr int THREADS = 512;

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

extern "C" __global__ void __launch_bounds__(THREADS, 2)
cg_step(const REAL* __restrict__ Q, const REAL* __restrict__ inverse_diagonal,
        const bool* __restrict__ mask, REAL* __restrict__ X, REAL* __restrict__ residual,
        REAL* __restrict__ P, REAL* __restrict__ rz, const REAL* __restrict__ limit,
        REAL* __restrict__ gained, const int K) {
    const REAL before = rz[blockIdx.x];
    if (before <= limit[blockIdx.x]) return;
    const long long row = blockIdx.x * (long long)K;
    REAL p[ITEMS], q[ITEMS], curvature = 0;
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        const int j = n * THREADS + threadIdx.x;
        p[n] = j < K ? P[row + j] : REAL(0);
        q[n] = j < K ? Q[row + j] : REAL(0);
        curvature += p[n] * q[n];
    }
    curvature = block_sum(curvature);
    const REAL step = before / (curvature > 0 ? curvature : REAL(1));
    REAL after = 0;
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        const int j = n * THREADS + threadIdx.x;
        if (j < K) {
            X[row + j] += step * p[n];
            const REAL r = mask[row + j] ? residual[row + j] - step * q[n] : REAL(0);
            residual[row + j] = r;
            q[n] = r * inverse_diagonal[j];
            after += r * q[n];
        }
    }
    after = block_sum(after);
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        const int j = n * THREADS + threadIdx.x;
        if (j < K) P[row + j] = q[n] + after / before * p[n];
    }
    if (threadIdx.x == 0) {
        rz[blockIdx.x] = after;
        gained[blockIdx.x] += step * before;
    }
}
