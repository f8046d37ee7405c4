// What every kernel that knows a pattern shares. Macros, beside REAL (float or double):
//   PLACES     columns of a scope
//   ROWS       rows of a scope
//   N_BLOCKS   blocks of a scope
//   N_PRUNED   blocks that it loses
//   BLOCKS     {block of each element}, row by row

#include "unrolled.cuh"

// Elements that one access can move: c neighbours, as far as 16 bytes go.
__device__ constexpr int largest_access(int count, int size) {
    int width = 1;
    while (count % (2 * width) == 0 && 2 * width * size <= 16) width *= 2;
    return width;
}

template <typename T, int N>
struct alignas(N * sizeof(T)) Packed {
    T value[N];
};

// count neighbours from p, which is aligned as a scope's first element is.
template <int COUNT, typename T>
__device__ __forceinline__ void load(const T* p, T (&out)[COUNT]) {
    constexpr int N = largest_access(COUNT, sizeof(T));
#pragma unroll
    for (int i = 0; i < COUNT; i += N) {
        const Packed<T, N> part = *reinterpret_cast<const Packed<T, N>*>(p + i);
#pragma unroll
        for (int k = 0; k < N; k++) out[i + k] = part.value[k];
    }
}

template <int COUNT, typename T>
__device__ __forceinline__ void store(T* p, const T (&in)[COUNT]) {
    constexpr int N = largest_access(COUNT, sizeof(T));
#pragma unroll
    for (int i = 0; i < COUNT; i += N) {
        Packed<T, N> part;
#pragma unroll
        for (int k = 0; k < N; k++) part.value[k] = in[i + k];
        *reinterpret_cast<Packed<T, N>*>(p + i) = part;
    }
}

// The same for a scope in rows that lie any number of elements apart.
template <int COUNT, typename T>
__device__ __forceinline__ void load_in_row(const T* p, const long long row, T (&out)[COUNT]) {
    if (row % largest_access(COUNT, sizeof(T)) == 0) return load(p, out);
#pragma unroll
    for (int i = 0; i < COUNT; i++) out[i] = p[i];
}

template <int COUNT, typename T>
__device__ __forceinline__ void store_in_row(T* p, const long long row, const T (&in)[COUNT]) {
    if (row % largest_access(COUNT, sizeof(T)) == 0) return store(p, in);
#pragma unroll
    for (int i = 0; i < COUNT; i++) p[i] = in[i];
}

#ifdef N_BLOCKS
__device__ constexpr int BLOCK_OF[ROWS * PLACES] = BLOCKS;

// The blocks with the lowest scores, as bits; the lowest index first where scores tie. NaN counts as
// infinite: whatever is compared with it is false, and ranks would not be a permutation.
__device__ __forceinline__ unsigned prune_lowest(const REAL (&scores)[N_BLOCKS]) {
    int rank[N_BLOCKS];
    REAL score[N_BLOCKS];
#pragma unroll
    for (int i = 0; i < N_BLOCKS; i++) {
        rank[i] = 0;
        score[i] = fmin(scores[i], REAL(__int_as_float(0x7f800000)));
    }
#pragma unroll
    for (int i = 1; i < N_BLOCKS; i++) {
#pragma unroll
        for (int j = 0; j < i; j++) {
            const int later = score[i] < score[j];
            rank[j] += later;
            rank[i] += 1 - later;
        }
    }
    unsigned pruned = 0;
#pragma unroll
    for (int i = 0; i < N_BLOCKS; i++) pruned |= unsigned(rank[i] < N_PRUNED) << i;
    return pruned;
}
#endif
