// Products with packed weights, expanded in registers into operands of dense tensor-core products.
// docs/packed.rst draws the bytes. A warp multiplies a tile by 8 tokens at a time with
// mma.m16n8k16, the weight as its first operand; the order of the columns of a product is free as
// long as both operands agree, so that a lane holds whole scopes.
//
//   few(values, index, X, x_row, bias, rows, out, M, tokens)
//     A block of WARPS warps does TILES tile rows and 8 GROUPS tokens, its warps share the columns.
//   many(values, index, X, x_row, bias, rows, out, partial, M, tokens)
//     A block of WARPS warps, each with TILES tile rows of its own and a share of the columns,
//     blockIdx.z of gridDim.z; inputs come through shared memory, STAGES tiles ahead. Where the
//     columns are shared, sums go to partial, float (gridDim.z, tokens, M), for
//   add(partial, bias, out, M, tokens, parts)
//   unpack(values, index, rows, columns, W, K, first)
//     Rows of the dense weight from a tile row on, two values at a time, with WHOLE 8 neighbours.
//
//   X       REAL, (tokens, column_tiles * 4 * COLUMNS), rows x_row elements apart, on 16 bytes
//   columns int, (column_tiles, 4, COLUMNS): column of the weight, -1 outside it
//
// Others, and the macros of a layout: packed.cuh. Of a kernel: GROUPS, TILES, WARPS, RESIDENT (blocks
// that a multiprocessor is to hold), AHEAD (tiles of columns that a warp has under way), STAGES, WHOLE.

#include "packed.cuh"

__device__ __forceinline__ void copy16(unsigned to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy4(unsigned to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[4], const unsigned a0, const unsigned a1,
                                         const unsigned a2, const unsigned a3, const unsigned b0,
                                         const unsigned b1) {
#define PRODUCT(TYPE)                                                                       \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "             \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                           \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
#if BFLOAT
    PRODUCT("bf16");
#else
    PRODUCT("f16");
#endif
}

// Add what an expanded tile gives for 8 tokens, whose inputs are x.
__device__ __forceinline__ void add_products(float (&sum)[SLOTS / 2][4],
                                             const unsigned (&a)[SLOTS * PAIRS],
                                             const unsigned (&x)[PAIRS]) {
    auto product = [&](auto place) {
        constexpr int order[PAIRS] = ORDER;
        constexpr int p = 2 * decltype(place)::value;
#pragma unroll
        for (int m = 0; m < SLOTS / 2; m++)
            multiply(sum[m], a[2 * m * PAIRS + p], a[(2 * m + 1) * PAIRS + p],
                     a[2 * m * PAIRS + p + 1], a[(2 * m + 1) * PAIRS + p + 1], x[order[p]],
                     x[order[p + 1]]);
    };
    for_each<0, PAIRS / 2>(product);
}


#ifdef FEW
struct Batch {
    unsigned v[TILES][AHEAD][4 * LOADS];
    unsigned w[TILES][AHEAD][WORDS];
    unsigned x[GROUPS][AHEAD][PAIRS];
};

__device__ __forceinline__ void load(Batch& b, const uint4* values, const unsigned* index,
                                     const REAL* X, const long long x_row, const int tile,
                                     const int tile_rows, const int column_tiles, const int j0,
                                     const int tokens, const int lane) {
    const int words_row = (column_tiles + WORD_TILES - 1) / WORD_TILES;
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
        const int j = j0 + u;
        const bool there = j < column_tiles;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const bool inside = there && (TILES == 1 || tile + i < tile_rows);
            const uint4* p = values + ((long long)(tile + i) * column_tiles + j) * LOADS * 32;
#pragma unroll
            for (int l = 0; l < LOADS; l++) {
                const uint4 part = inside ? stream(p + l * 32 + lane) : make_uint4(0, 0, 0, 0);
                put_words(b.v[i][u] + 4 * l, part);
            }
            const unsigned* q =
                index + ((long long)(tile + i) * words_row + j / WORD_TILES) * WORDS * 32;
#pragma unroll
            for (int k = 0; k < WORDS; k++) b.w[i][u][k] = inside ? __ldg(q + k * 32 + lane) : 0;
        }
#pragma unroll
        for (int n = 0; n < GROUPS; n++) {
            const int token = n * 8 + lane / 4;
            const uint4* p = reinterpret_cast<const uint4*>(
                X + token * x_row + (long long)(j * 4 + lane % 4) * COLUMNS);
#pragma unroll
            for (int h = 0; h < PIECES; h++) {
                const uint4 part =
                    there && token < tokens ? __ldg(p + h) : make_uint4(0, 0, 0, 0);
                put_words(b.x[n][u] + 4 * h, part);
            }
        }
    }
}

