// The passes of true OBS over a batch of B = m r rows, row group by row group.
//
// Of each row group, scopes (m, n) lists the open scopes; Z (B, n c, room) holds the factor of each
// row's lost columns, one row of Z for each open column, scope by scope. Rows of Z, and all that is
// copied from them, start at multiples of 16 bytes, and their lengths in use are multiples of 8.
//
// Macros, beside those of scope.cuh:
//   REAL     float or double: weights, diagonal blocks, costs
//   FACTOR   __half, float or double: Z and what is made of it
//   THREADS  of a block
//   TILE     order of a tile of group_blocks;  WIDTH, DEEP  columns of C and of P in one of
//            gather_blocks
//   LANES    threads that share a scope in update_scopes;  UNROLLED  the widest scope it takes
//
// A program holds what needs the blocks of a scope, what needs its size alone, or what needs
// neither: the compiler takes longest by far for wide scopes.
#include <cuda_fp16.h>

#include "scope.cuh"

template <typename T, typename U>
__device__ __forceinline__ T convert(const U x) {
    return T(x);
}
template <>
__device__ __forceinline__ float convert<float, __half>(const __half x) {
    return __half2float(x);
}
template <>
__device__ __forceinline__ __half convert<__half, float>(const float x) {
    return __float2half(x);
}

// Sum of a value over the threads before this one, and in total over the block. `scratch` holds
// 33 ints; all threads must call.
__device__ __forceinline__ int scan(const int value, int* scratch, int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += before;
    }
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        int running = 0;
        for (int i = 0; i < THREADS / 32; i++) {
            const int part = scratch[i];
            scratch[i] = running;
            running += part;
        }
        scratch[32] = running;
    }
    __syncthreads();
    const int before = scratch[warp] + sum - value;
    total = scratch[32];
    __syncthreads();
    return before;
}

template <int SIZE>
struct Bits {
    using Type = unsigned int;
};
template <>
struct Bits<8> {
    using Type = unsigned long long;
};
using ORDERED = Bits<sizeof(REAL)>::Type;

// Bits that are ordered as the values are; NaN comes last.
__device__ __forceinline__ ORDERED ordered(const REAL value) {
    if (value != value) return ~ORDERED(0);
    const REAL x = value == REAL(0) ? REAL(0) : value;
    ORDERED bits;
    memcpy(&bits, &x, sizeof x);
    constexpr ORDERED sign = ORDERED(1) << (8 * sizeof(ORDERED) - 1);
    return bits & sign ? ~bits : bits | sign;
}

// The `rank`-th smallest, from 0, of the values of those for which take(i, value) is true.
// `below` is how many of them are smaller.
template <typename T, typename Take>
__device__ __forceinline__ T select_rank(const int n, const int rank, Take take, int* histogram,
                                         int* scratch, int* digit_and_below, int& below) {
    T prefix = 0, known = 0;
    int remaining = rank;
    for (int shift = 8 * sizeof(T) - 8; shift >= 0; shift -= 8) {
        histogram[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += THREADS) {
            T value;
            if (take(i, value) && (value & known) == prefix)
                atomicAdd(histogram + int(value >> shift & 255), 1);
        }
        __syncthreads();
        const int count = histogram[threadIdx.x];
        int total;
        const int before = scan(count, scratch, total);
        if (before <= remaining && remaining < before + count) {
            digit_and_below[0] = threadIdx.x;
            digit_and_below[1] = before;
        }
        __syncthreads();
        prefix |= T(digit_and_below[0]) << shift;
        known |= T(255) << shift;
        remaining -= digit_and_below[1];
        __syncthreads();
    }
    below = rank - remaining;
    return prefix;
}

#ifndef PLACES
// first_scopes(key, key_row, scopes, scopes_row, n, size, chosen)
//   key     REAL, (m, n);  scopes  int, (m, n)
//   chosen  int, (m, size): positions, ascending, of the smallest keys; the lowest scope first
//           where keys tie
// A block a row group.
extern "C" __global__ void __launch_bounds__(THREADS)
first_scopes(const REAL* __restrict__ key, const long long key_row,
             const int* __restrict__ scopes, const long long scopes_row, const int n,
             const int size, int* __restrict__ chosen) {
    __shared__ int histogram[THREADS], scratch[33], found[2];
    key += blockIdx.x * key_row;
    scopes += blockIdx.x * scopes_row;
    chosen += (long long)blockIdx.x * size;
    int below, unused;
    const ORDERED last = select_rank<ORDERED>(
        n, size - 1,
        [&](const int i, ORDERED& value) {
            value = ordered(key[i]);
            return true;
        },
        histogram, scratch, found, below);
    const unsigned last_scope = select_rank<unsigned>(
        n, size - 1 - below,
        [&](const int i, unsigned& value) {
            value = scopes[i];
            return ordered(key[i]) == last;
        },
        histogram, scratch, found, unused);
    int written = 0;
    for (int start = 0; start < n; start += THREADS) {
        const int i = start + threadIdx.x;
        bool first = false;
        if (i < n) {
            const ORDERED value = ordered(key[i]);
            first = value < last || (value == last && unsigned(scopes[i]) <= last_scope);
        }
        int total;
        const int place = written + scan(first, scratch, total);
        if (first) chosen[place] = i;
        written += total;
    }
}

