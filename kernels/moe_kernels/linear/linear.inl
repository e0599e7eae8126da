// Products with packed weights: see linear.py for the contract.
//
// A row's sum over K runs from the first pair to the last in one accumulator, however many rows stand beside it: its
// bits do not depend on them.

namespace {

constexpr int PANEL = 16;                    // output columns whose weights lie together: [K / 2][16][2]
constexpr int LANES = PANEL / W;             // vectors across a panel
constexpr int TILE_ROWS = W == 16 ? 8 : 4;   // as many accumulators as there are registers, but for the operands
constexpr int BLOCK_ROWS = 32;               // widened to float at once, into a buffer of the thread
constexpr int64_t ALONE = 1 << 17;           // up to so many products one thread is done before others have woken

template <int M, int P>
inline void tile(const float* x, int64_t K, const bf16* w, int64_t panel_size, float* out, int64_t out_stride) {
    vf acc[M][P * LANES];
    for (int m = 0; m < M; m++)
        for (int j = 0; j < P * LANES; j++) acc[m][j] = vf{};
    for (int64_t k = 0; k < K; k += 2) {
        for (int j = 0; j < P * LANES; j++) {
            vi pairs = load<vi>(w + (j / LANES) * panel_size + k * PANEL + (j % LANES) * 2 * W);
            vf even = (vf)(pairs << 16), odd = (vf)(pairs & int32_t(0xffff0000));
            for (int m = 0; m < M; m++) {
                acc[m][j] = even * x[m * K + k] + acc[m][j];
                acc[m][j] = odd * x[m * K + k + 1] + acc[m][j];
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int j = 0; j < P * LANES; j++) store(out + m * out_stride + j * W, acc[m][j]);
}

// Some rows (at most TILE_ROWS) times one panel.
inline void tiles(int rows, const float* x, int64_t K, const bf16* w, float* out, int64_t out_stride) {
    switch (rows) {
        case 1: return tile<1, 1>(x, K, w, 0, out, out_stride);
        case 2: return tile<2, 1>(x, K, w, 0, out, out_stride);
        case 3: return tile<3, 1>(x, K, w, 0, out, out_stride);
        case 4: return tile<4, 1>(x, K, w, 0, out, out_stride);
#if MOE_WIDTH == 16
        case 5: return tile<5, 1>(x, K, w, 0, out, out_stride);
        case 6: return tile<6, 1>(x, K, w, 0, out, out_stride);
        case 7: return tile<7, 1>(x, K, w, 0, out, out_stride);
        case 8: return tile<8, 1>(x, K, w, 0, out, out_stride);
#endif
    }
}

// Two panels side by side: more sums in flight where there are few rows. Out is [rows][32].
inline void tiles_of_two(int rows, const float* x, int64_t K, const bf16* w, float* out) {
    int64_t panel = K * PANEL;
    if (rows == 1) return tile<1, 2>(x, K, w, panel, out, 2 * PANEL);
    if (rows == 2) return tile<2, 2>(x, K, w, panel, out, 2 * PANEL);
    tiles(rows, x, K, w, out, 2 * PANEL);
    tiles(rows, x, K, w + panel, out + PANEL, 2 * PANEL);
}

inline void widen_rows(const bf16* x, int64_t stride, int rows, int64_t K, float* to) {
    for (int m = 0; m < rows; m++) {
        int64_t k = 0;
        for (; k + W <= K; k += W) store(to + m * K + k, widen(x + m * stride + k));
        for (; k < K; k++) to[m * K + k] = widen(x[m * stride + k]);
    }
}

inline float* thread_floats(size_t count) {
    static thread_local std::vector<float> buffer;
    if (buffer.size() < count) buffer.resize(count);
    return buffer.data();
}

struct LinearWords {
    const bf16* x;       // (R, K), rows `x_stride` apart
    const bf16* weight;  // (N / 16, K / 2, 16, 2)
    const bf16* bias;    // (N,) or null
    void* out;           // (R, N), bfloat16, or float32 if `wide`
    int64_t R, K, N, x_stride, wide;
};

void linear(const int64_t* words) {
    const LinearWords& a = *reinterpret_cast<const LinearWords*>(words);
    const int64_t panels = a.N / PANEL, per_task = 4, tasks = (panels + per_task - 1) / per_task;
    std::atomic<int64_t> next{0};
#pragma omp parallel if (tasks > 1 && a.R * a.K * a.N > ALONE)
    {
        float* x = thread_floats(size_t(BLOCK_ROWS * a.K));
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            int64_t last = (task + 1) * per_task < panels ? (task + 1) * per_task : panels;
            for (int64_t row = 0; row < a.R; row += BLOCK_ROWS) {
                int block = int(a.R - row < BLOCK_ROWS ? a.R - row : BLOCK_ROWS);
                widen_rows(a.x + row * a.x_stride, a.x_stride, block, a.K, x);
                for (int64_t p = task * per_task; p < last; p += 2) {
                    bool both = p + 1 < last;
                    for (int m = 0; m < block; m += TILE_ROWS) {
                        int rows = block - m < TILE_ROWS ? block - m : TILE_ROWS;
                        float sums[TILE_ROWS * 2 * PANEL];
                        const bf16* w = a.weight + p * PANEL * a.K;
                        if (both) tiles_of_two(rows, x + m * a.K, a.K, w, sums);
                        else tiles(rows, x + m * a.K, a.K, w, sums, 2 * PANEL);
                        for (int i = 0; i < rows; i++) {
                            for (int j = 0; j < (both ? 2 : 1) * PANEL; j += W) {
                                vf v = load<vf>(sums + i * 2 * PANEL + j);
                                int64_t column = p * PANEL + j, at = (row + m + i) * a.N + column;
                                if (a.bias) v += widen(a.bias + column);
                                if (a.wide) store(static_cast<float*>(a.out) + at, v);
                                else narrow(static_cast<bf16*>(a.out) + at, v);
                            }
                        }
                    }
                }
            }
        }
    }
}

}  // namespace
