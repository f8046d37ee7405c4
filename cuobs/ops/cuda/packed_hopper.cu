// Products of many tokens with packed weights on Hopper: wgmma on 128 rows of the weight and
// 8 GROUPS tokens, both operands in shared memory, brought in by the tensor memory accelerator
// STAGES stages ahead. docs/packed.rst draws the bytes.
//
//   product(values_map, index_map, inputs_map, bias, rows, out, M, tokens, tile_rows, column_tiles)
//     Two warpgroups multiply 64 rows each. Another warp brings operands in:
//     SPARSE    The weight stays packed, wgmma.sp takes it as it is: a tile's values are its rows
//               of 32 kept values, a lane's index word becomes the word of places that it wants.
//               Where values are not IN_PLACE, a lane first puts its own in order.
//     otherwise each warp expands the tile of its own rows into dense rows of 64 columns, while
//               the tensor cores still multiply the stage before.
//     A cluster of SHARING blocks of neighbouring rows shares its inputs, each block brings a part
//     of them to all; a cluster of SPLITS blocks shares the columns, and adds up at the end.
//
//   arrange(X, out, count)
//     Inputs with the even columns of each 8 before the odd ones, where SPLIT; count pieces of 8.
//
//   maps    of values, index words and inputs as `packed_hopper.maps` describes them
//
// Others, and the macros of a layout: packed.cuh. Here the rows of a tile are 16 neighbours and the
// columns of a lane a multiple of 16. BLOCK_ROWS rows a block, multiplied by CONSUMERS warps; places
// of dense rows, DENSE_SLOTS; AHEAD tiles of columns on their way to be expanded; RESIDENT blocks
// that a multiprocessor is to hold. Of what is SPARSE:
//   PLACES       {two words: byte m has the two places that mask m keeps, two bits each}
//   SPREAD       which of a lane's four fours of columns each scope has: 0 one, 1 two neighbours,
//                for which PLACES has them twice, 2 every other
//   VALUE_ORDER  {where each of a lane's values in a row is taken from}

#include "packed.cuh"

constexpr int TOKENS = 8 * GROUPS, THREADS = 32 * (CONSUMERS + 1);
constexpr int FOLDS = COLUMNS / 16;  // of 64 columns in a stage
// Bytes of the packed tiles of a block's rows and of their index words; of a stage: inputs and the
// weight that stays packed; of dense rows.
constexpr int VALUES = 8 * LOADS * 512, INDEX = 8 * WORDS * 128;
constexpr int STAGE_X = FOLDS * TOKENS * 128;
constexpr int STAGE = STAGE_X + (SPARSE ? VALUES + INDEX : 0);
constexpr int DENSE = BLOCK_ROWS * FOLDS * 128;
constexpr int CLUSTER = SHARING * SPLITS;
// Row clusters that are multiplied by all tokens before the next ones: both operands stay in L2.
constexpr int BAND = 16 / SHARING;

struct alignas(64) Map {
    char bytes[128];
};

#define SUM4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define SUM16(i) SUM4(i), SUM4(i + 1), SUM4(i + 2), SUM4(i + 3)
#define SUM64(i) SUM16(i), SUM16(i + 4), SUM16(i + 8), SUM16(i + 12)
#define FIRST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FIRST_32                                                                             \
    FIRST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FIRST_64                                                                             \
    FIRST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
             "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "   \
             "%62, %63"
#define FIRST_128                                                                            \
    FIRST_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, " \
             "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, "   \
             "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "      \
             "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, "      \
             "%119, %120, %121, %122, %123, %124, %125, %126, %127"
#if BFLOAT
#define TYPES "f32.bf16.bf16"
#else
#define TYPES "f32.f16.f16"
#endif
// OLD is an operand that is 0 where there are no sums yet.
#if SPARSE
#define PRODUCT(N, SUMS, W, X, OLD, PLACES_OF_LANE, SELECTOR)                                \
    "{ .reg .pred add; setp.ne.u32 add, " OLD ", 0;\n"                                       \
    "wgmma.mma_async.sp.sync.aligned.m64n" N "k32." TYPES " {" SUMS "}, " W ", " X ", "      \
    PLACES_OF_LANE ", " SELECTOR ", add, 1, 1, 0, 0; }"
