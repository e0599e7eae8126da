// x (bfloat16) times few float32 columns, which lie as rows: see scores.py for the contract.

namespace {

struct ScoresWords {
    const bf16* x;        // (T, D), rows `x_stride` apart
    const float* weight;  // (E, D)
    float* out;           // (T, E)
    int64_t T, E, D, x_stride;
};

// Up to four experts of one row at once, each in an accumulator of its own.
template <int N>
inline void scores_of(const float* x, const float* w, int64_t D, float* out) {
    vf acc[N];
    for (int n = 0; n < N; n++) acc[n] = vf{};
    int64_t d = 0;
    for (; d + W <= D; d += W) {
        vf v = load<vf>(x + d);
        for (int n = 0; n < N; n++) acc[n] = v * load<vf>(w + n * D + d) + acc[n];
    }
    for (int n = 0; n < N; n++) {
        out[n] = sum(acc[n]);
        for (int64_t rest = d; rest < D; rest++) out[n] = x[rest] * w[n * D + rest] + out[n];
    }
}

void scores(const int64_t* words) {
    const ScoresWords& a = *reinterpret_cast<const ScoresWords*>(words);
    const int64_t groups = (a.E + 63) / 64, tasks = groups * ((a.T + BLOCK_ROWS - 1) / BLOCK_ROWS);
    std::atomic<int64_t> next{0};
#pragma omp parallel if (a.T * a.E * a.D > ALONE)
    {
        float* x = thread_floats(size_t(BLOCK_ROWS * a.D));
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            const int64_t row = task / groups * BLOCK_ROWS, first = task % groups * 64;
            const int64_t last = first + 64 < a.E ? first + 64 : a.E;
            const int block = int(a.T - row < BLOCK_ROWS ? a.T - row : BLOCK_ROWS);
            for (int m = 0; m < block; m++) widen_row(a.x + (row + m) * a.x_stride, a.D, x + m * a.D);
            for (int64_t e = first; e < last; e += 4) {
                for (int m = 0; m < block; m++) {  // the four columns stay in the cache
                    float* out = a.out + (row + m) * a.E + e;
                    const float *from = x + m * a.D, *w = a.weight + e * a.D;
                    if (last - e >= 4) scores_of<4>(from, w, a.D, out);
                    else for (int64_t n = 0; n < last - e; n++) scores_of<1>(from, w + n * a.D, a.D, out + n);
                }
            }
        }
    }
}

}  // namespace
