// The lower triangle of a symmetric matrix from its upper one, tile by tile, through shared memory.
//
//   mirror_upper(A, row, K)   A REAL, (K, K), rows `row` elements apart; TILE x any threads a tile
//
// Macros: REAL; TILE, the order of a tile.

extern "C" __global__ void mirror_upper(REAL* A, const long long row, const int K) {
    __shared__ REAL tile[TILE][TILE + 1];
    if (blockIdx.x < blockIdx.y) return;
    const int i0 = blockIdx.y * TILE, j0 = blockIdx.x * TILE;
    for (int k = threadIdx.y; k < TILE; k += blockDim.y) {
        const int i = i0 + k, j = j0 + threadIdx.x;
        if (i < K && j < K) tile[k][threadIdx.x] = A[i * row + j];
    }
    __syncthreads();
    for (int k = threadIdx.y; k < TILE; k += blockDim.y) {
        const int i = j0 + k, j = i0 + threadIdx.x;
        if (i < K && j < i) A[i * row + j] = tile[threadIdx.x][k];
    }
}