#else
#define PRODUCT(N, SUMS, W, X, OLD, PLACES_OF_LANE, SELECTOR)                                \
    "{ .reg .pred add; setp.ne.u32 add, " OLD ", 0;\n"                                       \
    "wgmma.mma_async.sync.aligned.m64n" N "k16." TYPES " {" SUMS "}, " W ", " X              \
    ", add, 1, 1, 0, 0; }"
#endif

// Add a product of 32 columns, or of 16 where nothing is sparse.
template <int STEP>
__device__ __forceinline__ void multiply(float (&c)[GROUPS][4], const unsigned long long w,
                                         const unsigned long long x, const int old,
                                         const unsigned places) {
#define OPERANDS "l"(w), "l"(x), "r"(old), "r"(places), "n"(STEP % 2)
#if GROUPS == 4
    asm volatile(PRODUCT("32", FIRST_16, "%16", "%17", "%18", "%19", "%20")
                 : SUM16(0) : OPERANDS);
#elif GROUPS == 8
    asm volatile(PRODUCT("64", FIRST_32, "%32", "%33", "%34", "%35", "%36")
                 : SUM16(0), SUM16(4) : OPERANDS);
#elif GROUPS == 16
    asm volatile(PRODUCT("128", FIRST_64, "%64", "%65", "%66", "%67", "%68")
                 : SUM64(0) : OPERANDS);
#elif GROUPS == 32
    asm volatile(PRODUCT("256", FIRST_128, "%128", "%129", "%130", "%131", "%132")
                 : SUM64(0), SUM64(16) : OPERANDS);
#endif
}

// Rows of 128 swizzled bytes, 8 of them every 1024, or of 64 bytes, every 512.
__device__ __forceinline__ unsigned long long operand(const unsigned from, const int row_bytes) {
    return (unsigned long long)(from >> 4) | 1ull << 16 |
           (unsigned long long)(row_bytes / 2) << 32 | (row_bytes == 128 ? 1ull : 2ull) << 62;
}

// Two bits for each value of a lane's rows, as wgmma.sp reads them, from 8 masks of 4 bits, or from
// the 4 masks of one of two tiles.
__device__ __forceinline__ unsigned places_of(const unsigned word, const int tile) {
    constexpr unsigned places[2] = PLACES;
    if constexpr (SPREAD) {
        unsigned codes = __byte_perm(places[0], places[1], word >> tile % 2 * 16);
        if constexpr (SPREAD == 2) codes = __byte_perm(codes | codes >> 4, 0, 0x2200);
        return codes;
    }
    unsigned low = __byte_perm(places[0], places[1], word);
    unsigned high = __byte_perm(places[0], places[1], word >> 16);
    low |= low >> 4, high |= high >> 4;
    return __byte_perm(low, high, 0x6420);
}

__device__ __forceinline__ void start_barrier(const unsigned barrier, const int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void wait_for(const unsigned barrier, const unsigned parity) {
    asm volatile("{ .reg .pred done;\n"
                 "WAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra WAIT_%=; }"
                 :: "r"(barrier), "r"(parity) : "memory");
}


__device__ __forceinline__ unsigned in_block(const unsigned address, const int rank) {
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// What was read is read: nothing that was written has to be seen, which a release would wait for.
__device__ __forceinline__ void arrive_at(const unsigned barrier, const int rank) {
    asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];"
                 :: "r"(in_block(barrier, rank)) : "memory");
}

// Until all blocks of a cluster are here; what they wrote is seen then, or, "relaxed", may not be.
#define WAIT_FOR_CLUSTER(HOW)                                                                \
    asm volatile("barrier.cluster.arrive." HOW ";\nbarrier.cluster.wait;" ::: "memory")

// What one lane of a warp does for all; the others are not led astray.
#define BY_ONE_LANE(WHAT) "{ .reg .pred one; elect.sync _|one, 0xffffffff;\n@one " WHAT " }"
#define COPY "cp.async.bulk"
#define TO_HERE ".shared::cluster.global.mbarrier::complete_tx::bytes"

