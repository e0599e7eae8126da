// Rows through the experts they want, and added up again, in one call: see moe.py for the contract.

namespace {

struct MoeWords {
    const bf16* x;         // (T, D), rows `x_stride` apart
    const void* slots;     // (T, K) int64 if `wide`, else int32
    const float* weights;  // (T, K)
    const bf16* gate_up;   // as in ExpertsWords
    const bf16* down;      // as in ExpertsWords
    bf16* out;             // (T, D)
    int64_t T, K, D, F, e, first, x_stride, wide;
    int64_t* pairs;   // scratch from here on: (T * K,)
    int64_t* counts;  // (e + 1,)
    int32_t* place;   // (T * K,)
    bf16* rows;       // (T * K, D)
    bf16* inner;      // (T * K, F)
    bf16* terms;      // (T * K, D)
};

template <typename Words>
inline void run_words(void (*operation)(const int64_t*), const Words& words) {
    static_assert(sizeof(Words) % sizeof(int64_t) == 0, "words of 8 bytes");
    operation(reinterpret_cast<const int64_t*>(&words));
}

void moe(const int64_t* words) {
    const MoeWords& a = *reinterpret_cast<const MoeWords*>(words);
    run_words(sort, SortWords{a.slots, a.pairs, a.counts, a.T * a.K, a.first, a.e, a.wide});
    const int64_t R = a.counts[a.e], size = sizeof(bf16);
    if (R) {
        run_words(gather, GatherWords{reinterpret_cast<const char*>(a.x), a.pairs, reinterpret_cast<char*>(a.rows), R,
                                      a.K, a.D * size, a.x_stride * size});
        run_words(experts, ExpertsWords{a.rows, a.counts, a.gate_up, a.down, a.inner, a.terms, a.e, a.D, a.F});
    }
    run_words(combine, CombineWords{a.terms, a.pairs, a.weights, a.place, a.out, R, a.T, a.K, a.D});
}

}  // namespace
