// The projection onto a pattern, one thread a scope.
//
//   project_mask(B, mask, m, n, changed)    mask <- that of project(B)
//     B         REAL, (m r, n c)
//     mask      bool, (m r, n c), true = kept
//     changed   one number, to which the mask's changed elements are added
//
// Macros: THREADS, and those of scope.cuh.
#include "project.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
project_mask(const REAL* __restrict__ B, bool* __restrict__ mask, const int m, const int n,
             unsigned long long* changed) {
    each_scope(m, n, changed, [&](const long long first, const long long row) {
        REAL x[ROWS][PLACES];
#pragma unroll
        for (int q = 0; q < ROWS; q++) load(B + first + q * row, x[q]);
        return replace_mask(mask, first, row, project(x));
    });
}