__device__ __forceinline__ void expect(const unsigned barrier, const int bytes) {
    asm volatile(BY_ONE_LANE("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;")
                 :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(const unsigned barrier, const int count = 1) {
    asm volatile(BY_ONE_LANE("mbarrier.arrive.shared::cta.b64 _, [%0], %1;")
                 :: "r"(barrier), "r"(count) : "memory");
}

// Eight tiles below each other, of values or of index words.
__device__ __forceinline__ void copy_tiles(const unsigned to, const Map& map, const int tile_row,
                                           const int tile, const unsigned barrier) {
    asm volatile(BY_ONE_LANE(COPY ".tensor.4d" TO_HERE " [%0], [%1, {%2, %2, %3, %4}], [%5];")
                 :: "r"(to), "l"(&map), "r"(0), "r"(tile), "r"(tile_row), "r"(barrier) : "memory");
}

// TOKENS / SHARING tokens, 64 columns, to the same place of all blocks of a cluster.
__device__ __forceinline__ void copy_inputs(const unsigned to, const Map& map, const int token,
                                            const int column, const unsigned barrier) {
#if SHARING > 1
    asm volatile(BY_ONE_LANE(COPY ".tensor.2d" TO_HERE
                             ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;")
                 :: "r"(to), "l"(&map), "r"(column), "r"(token), "r"(barrier),
                    "h"((unsigned short)((1 << SHARING) - 1)) : "memory");
#else
    asm volatile(BY_ONE_LANE(COPY ".tensor.2d" TO_HERE " [%0], [%1, {%2, %3}], [%4];")
                 :: "r"(to), "l"(&map), "r"(column), "r"(token), "r"(barrier) : "memory");
#endif
}

// A place in a ring of N.
template <int N>
struct Place {
    int slot = 0;
    unsigned parity = 0;

    __device__ __forceinline__ void advance() {
        if (++slot == N) slot = 0, parity ^= 1;
    }
};

// What a block of threads has to do, and where its shared memory and barriers are.
struct Block {
    int rank, begin, end;       // in its cluster; of the columns' tiles
    int clusters, parts, first, step;  // of the result: row clusters, parts, those of this block
    int token_blocks;
    unsigned base, dense, tiles, full, empty, coming, read;

    __device__ __forceinline__ Block(const int tile_rows, const int column_tiles,
                                     const int tokens) {
        rank = CLUSTER == 1 ? 0 : blockIdx.x % CLUSTER;
        const int split = SPLITS == 1 ? 0 : rank;
        begin = (long long)column_tiles * split / SPLITS;
        end = (long long)column_tiles * (split + 1) / SPLITS;
        const int row_blocks = (tile_rows + 7) / 8;
        clusters = (row_blocks + SHARING - 1) / SHARING;
        token_blocks = (tokens + TOKENS - 1) / TOKENS;
        parts = clusters * token_blocks;
        first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
    }
};

// One part of the result: rows and tokens of a block.
struct Part {
    int row_block, first_token;

    __device__ __forceinline__ Part(const int n, const Block& block) {
        const int first = n / (BAND * block.token_blocks) * BAND;
        const int width = min(BAND, block.clusters - first);
        const int in_band = n - first * block.token_blocks;
        row_block = (first + in_band % width) * SHARING + (SHARING > 1 ? block.rank : 0);
        first_token = in_band / width * TOKENS;
    }
};

__device__ __forceinline__ unsigned two(const float a, const float b) {
    return narrow(a) | unsigned(narrow(b)) << 16;
}

// Write the sums of a warpgroup, 64 rows, through shared memory, 32 tokens at a time.
__device__ __forceinline__ void write(const float (&sum)[GROUPS][4], char* staging,
                                      const REAL* bias, REAL* out, const int M, const int tokens,
                                      const int row_block, const int first_token) {
    constexpr int ROW = 64 * 2 + 16;  // bytes of a token
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    const int group = threadIdx.x / 128, top = row_block * BLOCK_ROWS + group * 64;
    const int row = top + warp * 16 + lane / 4;
    const float low = bias && row < M ? widen(bias[row]) : 0;
    const float high = bias && row + 8 < M ? widen(bias[row + 8]) : 0;
    staging += group * 32 * ROW;
    const unsigned mine = unsigned(__cvta_generic_to_shared(staging)) +
                          (lane / 16 * 8 + lane % 8) * ROW + (warp * 16 + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int n = 0; n < GROUPS; n += 4) {
#pragma unroll
        for (int h = 0; h < 4; h += 2) {
            const float(&a)[4] = sum[n + h];
            const float(&b)[4] = sum[n + h + 1];
            asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 "
                         "[%0], {%1, %2, %3, %4};"
                         :: "r"(mine + h * 8 * ROW), "r"(two(a[0] + low, a[1] + low)),
                            "r"(two(a[2] + high, a[3] + high)), "r"(two(b[0] + low, b[1] + low)),
                            "r"(two(b[2] + high, b[3] + high)) : "memory");
        }
        asm volatile("bar.sync %0, 128;" :: "r"(1 + group) : "memory");
#pragma unroll
        for (int e = thread; e < 256; e += 128) {
            const int token = first_token + n * 8 + e / 8, first = top + e % 8 * 8;
            const uint4 part = *reinterpret_cast<const uint4*>(staging + e / 8 * ROW + e % 8 * 16);
            if (token < tokens && first < M)
                *reinterpret_cast<uint4*>(out + (long long)token * M + first) = part;
        }
        asm volatile("bar.sync %0, 128;" :: "r"(1 + group) : "memory");
    }
}

// Sums of a block that has a share of the columns, as they lie in shared memory: (TOKENS, 128 + 4).
constexpr int SUM_ROW = (BLOCK_ROWS + 4) * 4;

__device__ __forceinline__ void leave(const float (&sum)[GROUPS][4], char* sums) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int n = 0; n < GROUPS; n++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            *reinterpret_cast<float*>(sums + (n * 8 + lane % 4 * 2 + k % 2) * SUM_ROW +
                                      (row + k / 2 * 8) * 4) = sum[n][k];
}

// Add up a share of the tokens over the blocks of a cluster, in the order of the blocks.
__device__ __forceinline__ void add_up(const unsigned sums, const int rank, const REAL* bias,
                                       REAL* out, const int M, const int tokens,
                                       const int row_block, const int first_token) {
    const int begin = TOKENS * rank / SPLITS, count = (TOKENS * (rank + 1) / SPLITS - begin) * 32;
    // Several at once: a load from another block takes as long as tens of them. Each is used, as
    // that block is there no longer than until all have what they use.
    constexpr int AT_ONCE = SPLITS > 4 ? 2 : 4;
    for (int first = threadIdx.x; first < count; first += AT_ONCE * THREADS) {
        float part[AT_ONCE][SPLITS][4];
        bool used[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            const int e = first + n * THREADS;
            used[n] = e < count && first_token + begin + e / 32 < tokens &&
                      row_block * BLOCK_ROWS + e % 32 * 4 < M;
            const unsigned from = sums + (begin + e / 32) * SUM_ROW + e % 32 * 16;
#pragma unroll
            for (int s = 0; s < SPLITS; s++) {
                float(&p)[4] = part[n][s];
                if (used[n])
                    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                                 : "=f"(p[0]), "=f"(p[1]), "=f"(p[2]), "=f"(p[3])
                                 : "r"(in_block(from, s)));
            }
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            if (!used[n]) continue;
            const int e = first + n * THREADS, token = first_token + begin + e / 32;
            const int row = row_block * BLOCK_ROWS + e % 32 * 4;
            float total[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                total[k] = bias ? widen(bias[row + k]) : 0;
#pragma unroll
                for (int s = 0; s < SPLITS; s++) total[k] += part[n][s][k];
            }
            *reinterpret_cast<uint2*>(out + (long long)token * M + row) =
                make_uint2(two(total[0], total[1]), two(total[2], total[3]));
        }
    }
}

