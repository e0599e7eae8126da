// The weighted sum of each token's terms: see combine.py for the contract.

namespace {

struct CombineWords {
    const bf16* terms;      // (R, D)
    const int64_t* pairs;   // (R,), each t * K + k, none twice
    const float* weights;   // (T, K)
    int32_t* place;         // (T * K,) scratch; null: term r is pair r
    bf16* out;              // (T, D)
    int64_t R, T, K, D;
};

void combine(const int64_t* words) {
    const CombineWords& a = *reinterpret_cast<const CombineWords*>(words);
    if (a.place) {
        for (int64_t i = 0; i < a.T * a.K; i++) a.place[i] = -1;
        for (int64_t r = 0; r < a.R; r++) a.place[a.pairs[r]] = int32_t(r);
    }
#pragma omp parallel for schedule(static) if (a.R * a.D > 1 << 16)
    for (int64_t t = 0; t < a.T; t++) {
        int64_t d = 0;
        for (; d + W <= a.D; d += W) {
            vf total = vf{};
            for (int64_t k = 0; k < a.K; k++) {
                const int64_t r = a.place ? a.place[t * a.K + k] : t * a.K + k;
                if (r >= 0) total = widen(a.terms + r * a.D + d) * a.weights[t * a.K + k] + total;
            }
            narrow(a.out + t * a.D + d, total);
        }
        for (; d < a.D; d++) {
            float total = 0;
            for (int64_t k = 0; k < a.K; k++) {
                const int64_t r = a.place ? a.place[t * a.K + k] : t * a.K + k;
                if (r >= 0) total = widen(a.terms[r * a.D + d]) * a.weights[t * a.K + k] + total;
            }
            a.out[t * a.D + d] = narrow(total);
        }
    }
}

}  // namespace
