// Rows through the experts they want, and added up again, in one call: see moe.py for the contracts.

namespace {

struct MoeWords {
    const bf16* x;         // (T, D), rows `x_stride` apart
    const void* slots;     // (T, K) int64 if `wide`, else int32
    const float* weights;  // (T, K)
    const bf16* gate_up;   // as in ExpertsWords
    const bf16* down;      // as in ExpertsWords
    bf16* out;             // (T, D); null: terms are all that is wanted
    int64_t T, K, D, F, e, first, x_stride, wide;
    int64_t* pairs;   // scratch: (T * K,)
    int64_t* counts;  // scratch: (e + 1,)
    bf16* inner;      // scratch: (T * K, F)
    bf16* terms;      // (T, K, D)
};

template <typename Words>
inline void run_words(void (*operation)(const int64_t*), const Words& words) {
    static_assert(sizeof(Words) % sizeof(int64_t) == 0, "words of 8 bytes");
    operation(reinterpret_cast<const int64_t*>(&words));
}

// Terms of pairs whose expert is not here are zeros.
inline void clear_others(const MoeWords& a, int64_t R) {
    std::vector<bool> here(size_t(a.T * a.K), false);
    for (int64_t r = 0; r < R; r++) here[size_t(a.pairs[r])] = true;
    for (int64_t p = 0; p < a.T * a.K; p++)
        if (!here[size_t(p)]) std::memset(a.terms + p * a.D, 0, size_t(a.D) * sizeof(bf16));
}

void moe(const int64_t* words) {
    const MoeWords& a = *reinterpret_cast<const MoeWords*>(words);
    run_words(sort, SortWords{a.slots, a.pairs, a.counts, a.T * a.K, a.first, a.e, a.wide});
    const int64_t R = a.counts[a.e];
    if (R)
        run_words(experts, ExpertsWords{a.x, a.counts, a.gate_up, a.down, a.inner, a.terms, a.e, a.D, a.F, a.pairs, a.K,
                                        a.x_stride});
    if (!a.out) return;
    if (R < a.T * a.K) clear_others(a, R);
    run_words(combine, CombineWords{a.terms, nullptr, a.weights, nullptr, a.out, a.T * a.K, a.T, a.K, a.D});
}

}  // namespace