#if SPARSE
// Put a lane's 8 values in each of two rows in order. They are 16 bytes of 64, swizzled.
__device__ __forceinline__ void reorder(const unsigned tile) {
    constexpr int from[8] = VALUE_ORDER;
    const int lane = threadIdx.x % 32;
    const unsigned mine = tile + lane / 4 * 64 + ((lane % 4) ^ (lane / 8 % 4)) * 16;
#pragma unroll
    for (int q = 0; q < 2; q++) {
        unsigned v[4], w[4];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(mine + q * 512) : "memory");
        auto pick = [&](auto pair) {
            constexpr int i = decltype(pair)::value, a = from[2 * i], b = from[2 * i + 1];
            constexpr unsigned halves = (a % 2 ? 0x32 : 0x10) | (b % 2 ? 0x7600 : 0x5400);
            w[i] = __byte_perm(v[a / 2], v[b / 2], halves);
        };
        for_each<0, 4>(pick);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                     :: "r"(mine + q * 512), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                     : "memory");
    }
}
#else
// A lane's part of a tile.
struct Tile {
    unsigned v[4 * LOADS], w[WORDS];

    __device__ __forceinline__ void load(const unsigned from, const unsigned words) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int l = 0; l < LOADS; l++)
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v[4 * l]), "=r"(v[4 * l + 1]), "=r"(v[4 * l + 2]),
                           "=r"(v[4 * l + 3])
                         : "r"(from + (l * 32 + lane) * 16) : "memory");