#endif

#ifdef N_BLOCKS
// take_pruned(blocks, chosen, size, scopes, scopes_row, w, its 4 strides, n, groups, p, mask, places,
//             columns, weights, counts)
//   blocks   bool, (N_BLOCKS, m, n);  chosen  int, (m, size);  w  REAL, (c, m, r, n)
//   mask     bool, (m, r, groups, c), true = kept
//   places, columns  int, (B, p), -1 beyond a row's count;  weights  REAL, (B, p), 0 there
//   counts   int, (B,): columns that a row loses, p at most: what goes beyond is not listed
// A block a row group.
extern "C" __global__ void __launch_bounds__(THREADS)
take_pruned(const bool* __restrict__ blocks, const int* __restrict__ chosen, const int size,
            const int* __restrict__ scopes, const long long scopes_row,
            const REAL* __restrict__ w, const long long w_place, const long long w_group,
            const long long w_row, const long long w_scope, const int n, const int groups, const int p,
            bool* __restrict__ mask, int* __restrict__ places, int* __restrict__ columns,
            REAL* __restrict__ weights, int* __restrict__ counts) {
    __shared__ int scratch[33];
    const int group = blockIdx.x;
    for (int row = 0; row < ROWS; row++) {
        const long long b = (long long)group * ROWS + row;
        int written = 0;
        for (int start = 0; start < size; start += THREADS) {
            const int k = start + threadIdx.x;
            bool kept[PLACES];
            int position = 0, scope = 0, count = 0;
            if (k < size) {
                position = chosen[(long long)group * size + k];
                scope = scopes[group * scopes_row + position];
#pragma unroll
                for (int i = 0; i < PLACES; i++) {
                    const int block = BLOCK_OF[row * PLACES + i];
                    kept[i] = !blocks[((long long)block * gridDim.x + group) * n + position];
                    count += !kept[i];
                }
                store(mask + (b * groups + scope) * PLACES, kept);
            }
            int total;
            long long out = b * p + written + scan(count, scratch, total);
            if (k < size) {
#pragma unroll
                for (int i = 0; i < PLACES; i++) {
                    if (kept[i] || out >= (b + 1) * p) continue;
                    places[out] = position * PLACES + i;
                    columns[out] = scope * PLACES + i;
                    weights[out] =
                        w[i * w_place + group * w_group + row * w_row + position * w_scope];
                    out++;
                }
            }
            written += total;
        }
        for (int i = written + threadIdx.x; i < p; i += THREADS) {
            places[b * p + i] = columns[b * p + i] = -1;
            weights[b * p + i] = 0;
        }
        if (threadIdx.x == 0) counts[b] = min(written, p);
    }
}
#endif

// A run of memory, 16 bytes at a time.
__device__ __forceinline__ void copy(const void* from, void* to, const int bytes, const int thread,
                                     const int threads) {
    const uint4* source = static_cast<const uint4*>(from);
    uint4* target = static_cast<uint4*>(to);
    for (int i = thread; i < bytes / 16; i += threads) target[i] = source[i];
}

#ifndef PLACES
// gather_factor(Z, its 2 strides, places, count, used, out, its 2 strides)
//   Z       FACTOR, (B, n c, room);  places  int, (B, count), or null for 0, 1, 2 ...
//   out     FACTOR, (B, count, used): rows of Z, zeros where places is -1
// A warp a row of out; blocks (count / 8, B).
extern "C" __global__ void __launch_bounds__(THREADS)
gather_factor(const FACTOR* __restrict__ Z, const long long Z_matrix, const long long Z_row,
              const int* __restrict__ places, const int count, const int used,
              FACTOR* __restrict__ out, const long long out_matrix, const long long out_row) {
    const int lane = threadIdx.x % 32;
    const int i = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const long long b = blockIdx.y;
    if (i >= count) return;
    const int place = places ? places[b * count + i] : i;
    FACTOR* to = out + b * out_matrix + i * out_row;
    const int bytes = used * int(sizeof(FACTOR));
    if (place >= 0) {
        copy(Z + b * Z_matrix + place * Z_row, to, bytes, lane, 32);
    } else {
        for (int k = lane; k < bytes / 16; k += 32)
            reinterpret_cast<uint4*>(to)[k] = make_uint4(0, 0, 0, 0);
    }
}

