// Products with packed weights: see linear.py for the contract.
//
// A row's sum over K runs from the first inputs to the last in one accumulator, however many rows stand beside it: its
// bits do not depend on them.

namespace {

constexpr int PANEL = 16;                    // output columns whose weights lie together: [K / 2][16][2]
constexpr int BLOCK_ROWS = 32;               // taken at once into a buffer of the thread, in the form of the products
constexpr int64_t ALONE = 1 << 17;           // up to so many products one thread is done before others have woken

inline void widen_row(const bf16* x, int64_t K, float* to) {
    int64_t k = 0;
    for (; k + W <= K; k += W) store(to + k, widen(x + k));
    for (; k < K; k++) to[k] = widen(x[k]);
}

// A buffer of the thread at the start of a cache line.
inline float* thread_floats(int64_t count) {
    static thread_local std::vector<float> buffer;
    if (buffer.size() < size_t(count) + 16) buffer.resize(size_t(count) + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~uintptr_t(63));
}

}  // namespace

// What the products of a path give: Taken, an input or a pair of them; Session, alive while a thread multiplies;
// taken_floats(K), the buffer for BLOCK_ROWS rows, taken_stride(K) apart; take_row(), which fills one; product(), which
// adds to the sums (rows, 32) of those rows with one panel, or with two that follow each other, what some of the K
// inputs give; DEPTH, for how many inputs the rows stay in the first cache.
#ifdef MOE_AMX
#include "product_amx.inl"
#else
#include "product_vector.inl"
#endif

namespace {

inline void take_rows(const bf16* x, int64_t stride, int rows, int64_t K, Taken* to) {
    for (int m = 0; m < rows; m++) take_row(x + m * stride, K, to + m * taken_stride(K));
}

constexpr int64_t PASS_PANELS = 8;
constexpr int64_t PASS_SUMS = PASS_PANELS * PANEL * BLOCK_ROWS;

// Panels of a task: of many rows' more, so that rows are not fetched again for each few, yet not more than the second
// cache holds while block after block of rows passes.
inline int64_t task_panels(int64_t rows) { return rows > BLOCK_ROWS ? 4 * PASS_PANELS : PASS_PANELS; }

// Sums of up to PASS_PANELS panels, two by two: (rows, 32) at each BLOCK_ROWS * 32. A few rows are in the first cache
// as a whole, and then each panel is one stream of memory.
inline void products(int rows, const Taken* x, int64_t K, const bf16* w, int64_t panels, float* sums) {
    const int64_t depth = rows > BLOCK_ROWS / 2 ? DEPTH : K;
    for (int64_t from = 0; from < K; from += depth) {
        const int64_t to = from + depth < K ? from + depth : K;
        for (int64_t p = 0; p < panels; p += 2)
            product(rows, x, K, w + p * PANEL * K, p + 1 < panels, from, to, sums + p * PANEL * BLOCK_ROWS);
    }
}

inline int64_t sum_at(int row, int64_t column) {
    return column / (2 * PANEL) * 2 * PANEL * BLOCK_ROWS + row * 2 * PANEL + column % (2 * PANEL);
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
    const int64_t panels = a.N / PANEL, per_task = task_panels(a.R), tasks = (panels + per_task - 1) / per_task;
    std::atomic<int64_t> next{0};
#pragma omp parallel if (tasks > 1 && a.R * a.K * a.N > ALONE)
    {
        Session session;
        Taken* x = reinterpret_cast<Taken*>(thread_floats(taken_floats(a.K)));
        alignas(64) float sums[PASS_SUMS];
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            const int64_t last = (task + 1) * per_task < panels ? (task + 1) * per_task : panels;
            for (int64_t row = 0; row < a.R; row += BLOCK_ROWS) {
                const int rows = int(a.R - row < BLOCK_ROWS ? a.R - row : BLOCK_ROWS);
                take_rows(a.x + row * a.x_stride, a.x_stride, rows, a.K, x);
                for (int64_t first = task * per_task; first < last; first += PASS_PANELS) {
                    const int64_t count = last - first < PASS_PANELS ? last - first : PASS_PANELS;
                    products(rows, x, a.K, a.weight + first * PANEL * a.K, count, sums);
                    for (int i = 0; i < rows; i++) {
                        for (int64_t j = 0; j < count * PANEL; j += W) {
                            vf v = load<vf>(sums + sum_at(i, j));
                            const int64_t column = first * PANEL + j, at = (row + i) * a.N + column;
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

}  // namespace