#pragma unroll
        for (int k = 0; k < WORDS; k++)
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w[k])
                         : "r"(words + (k * 32 + lane) * 4) : "memory");
    }

    // Write it as dense rows from one on, swizzled; row[i] is that of a lane's slot in the tile.
    __device__ __forceinline__ void expand_to(const unsigned to, const unsigned* table,
                                              const int j, const int first,
                                              const int (&row)[SLOTS]) const {
        const int t = threadIdx.x % 4;
        unsigned a[SLOTS * PAIRS];
        expand(table, v, w, WORD_TILES == 1 ? 0 : j % WORD_TILES * TILE_BITS, a);
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            unsigned natural[PAIRS];
            in_order(a, slot, natural);
#pragma unroll
            for (int h = 0; h < PIECES; h++) {
                const int piece = t * PIECES + h;  // of 16 bytes, 8 in a fold
                const unsigned at = to + (piece / 8 * BLOCK_ROWS + first + row[slot]) * 128 +
                                    ((piece % 8) ^ (row[slot] % 8)) * 16;
                asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                             :: "r"(at), "r"(natural[4 * h]), "r"(natural[4 * h + 1]),
                                "r"(natural[4 * h + 2]), "r"(natural[4 * h + 3]) : "memory");
            }
        }
    }
};
#endif

// Bring in operands, by one warp: those of a stage, or its inputs alone and, AHEAD of them, packed
// tiles that others expand, in a ring of their own.
__device__ __forceinline__ void bring_in(const Block& block, const Map& values_map,
                                         const Map& index_map, const Map& inputs_map) {
    Place<STAGES> place;
    auto bring = [&](const Part& part, const int j) {
        const unsigned stage = block.base + place.slot * STAGE;
        const unsigned barrier = block.full + place.slot * 8;
        wait_for(block.empty + place.slot * 8, place.parity ^ 1);
        expect(barrier, STAGE);
        if constexpr (SPARSE) {
            copy_tiles(stage + STAGE_X, values_map, part.row_block * 8, j, barrier);
            copy_tiles(stage + STAGE_X + VALUES, index_map, part.row_block * 8, j / WORD_TILES,
                       barrier);
        }
        const int share = SHARING > 1 ? block.rank * (TOKENS / SHARING) : 0;
#pragma unroll
        for (int f = 0; f < FOLDS; f++)
            copy_inputs(stage + (f * TOKENS + share) * 128, inputs_map, part.first_token + share,
                        (j * FOLDS + f) * 64, barrier);
        place.advance();
    };
    Place<AHEAD> next;
    auto bring_tiles = [&](const Part& part, const int j) {
        const unsigned to = block.tiles + next.slot * (VALUES + INDEX);
        const unsigned barrier = block.coming + next.slot * 8;
        wait_for(block.read + next.slot * 8, next.parity ^ 1);
        expect(barrier, VALUES + INDEX);
        copy_tiles(to, values_map, part.row_block * 8, j, barrier);
        copy_tiles(to + VALUES, index_map, part.row_block * 8, j / WORD_TILES, barrier);
        next.advance();
    };
    for (int n = block.first; n < block.parts; n += block.step) {
        const Part part(n, block);
        // A tile is asked for as soon as another is used, which is two stages before its own.
        constexpr int LEAD = SPARSE ? 0 : AHEAD - 2;
        for (int j = block.begin - LEAD; j < block.end; j++) {
            if (!SPARSE && j + LEAD < block.end) bring_tiles(part, j + LEAD);
            if (j >= block.begin) bring(part, j);
        }
    }
    // What other blocks say of this one's stages has to come before its memory is another's.
    if constexpr (SHARING > 1) {
#pragma unroll 1
        for (int s = 0; s < STAGES; s++) {
            wait_for(block.empty + place.slot * 8, place.parity ^ 1);
            place.advance();
        }
    }
}

