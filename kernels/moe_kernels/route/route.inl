// A router as a whole: scores, softmax, the K largest: see route.py for the contract.

namespace {

struct RouteWords {
    const bf16* x;        // (T, D), rows `x_stride` apart
    const float* weight;  // (E, D)
    float* scores;        // (T, E) scratch
    int64_t* ids;         // (T, K)
    float* weights;       // (T, K)
    int64_t T, E, D, x_stride, K, renormalise;
    double scale;
};

// Largest first, of equal ones the lower id first; what is not a number stays where it is met, so that ids are ids.
inline void largest_of(const float* scores, int64_t E, int64_t K, int64_t* ids, float* values) {
    for (int64_t e = 0; e < E; e++) {
        const float score = scores[e];
        if (e >= K && !(score > values[K - 1])) continue;
        int64_t at = e < K ? e : K - 1;
        for (; at > 0 && score > values[at - 1]; at--) {
            values[at] = values[at - 1];
            ids[at] = ids[at - 1];
        }
        values[at] = score;
        ids[at] = e;
    }
}

inline float sum_of_exp(const float* scores, int64_t E, float most) {
    vf total = vf{};
    int64_t e = 0;
    for (; e + W <= E; e += W) total += exp_(load<vf>(scores + e) - most);
    if (e < E) {
        float rest[W];
        for (int i = 0; i < W; i++) rest[i] = e + i < E ? scores[e + i] : most - 1000.0f;
        total += exp_(load<vf>(rest) - most);
    }
    return sum(total);
}

inline void route_row(const RouteWords& a, const float* scores, int64_t* ids, float* weights) {
    largest_of(scores, a.E, a.K, ids, weights);
    const float most = weights[0], total = sum_of_exp(scores, a.E, most);
    float chosen = 0;
    for (int64_t k = 0; k < a.K; k++) {
        weights[k] = exp_(splat(weights[k] - most))[0] / total;
        chosen += weights[k];
    }
    for (int64_t k = 0; k < a.K; k++) {
        if (a.renormalise) weights[k] /= chosen;
        weights[k] *= float(a.scale);
    }
}

void route(const int64_t* words) {
    const RouteWords& a = *reinterpret_cast<const RouteWords*>(words);
    const ScoresWords of_scores = {a.x, a.weight, a.scores, a.T, a.E, a.D, a.x_stride};
    scores(reinterpret_cast<const int64_t*>(&of_scores));
    constexpr int64_t ROWS = 32;
    const int64_t tasks = (a.T + ROWS - 1) / ROWS;
    std::atomic<int64_t> next{0};
#pragma omp parallel if (tasks > 1 && a.T * a.E > 1 << 14)
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        const int64_t until = (task + 1) * ROWS < a.T ? (task + 1) * ROWS : a.T;
        for (int64_t t = task * ROWS; t < until; t++)
            route_row(a, a.scores + t * a.E, a.ids + t * a.K, a.weights + t * a.K);
    }
}

}  // namespace