// group_blocks(C, K, columns, p, A)
//   C        REAL, (K, K);  columns  int, (B, p)
//   A        REAL, (B, p, p): the lower triangle of C at these columns; the unit matrix where -1
// A warp a row of a tile; blocks (p / TILE, p / TILE, B).
extern "C" __global__ void __launch_bounds__(THREADS)
group_blocks(const REAL* __restrict__ C, const long long K, const int* __restrict__ columns,
             const int p, REAL* __restrict__ A) {
    if (blockIdx.x > blockIdx.y) return;
    const int j = blockIdx.x * TILE + threadIdx.x % TILE;
    const long long b = blockIdx.z;
    columns += b * p;
    A += b * p * p;
    if (j >= p) return;
    const int column = columns[j];
    for (int part = threadIdx.x / TILE; part < TILE; part += THREADS / TILE) {
        const int i = blockIdx.y * TILE + part;
        if (i >= p) break;
        if (j > i) continue;
        const int row = columns[i];
        A[(long long)i * p + j] = row < 0 || column < 0 ? REAL(i == j) : C[row * K + column];
    }
}

// solve_group(inverse, weights, p, y, cost, rounded)
//   inverse  REAL, (B, p, p): L^-1;  weights  REAL, (B, p)
//   y        REAL, (B, p): L^-1 w;  cost  REAL, (B,), grows by y'y
//   rounded  FACTOR, (B, p, p): L^-1, or null
// A block a row; a warp a row of L^-1 at a time.
extern "C" __global__ void __launch_bounds__(THREADS)
solve_group(const REAL* __restrict__ inverse, const REAL* __restrict__ weights, const int p,
            REAL* __restrict__ y, REAL* __restrict__ cost, FACTOR* __restrict__ rounded) {
    __shared__ REAL part[THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long b = blockIdx.x;
    REAL energy = 0;
    for (int i = warp; i < p; i += THREADS / 32) {
        const REAL* row = inverse + (b * p + i) * p;
        FACTOR* rounded_row = rounded ? rounded + (b * p + i) * p : nullptr;
        REAL sum = 0;
        for (int k = lane; k < p; k += 32) {
            const REAL value = k <= i ? row[k] : REAL(0);
            if (k <= i) sum += value * weights[b * p + k];
            if (rounded) rounded_row[k] = convert<FACTOR>(value);
        }
#pragma unroll
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0) y[b * p + i] = sum;
        energy += sum * sum;
    }
    if (lane == 0) part[warp] = energy;
    __syncthreads();
    if (threadIdx.x == 0) {
        REAL total = cost[b];
        for (int i = 0; i < THREADS / 32; i++) total += part[i];
        cost[b] = total;
    }
}

// append_rows(Zn, its 2 strides, count, starts, advances, zeros, used, Z, its 2 strides)
//   Zn      FACTOR, (B, count, p);  starts, advances  int, (B,)
//   Z       FACTOR, (B, count, room), zero from starts[b] to `zeros`: row b takes the first
//           advances[b] columns of Zn at starts[b], and zeros from there to `used`
// A warp a row of Z; blocks (count / 8, B).
extern "C" __global__ void __launch_bounds__(THREADS)
append_rows(const FACTOR* __restrict__ Zn, const long long Zn_matrix, const long long Zn_row,
            const int count, const int* __restrict__ starts, const int* __restrict__ advances,
            const int zeros, const int used, FACTOR* __restrict__ Z, const long long Z_matrix,
            const long long Z_row) {
    const int lane = threadIdx.x % 32;
    const int i = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const long long b = blockIdx.y;
    if (i >= count) return;
    const int start = starts[b], end = start + advances[b];
    FACTOR* to = Z + b * Z_matrix + i * Z_row;
    copy(Zn + b * Zn_matrix + i * Zn_row, to + start, advances[b] * int(sizeof(FACTOR)), lane, 32);
    for (int k = max(end, zeros) + lane; k < used; k += 32) to[k] = convert<FACTOR>(0.0f);
}
#endif