#if !SPARSE
// Expand a warp's own tile of each stage, one stage before it is multiplied. The next is in
// registers by then. No memory is touched but shared: a fence waits for all that is under way.
struct Expander {
    const Block& block;
    const unsigned* table;
    const int first;  // row
    int row[SLOTS];
    Place<AHEAD> held;
    Place<DENSE_SLOTS> place;
    Tile tile;

    __device__ __forceinline__ Expander(const Block& block, const unsigned* table, const int* rows,
                                        const int warp)
        : block(block), table(table), first(warp * 16) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++)
            row[slot] = row_of(rows, 0, slot, threadIdx.x % 32 / 4);
    }

    __device__ __forceinline__ void load() {
        const unsigned from = block.tiles + held.slot * (VALUES + INDEX);
        wait_for(block.coming + held.slot * 8, held.parity);
        tile.load(from + first / 16 * LOADS * 512, from + VALUES + first / 16 * WORDS * 128);
    }

    // A tile's place is free once every lane has used its part: a copy may overtake a load.
    __device__ __forceinline__ void expand(const int j) {
        tile.expand_to(block.dense + place.slot * DENSE, table, j, first, row);
        place.advance();
        __syncwarp();
        arrive(block.read + held.slot * 8);
        held.advance();
    }
};
#endif

// Multiply the stages of a part as they come: 64 rows by each of two warpgroups. What they have
// read is free for all blocks that bring something to it.
struct Multiplier {
    const Block& block;
    const int warp;
    Place<STAGES> place;
    Place<DENSE_SLOTS> dense;
    int before = 0;

    __device__ __forceinline__ void release() {
        if (SHARING > 1) {
            if (threadIdx.x % 32 < SHARING) arrive_at(block.empty + before * 8, threadIdx.x % 32);
        } else {
            arrive(block.empty + before * 8);
        }
    }

    // Add a stage's product; ``old`` where there are sums already.
    __device__ __forceinline__ void add(float (&sum)[GROUPS][4], const bool old,
                                        const unsigned places) {
        // The rows of a warpgroup are written, and what they replaced was multiplied before.
        if (!SPARSE || !IN_PLACE) asm volatile("bar.sync %0, 128;" :: "r"(3 + warp / 4) : "memory");
        if (!SPARSE) wait_for(block.full + place.slot * 8, place.parity);
        const unsigned stage = block.base + place.slot * STAGE;
#if SPARSE
        const unsigned weight = stage + STAGE_X + warp / 4 * 64 * 64;
#else
        const unsigned weight = block.dense + dense.slot * DENSE + warp / 4 * 64 * 128;
        dense.advance();
#endif
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        auto multiply_step = [&](auto index) {
            constexpr int i = decltype(index)::value;
            if constexpr (SPARSE)
                multiply<i>(sum, operand(weight + i * 32, 64), operand(stage + i * 64, 128),
                            old || i, places);
            else
                multiply<i>(sum, operand(weight + i / 4 * BLOCK_ROWS * 128 + i % 4 * 32, 128),
                            operand(stage + i / 4 * TOKENS * 128 + i % 4 * 32, 128), old || i, 0);
        };
        for_each<0, SPARSE ? 2 : 4 * FOLDS>(multiply_step);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }

    // Let go of the stage before the last one, if there is one.
    __device__ __forceinline__ void settle(const bool old) {
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (old) release();
        before = place.slot;
        place.advance();
    }

    __device__ __forceinline__ void finish() {
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        release();
    }

#if SPARSE
    // Wait for the next stage; put its values in order while the last is multiplied.
    __device__ __forceinline__ unsigned prepare(const int j) {
        wait_for(block.full + place.slot * 8, place.parity);
        const unsigned weight = block.base + place.slot * STAGE + STAGE_X;
        unsigned word;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word)
                     : "r"(weight + VALUES + (warp * 32 + threadIdx.x % 32) * 4));
        if constexpr (!IN_PLACE) {
            reorder(weight + warp * 1024);
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
        return places_of(word, j);
    }

    __device__ __forceinline__ void part(float (&sum)[GROUPS][4]) {
        // Two words in turn: a product that is under way still reads its own.
        unsigned even = 0, odd = 0;
        for (int j = block.begin; j < block.end; j += 2) {
            even = prepare(j);
            add(sum, j > block.begin, even);
            settle(j > block.begin);
            if (j + 1 < block.end) {
                odd = prepare(j + 1);
                add(sum, true, odd);
                settle(true);
            }
        }
        finish();
    }
