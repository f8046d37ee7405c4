// The system λ_P C_PP = w_P of one scope, λ = 0 outside its set P: L D L' with unit L, unrolled.
// entry(i, j), j <= i, is C_ij; bit i of `set` says whether i is in P; x is w on entry, λ on exit.
template <typename Entry>
__device__ __forceinline__ void masked_solve(const Entry& entry, const unsigned set,
                                             REAL (&x)[PLACES]) {
    REAL unit[PLACES][PLACES], inverse_pivot[PLACES];
#pragma unroll
    for (int i = 0; i < PLACES; i++) {
        const bool in = set >> i & 1;
        REAL pivot = in ? entry(i, i) : REAL(1), value = in ? x[i] : REAL(0);
        REAL scaled[PLACES];
#pragma unroll
        for (int j = 0; j < i; j++) {
            scaled[j] = in && (set >> j & 1) ? entry(i, j) : REAL(0);
#pragma unroll
            for (int k = 0; k < j; k++) scaled[j] -= scaled[k] * unit[j][k];
            unit[i][j] = scaled[j] * inverse_pivot[j];
            pivot -= scaled[j] * unit[i][j];
            value -= unit[i][j] * x[j];
        }
        inverse_pivot[i] = 1 / pivot;
        x[i] = value;
    }
#pragma unroll
    for (int i = PLACES - 1; i >= 0; i--) {
        x[i] *= inverse_pivot[i];
#pragma unroll
        for (int j = i + 1; j < PLACES; j++) x[i] -= unit[j][i] * x[j];
    }
}