__device__ __forceinline__ void work(const Batch& b, const unsigned* table, const int j0,
                                     float (&sum)[TILES][GROUPS][SLOTS / 2][4]) {
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
        const int shift = WORD_TILES == 1 ? 0 : (j0 + u) % WORD_TILES * TILE_BITS;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            unsigned a[SLOTS * PAIRS];
            expand(table, b.v[i][u], b.w[i][u], shift, a);
#pragma unroll
            for (int n = 0; n < GROUPS; n++) add_products(sum[i][n], a, b.x[n][u]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT)
    few(const uint4* values, const unsigned* index, const REAL* X, const long long x_row,
        const REAL* bias, const int* rows, REAL* out, const int M, const int tokens,
        const int tile_rows, const int column_tiles) {
    __shared__ alignas(16) unsigned table[MASKS * SELECTORS];
    constexpr int SUMS = TILES * GROUPS * SLOTS * 2;  // of a lane
    extern __shared__ float sums[];      // (WARPS, SUMS, 32)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = blockIdx.x * TILES, first_token = blockIdx.y * 8 * GROUPS;
    X += first_token * x_row;
    const int mine = tokens - first_token;
    float sum[TILES][GROUPS][SLOTS / 2][4] = {};
    constexpr int STEP = WARPS * AHEAD;
    Batch now;
    int j = warp * AHEAD;
    load(now, values, index, X, x_row, tile, tile_rows, column_tiles, j, mine, lane);
    fill_table(table);
    __syncthreads();
    for (; j < column_tiles; j += STEP) {
#if PREFETCH
        Batch next;
        load(next, values, index, X, x_row, tile, tile_rows, column_tiles, j + STEP, mine, lane);
        work(now, table, j, sum);
        now = next;
#else
        work(now, table, j, sum);
        if (j + STEP < column_tiles)
            load(now, values, index, X, x_row, tile, tile_rows, column_tiles, j + STEP, mine,
                 lane);
#endif
    }
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < GROUPS; n++)
#pragma unroll
            for (int m = 0; m < SLOTS / 2; m++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    sums[(warp * SUMS + ((i * GROUPS + n) * (SLOTS / 2) + m) * 4 + k) * 32 + lane] =
                        sum[i][n][m][k];
    __syncthreads();
    for (int e = threadIdx.x; e < SUMS * 32; e += 32 * WARPS) {
        const int place = e / 32, l = e % 32;
        const int k = place % 4, m = place / 4 % (SLOTS / 2), n = place / (2 * SLOTS) % GROUPS;
        const int i = place / (2 * SLOTS * GROUPS);
        const int token = first_token + n * 8 + l % 4 * 2 + k % 2;
        const int row =
            tile + i < tile_rows ? row_of(rows, tile + i, 2 * m + k / 2, l / 4) : -1;
        if (token >= tokens || row < 0) continue;
        float total = bias ? widen(bias[row]) : 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += sums[(w * SUMS + place) * 32 + l];
        out[(long long)token * M + row] = narrow(total);
    }
}
#endif

#ifdef MANY
// Write a lane's four sums: two slots of a tile, two tokens of group n.
__device__ __forceinline__ void write(const float (&sum)[4], const int tile, const int slot,
                                      const int n, const REAL* bias, const int* rows, REAL* out,
                                      float* partial, const int M, const int tokens,
                                      const int first_token, const int tile_rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int row = tile < tile_rows ? row_of(rows, tile, slot + k / 2, lane / 4) : -1;
        const int token = first_token + n * 8 + lane % 4 * 2 + k % 2;
        if (row < 0 || token >= tokens) continue;
        if (gridDim.z > 1)
            partial[((long long)blockIdx.z * tokens + token) * M + row] = sum[k];
        else
            out[(long long)token * M + row] = narrow(sum[k] + (bias ? widen(bias[row]) : 0));
    }
}