#else
    __device__ __forceinline__ void part(float (&sum)[GROUPS][4], Expander& expander) {
        expander.load();
        expander.expand(block.begin);
        if (block.begin + 1 < block.end) expander.load();
        for (int j = block.begin; j < block.end; j++) {
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            add(sum, j > block.begin, 0);
            if (j + 1 < block.end) expander.expand(j + 1);
            if (j + 2 < block.end) expander.load();
            settle(j > block.begin);
        }
        finish();
    }
#endif
};

__device__ __forceinline__ void start_barriers(const Block& block) {
    if (!threadIdx.x) {
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            start_barrier(block.full + s * 8, 1);
            start_barrier(block.empty + s * 8, CONSUMERS * SHARING);
        }
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            start_barrier(block.coming + s * 8, 1);
            start_barrier(block.read + s * 8, CONSUMERS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) __cluster_dims__(CLUSTER, 1, 1)
    product(const __grid_constant__ Map values_map, const __grid_constant__ Map index_map,
            const __grid_constant__ Map inputs_map, const REAL* bias, const int* rows, REAL* out,
            const int M, const int tokens, const int tile_rows, const int column_tiles) {
    extern __shared__ char stages[];
    __shared__ alignas(16) char staging[SPLITS == 1 ? 2 * 32 * 144 : 16];
    __shared__ alignas(16) unsigned table[SPARSE ? 1 : MASKS * SELECTORS];
    __shared__ unsigned long long full[STAGES], empty[STAGES], coming[AHEAD], read[AHEAD];
    asm volatile("griddepcontrol.launch_dependents;");
    // The same for all lanes, as the compiler sees from this.
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    const unsigned start = unsigned(__cvta_generic_to_shared(stages));
    Block block(tile_rows, column_tiles, tokens);
    block.base = (start + 1023) & ~1023u, block.dense = block.base + STAGES * STAGE;
    block.tiles = block.dense + DENSE_SLOTS * DENSE;
    block.full = unsigned(__cvta_generic_to_shared(full));
    block.empty = unsigned(__cvta_generic_to_shared(empty));
    block.coming = unsigned(__cvta_generic_to_shared(coming));
    block.read = unsigned(__cvta_generic_to_shared(read));
    start_barriers(block);
    if (!SPARSE) fill_table(table);
    __syncthreads();
    if (CLUSTER > 1) WAIT_FOR_CLUSTER("relaxed");
    // The kernel before may not be done yet.
    asm volatile("griddepcontrol.wait;" ::: "memory");

    if (warp == CONSUMERS) {
        bring_in(block, values_map, index_map, inputs_map);
    } else {
#if !SPARSE
        Expander expander(block, table, rows, warp);
#endif
        Multiplier multiplier{block, warp};
        for (int n = block.first; n < block.parts; n += block.step) {
            float sum[GROUPS][4];
#if SPARSE
            multiplier.part(sum);
#else
            multiplier.part(sum, expander);
#endif
            const Part part(n, block);
            if constexpr (SPLITS == 1) {
                write(sum, staging, bias, out, M, tokens, part.row_block, part.first_token);
            } else {
                // All stages are read: their place is free for the sums.
                asm volatile("bar.sync 1, 256;" ::: "memory");
                leave(sum, stages + (block.base - start));
            }
        }
    }
    // Blocks of a cluster use each other's memory to the end.
    if constexpr (SPLITS > 1) {
        WAIT_FOR_CLUSTER("release");
        const Part part(block.first, block);
        add_up(block.base, block.rank, bias, out, M, tokens, part.row_block, part.first_token);
    }
    if (CLUSTER > 1) WAIT_FOR_CLUSTER("relaxed");
}

#if SPLIT
extern "C" __global__ void arrange(const uint4* X, uint4* out, const long long count) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= count) return;
    const uint4 x = X[i];
    out[i] = make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410),
                        __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
}
#endif