#if defined(PLACES) && !defined(N_BLOCKS)
// drop_scopes(chosen, size, n, scopes, scopes_row, w, its 4 strides, D, its 5 strides, Z, its 2
//             strides, used)
//   chosen  int, (m, size): positions of the scopes to forget, ascending
//   scopes  int, (m, n);  w  REAL, (c, m, r, n);  D  REAL, (c, c, m, r, n), lower triangle
//   Z       FACTOR, (B, n c, room): the first `used` of each row move
// The k-th forgotten scope among the first n - size gives its place to the k-th open one behind.
// Blocks (size, B).
extern "C" __global__ void __launch_bounds__(THREADS)
drop_scopes(const int* __restrict__ chosen, const int size, const int n, int* __restrict__ scopes,
            const long long scopes_row, REAL* __restrict__ w, const long long w_place,
            const long long w_group, const long long w_row, const long long w_scope,
            REAL* __restrict__ D, const long long D_i, const long long D_j,
            const long long D_group, const long long D_row, const long long D_scope,
            FACTOR* __restrict__ Z, const long long Z_matrix, const long long Z_row,
            const int used) {
    const int k = blockIdx.x, left = n - size;
    const long long b = blockIdx.y, group = b / ROWS, row = b % ROWS;
    chosen += group * size;
    const int hole = chosen[k];
    if (hole >= left) return;
    // Of the chosen ones behind, chosen[first:], those before the k-th open one: chosen[first + j]
    // has chosen[first + j] - left - j open ones before it.
    int first = k, end = size;
    while (first < end) {
        const int middle = (first + end) / 2;
        if (chosen[middle] < left) first = middle + 1;
        else end = middle;
    }
    int low = 0, high = size - first;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (chosen[first + middle] - left - middle <= k) low = middle + 1;
        else high = middle;
    }
    const int tail = left + k + low;

    if (row == 0 && threadIdx.x == 0)
        scopes[group * scopes_row + hole] = scopes[group * scopes_row + tail];
    w += group * w_group + row * w_row;
    for (int i = threadIdx.x; i < PLACES; i += THREADS)
        w[i * w_place + hole * w_scope] = w[i * w_place + tail * w_scope];
    D += group * D_group + row * D_row;
    for (int e = threadIdx.x; e < PLACES * PLACES; e += THREADS) {
        const int i = e / PLACES, j = e % PLACES;
        REAL* block = D + i * D_i + j * D_j;
        if (j <= i) block[hole * D_scope] = block[tail * D_scope];
    }
    Z += b * Z_matrix;
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < PLACES; i += THREADS / 32)
        copy(Z + ((long long)tail * PLACES + i) * Z_row, Z + ((long long)hole * PLACES + i) * Z_row,
             used * int(sizeof(FACTOR)), lane, 32);
}

// gather_blocks(C, K, columns, p, scopes, scopes_row, n, out)
//   C        FACTOR, (K, K);  columns  int, (B, p);  scopes  int, (m, n)
//   out      FACTOR, (B, n c, p): C at the open columns and at `columns`, 0 where -1
// Tiles of WIDTH columns of C by DEEP of P; blocks (p / DEEP, B, n c / WIDTH), so that those that run
// together read the same columns of C.
constexpr int VECTOR = largest_access(PLACES, 4);

extern "C" __global__ void __launch_bounds__(THREADS)
gather_blocks(const FACTOR* __restrict__ C, const long long K, const int* __restrict__ columns,
              const int p, const int* __restrict__ scopes, const long long scopes_row, const int n,
              FACTOR* __restrict__ out) {
    // Rows end between banks: two halves make one bank.
    __shared__ FACTOR tile[WIDTH][DEEP + (sizeof(FACTOR) == 2 ? 2 : 1)];
    const long long b = blockIdx.y;
    const int p_first = blockIdx.x * DEEP, q_first = blockIdx.z * WIDTH;
    const int deep = min(DEEP, p - p_first), wide = min(WIDTH, n * PLACES - q_first);
    columns += b * p + p_first;
    scopes += b / ROWS * scopes_row;
    // Two columns of P by 16 pieces of a row of C a warp.
    constexpr int PIECES = WIDTH / VECTOR;
    for (int t = threadIdx.x; t < DEEP * PIECES; t += THREADS) {
        const int i = t % 2 + t / (2 * PIECES) * 2, q = t / 2 % PIECES * VECTOR;
        if (i >= deep || q >= wide) continue;
        const int column = columns[i], place = q_first + q;
        FACTOR values[VECTOR];
#pragma unroll
        for (int v = 0; v < VECTOR; v++) values[v] = convert<FACTOR>(0.0f);
        if (column >= 0)
            load(C + column * K + (long long)scopes[place / PLACES] * PLACES + place % PLACES,
                 values);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) tile[q + v][i] = values[v];
    }
    __syncthreads();
    out += (b * n * PLACES + q_first) * p + p_first;
    // Two neighbours an access, as p is even.
    for (int t = threadIdx.x; t < wide * (DEEP / 2); t += THREADS) {
        const int i = t % (DEEP / 2) * 2, q = t / (DEEP / 2);
        if (i >= deep) continue;
        const FACTOR pair[2] = {tile[q][i], tile[q][i + 1]};
        store(out + (long long)q * p + i, pair);
    }
}

