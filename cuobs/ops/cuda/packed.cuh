// What the kernels of packed weights share: how a lane's part of a tile is expanded in registers.
// docs/packed.rst draws the bytes.
//
//   values  uint4, (tile rows, column_tiles, LOADS, 32): 8 values each
//   index   unsigned, (tile rows, column_tiles / WORD_TILES, WORDS, 32)
//   bias    REAL, (M,), or null
//   rows    int, (tile rows, CELLS, 8, ROWS): row of the weight, -1 outside it
//   out     REAL, (tokens, M)
//
// Macros of a layout: BFLOAT, whether REAL is bfloat16 or half;
//   ROWS, CELLS, SCOPES, BITS, LOADS, WORDS, WORD_TILES   see `Tiling`; ROWS of a scope
//   COLUMNS   of a lane in a tile, a multiple of 8
//   MASKS     of a scope
//   SELECTORS words of selectors for each mask, the first USED of them, so that a mask begins where
//             all can be read together; TABLE {word, mask by mask}: a selector of
//             permute(two values, selector) in each half of a word
//   FIRST     {first step of each scope, and their number}
//   STEPS     {pair of columns it goes to, register it comes from, selector}, step by step
//   ORDER     {where the pairs of columns of a lane lie among its inputs}

#include "unrolled.cuh"

constexpr int SLOTS = CELLS * ROWS;  // rows of a lane
constexpr int PAIRS = COLUMNS / 2;   // pairs of columns of a lane
constexpr int PIECES = COLUMNS / 8;  // 16-byte pieces of a lane's inputs
constexpr int REGISTERS = 4 * LOADS / CELLS;  // of a cell's values
constexpr int TILE_BITS = 32 * WORDS / WORD_TILES;

__constant__ unsigned TABLE_OF_MASK[MASKS * SELECTORS] = TABLE;

__device__ __forceinline__ uint4 stream(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Half precision as its bits, so that no header is needed.
using REAL = unsigned short;

__device__ __forceinline__ float widen(const REAL x) {
    float wide;
#if BFLOAT
    wide = __uint_as_float(unsigned(x) << 16);
#else
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
#endif
    return wide;
}

__device__ __forceinline__ REAL narrow(const float x) {
    REAL bits;
#if BFLOAT
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#endif
    return bits;
}

__device__ __forceinline__ void fill_table(unsigned* table) {
    for (int i = threadIdx.x; i < MASKS * SELECTORS; i += blockDim.x) table[i] = TABLE_OF_MASK[i];
}

// Bytes of a word, or of zeros from 4 on, by the four lowest digits of a selector. __byte_perm would
// first clear what its digits may not have, and these never do.
__device__ __forceinline__ unsigned permute(const unsigned word, const unsigned selector) {
    unsigned result;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(word), "r"(selector));
    return result;
}

__device__ __forceinline__ void put_words(unsigned* to, const uint4& from) {
    to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// The selectors of a mask, in as few loads as there may be.
__device__ __forceinline__ void load_selectors(const unsigned* table, const unsigned mask,
                                               unsigned (&selector)[USED]) {
    const unsigned* mine = table + mask * SELECTORS;
#pragma unroll
    for (int k = 0; k + 4 <= USED; k += 4)
        put_words(selector + k, *reinterpret_cast<const uint4*>(mine + k));
    if constexpr (USED % 4 >= 2) {
        const uint2 both = *reinterpret_cast<const uint2*>(mine + USED / 4 * 4);
        selector[USED / 4 * 4] = both.x, selector[USED / 4 * 4 + 1] = both.y;
    }
    if constexpr (USED % 2) selector[USED - 1] = mine[USED - 1];
}

// The values of a lane as its rows are, two columns in a register.
__device__ __forceinline__ void expand(const unsigned* table, const unsigned (&v)[4 * LOADS],
                                       const unsigned (&word)[WORDS], const int shift,
                                       unsigned (&a)[SLOTS * PAIRS]) {
#pragma unroll
    for (int i = 0; i < SLOTS * PAIRS; i++) a[i] = 0;
    auto scope = [&](auto place) {
        constexpr int first[SCOPES + 1] = FIRST;
        constexpr int q = decltype(place)::value / SCOPES, s = decltype(place)::value % SCOPES;
        constexpr int bit = decltype(place)::value * BITS;
        const unsigned mask = word[bit / 32] >> (bit % 32 + shift) & ((1u << BITS) - 1);
        unsigned selector[USED];
        load_selectors(table, mask, selector);
        auto take = [&](auto step) {
            constexpr int steps[] = STEPS;
            constexpr int k = 3 * decltype(step)::value;
            constexpr int to = q * ROWS * PAIRS + steps[k], from = q * REGISTERS + steps[k + 1];
            constexpr int which = steps[k + 2];
            a[to] |= permute(v[from], selector[which / 2] >> which % 2 * 16);
        };
        for_each<first[s], first[s + 1]>(take);
    };
    for_each<0, CELLS * SCOPES>(scope);
}

// The pairs of columns of a slot as they lie among a lane's inputs.
__device__ __forceinline__ void in_order(const unsigned (&a)[SLOTS * PAIRS], const int slot,
                                         unsigned (&natural)[PAIRS]) {
    auto put = [&](auto pair) {
        constexpr int order[PAIRS] = ORDER, i = decltype(pair)::value;
        natural[order[i]] = a[slot * PAIRS + i];
    };
    for_each<0, PAIRS>(put);
}

// The row of the weight in a lane's slot.
__device__ __forceinline__ int row_of(const int* rows, const int tile, const int slot,
                                      const int g) {
    return rows[((tile * CELLS + slot / ROWS) * 8 + g) * ROWS + slot % ROWS];
}
