template <int N>
struct Index {
    static constexpr int value = N;
};

// f(Index<BEGIN>{}), ..., f(Index<END - 1>{}): a loop whose index is a constant in every pass, where
// an unrolled one would pass the compiler's limits.
template <int BEGIN, int END, typename F>
__device__ __forceinline__ void for_each(F& f) {
    if constexpr (END - BEGIN == 1) {
        f(Index<BEGIN>{});
    } else {
        for_each<BEGIN, (BEGIN + END) / 2>(f);
        for_each<(BEGIN + END) / 2, END>(f);
    }
}