// update_scopes(Zn, its 2 strides, p, y, n, w, its 4 strides, D, its 5 strides)
//   Zn      FACTOR, (B, n c, p);  y  REAL, (B, p)
//   w       REAL, (c, m, r, n): w -= Zn y
//   D       REAL, (c, c, m, r, n): the lower triangles lose those of Zn Zn'
// LANES neighbouring threads a scope; blocks (n / SCOPES_A_BLOCK, B).
constexpr int SCOPES_A_BLOCK = THREADS / LANES;
constexpr int SUMS = PLACES * (PLACES + 1) / 2 + PLACES;
// Values of each column that a thread holds at a time: as many as the registers bear.
constexpr int HELD = PLACES > 8 ? 4 : 16 / sizeof(FACTOR);
#if PLACES <= UNROLLED
extern "C" __global__ void __launch_bounds__(THREADS)
update_scopes(const FACTOR* __restrict__ Zn, const long long Zn_matrix, const long long Zn_row,
              const int p, const REAL* __restrict__ y, const int n, REAL* __restrict__ w,
              const long long w_place, const long long w_group, const long long w_row,
              const long long w_scope, REAL* __restrict__ D, const long long D_i,
              const long long D_j, const long long D_group, const long long D_row,
              const long long D_scope) {
    __shared__ REAL sums[SUMS][SCOPES_A_BLOCK + 1];
    const int lane = threadIdx.x % LANES, mine = threadIdx.x / LANES;
    const int n_first = blockIdx.x * SCOPES_A_BLOCK, scope = n_first + mine;
    const long long b = blockIdx.y, group = b / ROWS, row = b % ROWS;
    REAL sum[SUMS];
#pragma unroll
    for (int e = 0; e < SUMS; e++) sum[e] = 0;
    if (scope < n) {
        const FACTOR* first = Zn + b * Zn_matrix + scope * PLACES * Zn_row;
        for (int k = lane * HELD; k < p; k += LANES * HELD) {
            FACTOR z[PLACES][HELD];
            REAL weight[HELD];
#pragma unroll
            for (int i = 0; i < PLACES; i++) load(first + i * Zn_row + k, z[i]);
            load(y + b * p + k, weight);
#pragma unroll
            for (int v = 0; v < HELD; v++) {
                REAL value[PLACES];
#pragma unroll
                for (int i = 0; i < PLACES; i++) {
                    value[i] = convert<REAL>(z[i][v]);
#pragma unroll
                    for (int j = 0; j <= i; j++) sum[i * (i + 1) / 2 + j] += value[i] * value[j];
                    sum[SUMS - PLACES + i] += value[i] * weight[v];
                }
            }
        }
    }
#pragma unroll
    for (int e = 0; e < SUMS; e++) {
#pragma unroll
        for (int step = LANES / 2; step; step /= 2)
            sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], step);
        if (lane == e % LANES) sums[e][mine] = sum[e];
    }
    __syncthreads();
    // Neighbouring threads now write neighbouring scopes.
    w += group * w_group + row * w_row;
    D += group * D_group + row * D_row;
    for (int t = threadIdx.x; t < SUMS * SCOPES_A_BLOCK; t += THREADS) {
        const int e = t / SCOPES_A_BLOCK, s = t % SCOPES_A_BLOCK;
        if (n_first + s >= n) continue;
        if (e >= SUMS - PLACES) {
            w[(e - (SUMS - PLACES)) * w_place + (n_first + s) * w_scope] -= sums[e][s];
        } else {
            int i = 0;
            while ((i + 1) * (i + 2) / 2 <= e) i++;
            const int j = e - i * (i + 1) / 2;
            D[i * D_i + j * D_j + (n_first + s) * D_scope] -= sums[e][s];
        }
    }
}
#endif
#endif
