// Sums over arrays, in an order that does not change from run to run.
//
//   row_inner(A, row_A, B, row_B, out, K)   a block a row: out[i] += sum of A_ij B_ij, j < K
//     A, B   REAL, rows so many elements apart
//     out    double, (M,)
//   add_up(parts, n, out)                   one block: *out += parts[0] + ... + parts[n - 1]
//     parts  double, (n,)
//   count_true(mask, size, count)           any blocks: *count += bytes of the mask that are not 0
//
// Macros: REAL; THREADS of a block.

// The sum of a value over the block, in its first thread.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
    __shared__ T part[THREADS / 32];
    for (int offset = 16; offset; offset /= 2)
        value += __shfl_down_sync(0xffffffffu, value, offset);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
    __syncthreads();
    for (int i = 1; i < THREADS / 32 && threadIdx.x == 0; i++) value += part[i];
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS)
row_inner(const REAL* __restrict__ A, const long long row_A, const REAL* __restrict__ B,
          const long long row_B, double* __restrict__ out, const int K) {
    const REAL* const a = A + blockIdx.x * row_A;
    const REAL* const b = B + blockIdx.x * row_B;
    double sum = 0;
    for (int j = threadIdx.x; j < K; j += THREADS) {
        const REAL product = a[j] * b[j];
        sum += product;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] += sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_up(const double* __restrict__ parts, const int n, double* __restrict__ out) {
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) sum += parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out += sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
count_true(const unsigned char* __restrict__ mask, const long long size,
           unsigned long long* __restrict__ count) {
    long long own = 0;
    const long long step = gridDim.x * (long long)THREADS;
    for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < size; i += step)
        own += mask[i] != 0;
    own = block_sum(own);
    if (threadIdx.x == 0 && own) atomicAdd(count, (unsigned long long)own);
}
