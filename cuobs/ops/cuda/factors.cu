// Around Cholesky factorisations. A tile of one, or of a triangular inverse, in registers: a block
// of threads a matrix, SIDE x SIDE threads with E x E elements each, every SIDE-th row and column.
//
//   factor_inverse(A, its strides, n, first, info)
//     A     REAL, (B, n, n), n <= TILE: the lower triangle is read; L^-1 of A = L L' replaces it,
//           with zeros above
//     info  int, (B,): where 0, first + 1 + k if pivot k is not positive
//   triangular_inverse(L, its strides, n)
//     L     REAL, (B, n, n), n <= TILE: lower triangular, replaced by its inverse
//
// And what cuSOLVER leaves, put right:
//   reverse_transpose(U, R, n)    TRANSPOSED x any threads a tile
//     U, R  REAL, (n, n): R is the upper triangle of U' with rows and columns in reverse order
//
// Macros: REAL; FACTOR, whether the tile is factored too, SIDE, and TILE, a multiple of SIDE; or in
// their place TRANSPOSED, the order of a tile. A program holds one kernel: the first two take a
// compiler most of a second each, and few callers need both.

#ifndef TRANSPOSED
constexpr int E = TILE / SIDE;

// Gauss-Jordan without pivoting on [A | I], kept in one place: column k of A makes room for column
// k of the inverse. Step k scales row k and takes multiples of it from the rows below. FACTOR does
// so on a symmetric A, of which row k right of the diagonal is column k below it, and else on a
// triangle. Tiles of SIDE x SIDE above the diagonal are not touched before the end.
__device__ __forceinline__ void invert(REAL* A, const long long row, const long long column,
                                       const int n, const int first, int* info) {
    __shared__ REAL across[2][TILE], down[2][TILE];
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    REAL a[E][E];
#pragma unroll
    for (int i = 0; i < E; i++) {
#pragma unroll
        for (int j = 0; j <= i; j++) {
            const int y = ty + SIDE * i, x = tx + SIDE * j;
            a[i][j] = x == y;
            if (y < n && x < n) {
                if (x <= y) a[i][j] = A[y * row + x * column];
                else a[i][j] = FACTOR ? A[x * row + y * column] : REAL(0);
            }
        }
    }
#pragma unroll
    for (int block = 0; block < E; block++) {
        for (int part = 0; part < SIDE; part++) {
            const int k = SIDE * block + part;
            if (k >= n) break;
            // Two copies: the next step writes one while this one may still be read.
            REAL* const row_k = across[k % 2];
            REAL* const column_k = down[k % 2];
            if (ty == part) {
#pragma unroll
                for (int j = 0; j <= block; j++) row_k[tx + SIDE * j] = a[block][j];
            }
            if (tx == part) {
#pragma unroll
                for (int i = block; i < E; i++) column_k[ty + SIDE * i] = a[i][block];
            }
            __syncthreads();
            const REAL pivot = row_k[k];
            const REAL scale = FACTOR ? rsqrt(pivot) : 1 / pivot;
            if (FACTOR && threadIdx.x == 0 && !(pivot > 0) && !*info) *info = first + k + 1;
            REAL v[E];
#pragma unroll
            for (int j = 0; j <= block; j++) {
                const int x = tx + SIDE * j;
                v[j] = x == k ? scale : FACTOR || x < k ? row_k[x] * scale : REAL(0);
            }
#pragma unroll
            for (int j = block + 1; j < E && FACTOR; j++) v[j] = column_k[tx + SIDE * j] * scale;
#pragma unroll
            for (int i = block; i < E; i++) {
                const int y = ty + SIDE * i;
                if (y > k) {
                    const REAL l = FACTOR ? column_k[y] * scale : column_k[y];
                    if (tx == part) a[i][block] = 0;
#pragma unroll
                    for (int j = 0; j <= (FACTOR ? i : block); j++) a[i][j] -= l * v[j];
                } else if (y == k) {
#pragma unroll
                    for (int j = 0; j <= block; j++) a[i][j] = v[j];
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < E; i++) {
#pragma unroll
        for (int j = 0; j < (FACTOR ? E : i + 1); j++) {
            const int y = ty + SIDE * i, x = tx + SIDE * j;
            if (y < n && x < n && (FACTOR || x <= y))
                A[y * row + x * column] = j <= i && x <= y ? a[i][j] : REAL(0);
        }
    }
}

#if FACTOR
extern "C" __global__ void __launch_bounds__(SIDE * SIDE)
factor_inverse(REAL* A, const long long matrix, const long long row, const long long column,
               const int n, const int first, int* info) {
    invert(A + blockIdx.x * matrix, row, column, n, first, info + blockIdx.x);
}
#else
extern "C" __global__ void __launch_bounds__(SIDE * SIDE)
triangular_inverse(REAL* L, const long long matrix, const long long row, const long long column,
                   const int n) {
    invert(L + blockIdx.x * matrix, row, column, n, 0, nullptr);
}
#endif

#else
extern "C" __global__ void
reverse_transpose(const REAL* __restrict__ U, REAL* __restrict__ R, const int n) {
    __shared__ REAL tile[TRANSPOSED][TRANSPOSED + 1];
    const int i0 = blockIdx.y * TRANSPOSED, j0 = blockIdx.x * TRANSPOSED;
    // R_ij is U' at (n - 1 - i, n - 1 - j): rows of U are columns of R.
    for (int k = threadIdx.y; k < TRANSPOSED && j0 + TRANSPOSED > i0; k += blockDim.y) {
        const int i = i0 + threadIdx.x, j = j0 + k;
        if (i < n && j < n) tile[k][threadIdx.x] = U[(n - 1 - j) * (long long)n + (n - 1 - i)];
    }
    __syncthreads();
    for (int k = threadIdx.y; k < TRANSPOSED; k += blockDim.y) {
        const int i = i0 + k, j = j0 + threadIdx.x;
        if (i < n && j < n) R[i * (long long)n + j] = i <= j ? tile[threadIdx.x][k] : REAL(0);
    }
}
#endif