extern "C" __global__ void add(const float* partial, const REAL* bias, REAL* out, const int M,
                               const int tokens, const int parts) {
    const long long all = (long long)tokens * M;
    const long long e = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (e >= all) return;
    float total = bias ? widen(bias[e % M]) : 0;
    for (int p = 0; p < parts; p++) total += partial[p * all + e];
    out[e] = narrow(total);
}

// What a stage holds, in 16-byte pieces: inputs, then each warp's values and index words.
constexpr int STAGE_X = GROUPS * PIECES * 32;
constexpr int STAGE_V = TILES * LOADS * 32, STAGE_W = TILES * WORDS * 8;
constexpr int STAGE = STAGE_X + WARPS * (STAGE_V + STAGE_W);

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT)
    many(const uint4* values, const unsigned* index, const REAL* X, const long long x_row,
         const REAL* bias, const int* rows, REAL* out, float* partial, const int M,
         const int tokens, const int tile_rows, const int column_tiles) {
    extern __shared__ uint4 stages[];
    __shared__ alignas(16) unsigned table[MASKS * SELECTORS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = (blockIdx.x * WARPS + warp) * TILES, first_token = blockIdx.y * 8 * GROUPS;
    const int begin = (long long)column_tiles * blockIdx.z / gridDim.z;
    const int end = (long long)column_tiles * (blockIdx.z + 1) / gridDim.z;
    const int words_row = (column_tiles + WORD_TILES - 1) / WORD_TILES;
    X += first_token * x_row;
    const int mine = tokens - first_token;
    const unsigned base = unsigned(__cvta_generic_to_shared(stages));
    float sum[TILES][GROUPS][SLOTS / 2][4] = {};

    auto issue = [&](const int j) {
        const unsigned stage = base + (j - begin) % STAGES * STAGE * 16;
        const bool there = j < end;
        if (there) {
            const unsigned own = stage + (STAGE_X + warp * (STAGE_V + STAGE_W)) * 16;
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const bool inside = tile + i < tile_rows;
                const long long place = inside ? (long long)(tile + i) * column_tiles + j : 0;
#pragma unroll
                for (int l = 0; l < LOADS; l++)
                    copy16(own + ((i * LOADS + l) * 32 + lane) * 16,
                           values + (place * LOADS + l) * 32 + lane, inside);
                const long long word =
                    inside ? (long long)(tile + i) * words_row + j / WORD_TILES : 0;
#pragma unroll
                for (int k = 0; k < WORDS; k++)
                    copy4(own + STAGE_V * 16 + ((i * WORDS + k) * 32 + lane) * 4,
                          index + (word * WORDS + k) * 32 + lane, inside);
            }
#pragma unroll
            for (int e = threadIdx.x; e < STAGE_X; e += 32 * WARPS) {
                const int token = e / (4 * PIECES), piece = e % (4 * PIECES);
                const int t = piece / PIECES, h = piece % PIECES;
                const bool inside = token < mine;
                copy16(stage + ((token / 8 * PIECES + h) * 32 + token % 8 * 4 + t) * 16,
                       X + (inside ? token : 0) * x_row +
                           ((long long)j * 4 + t) * COLUMNS + h * 8, inside);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) issue(begin + s);
    fill_table(table);
    for (int j = begin; j < end; j++) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
        __syncthreads();
        issue(j + STAGES - 1);
        const uint4* stage = stages + (j - begin) % STAGES * STAGE;
        const uint4* own = stage + STAGE_X + warp * (STAGE_V + STAGE_W);
        const unsigned* own_words = reinterpret_cast<const unsigned*>(own + STAGE_V);
        const int shift = WORD_TILES == 1 ? 0 : j % WORD_TILES * TILE_BITS;
        unsigned a[TILES][SLOTS * PAIRS];
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            unsigned v[4 * LOADS], w[WORDS];
#pragma unroll
            for (int l = 0; l < LOADS; l++)
                put_words(v + 4 * l, own[(i * LOADS + l) * 32 + lane]);
#pragma unroll
            for (int k = 0; k < WORDS; k++) w[k] = own_words[(i * WORDS + k) * 32 + lane];
            expand(table, v, w, shift, a[i]);
        }
#pragma unroll
        for (int n = 0; n < GROUPS; n++) {
            unsigned x[PAIRS];
#pragma unroll
            for (int h = 0; h < PIECES; h++)
                put_words(x + 4 * h, stage[(n * PIECES + h) * 32 + lane]);
#pragma unroll
            for (int i = 0; i < TILES; i++) add_products(sum[i][n], a[i], x);
        }
    }
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int m = 0; m < SLOTS / 2; m++)
#pragma unroll
            for (int n = 0; n < GROUPS; n++)
                write(sum[i][n][m], tile + i, 2 * m, n, bias, rows, out, partial, M, tokens,
                      first_token, tile_rows);
}

#endif

#ifdef UNPACK
// Bytes of a row of a tile in shared memory, in a bank of its own.
constexpr int ROW_BYTES = 8 * COLUMNS + 16;
constexpr int PIECES_OF_ROW = COLUMNS / 2;

extern "C" __global__ void unpack(const uint4* values, const unsigned* index, const int* rows,
                                  const int* columns, REAL* W, const int K, const int first,
                                  const int column_tiles) {
    __shared__ alignas(16) unsigned table[MASKS * SELECTORS];
#if WHOLE
    __shared__ uint4 buffer[WARPS][SLOTS * 8 * ROW_BYTES / 16];
#endif
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int words_row = (column_tiles + WORD_TILES - 1) / WORD_TILES;
    const int j0 = (blockIdx.x * WARPS + warp) * AHEAD, tile = first + blockIdx.y;
    unsigned v[AHEAD][4 * LOADS], w[AHEAD][WORDS];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
        const int j = j0 + u < column_tiles ? j0 + u : 0;
        const uint4* p = values + ((long long)tile * column_tiles + j) * LOADS * 32 + lane;
        const unsigned* q =
            index + ((long long)tile * words_row + j / WORD_TILES) * WORDS * 32 + lane;
#pragma unroll
        for (int l = 0; l < LOADS; l++) put_words(v[u] + 4 * l, stream(p + l * 32));
#pragma unroll
        for (int k = 0; k < WORDS; k++) w[u][k] = __ldg(q + k * 32);
    }
    fill_table(table);
    __syncthreads();
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
        const int j = j0 + u;
        if (j >= column_tiles) return;
        unsigned a[SLOTS * PAIRS];
        expand(table, v[u], w[u], j % WORD_TILES * TILE_BITS, a);
#if WHOLE
        // Through shared memory, so that neighbouring lanes write neighbouring bytes.
        char* mine = reinterpret_cast<char*>(buffer[warp]);
        __syncwarp();
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            unsigned natural[PAIRS];
            in_order(a, slot, natural);
            char* row = mine + (slot * 8 + lane / 4) * ROW_BYTES + lane % 4 * 2 * COLUMNS;
#pragma unroll
            for (int h = 0; h < PIECES; h++)
                reinterpret_cast<uint4*>(row)[h] =
                    make_uint4(natural[4 * h], natural[4 * h + 1], natural[4 * h + 2],
                               natural[4 * h + 3]);
        }
        __syncwarp();
#pragma unroll
        for (int e = lane; e < SLOTS * 8 * PIECES_OF_ROW; e += 32) {
            const int r = e / PIECES_OF_ROW, piece = e % PIECES_OF_ROW;
            const int row = row_of(rows, tile, r / 8, r % 8);
            const long long column = (long long)j * 4 * COLUMNS + piece * 8;
            if (row >= 0 && column < K)
                *reinterpret_cast<uint4*>(W + (long long)row * K + column) =
                    *reinterpret_cast<const uint4*>(mine + r * ROW_BYTES + piece * 16);
        }
#else
        const long long column = ((long long)j * 4 + lane % 4) * COLUMNS;
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            const int row = row_of(rows, tile, slot, lane / 4);
            if (row < 0) continue;
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                const int k = columns[column + i];
                if (k >= 0) W[(long long)row * K + k] = a[slot * PAIRS + i / 2] >> i % 2 * 16;
            }
        }
#endif
    }
}
#endif
