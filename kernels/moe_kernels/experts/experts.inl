// down(silu(gate(x)) * up(x)) for rows sorted by expert: see experts.py for the contract.

namespace {

struct ExpertsWords {
    const bf16* rows;      // (R, D)
    const int64_t* counts; // (e,)
    const bf16* gate_up;   // (e, 2F / 16, D / 2, 16, 2), panels of gate and up in turns
    const bf16* down;      // (e, D / 16, F / 2, 16, 2)
    bf16* inner;           // (R, F), what stands between the two products
    bf16* out;             // (R, D)
    int64_t e, D, F;
    // Null, or (R,), each t * K + k: then row r is row t of `rows`, which are `stride` apart, and its result goes to
    // row t * K + k of `out`.
    const int64_t* pairs;
    int64_t K, stride;

    const bf16* row(int64_t r) const { return rows + (pairs ? pairs[r] / K * stride : r * D); }
    bf16* result(int64_t r) const { return out + (pairs ? pairs[r] : r) * D; }
};

// Some panels of one expert, for all of its rows.
struct ExpertTask {
    int64_t expert, first_row, count, begin, end;
};

// One expert's rows through some of its panels of gate and up.
inline void gate_up_task(const ExpertsWords& a, const ExpertTask& t, Taken* x, float* sums) {
    const bf16* weights = a.gate_up + t.expert * 2 * a.F * a.D;
    for (int64_t row = 0; row < t.count; row += BLOCK_ROWS) {
        const int rows = int(t.count - row < BLOCK_ROWS ? t.count - row : BLOCK_ROWS);
        for (int i = 0; i < rows; i++) take_row(a.row(t.first_row + row + i), a.D, x + i * taken_stride(a.D));
        for (int64_t first = t.begin; first < t.end; first += PASS_PANELS) {
            const int64_t panels = t.end - first < PASS_PANELS ? t.end - first : PASS_PANELS;
            products(rows, x, a.D, weights + first * PANEL * a.D, panels, sums);
            for (int i = 0; i < rows; i++) {
                bf16* to = a.inner + (t.first_row + row + i) * a.F + first / 2 * PANEL;
                for (int64_t j = 0; j < panels / 2 * PANEL; j += W) {
                    const int64_t gate = sum_at(i, j / PANEL * 2 * PANEL + j % PANEL);
                    narrow(to + j, silu(load<vf>(sums + gate)) * load<vf>(sums + gate + PANEL));
                }
            }
        }
    }
}

inline void down_task(const ExpertsWords& a, const ExpertTask& t, Taken* x, float* sums) {
    const bf16* weights = a.down + t.expert * a.D * a.F;
    for (int64_t row = 0; row < t.count; row += BLOCK_ROWS) {
        const int rows = int(t.count - row < BLOCK_ROWS ? t.count - row : BLOCK_ROWS);
        take_rows(a.inner + (t.first_row + row) * a.F, a.F, rows, a.F, x);
        for (int64_t first = t.begin; first < t.end; first += PASS_PANELS) {
            const int64_t panels = t.end - first < PASS_PANELS ? t.end - first : PASS_PANELS;
            products(rows, x, a.F, weights + first * PANEL * a.F, panels, sums);
            for (int i = 0; i < rows; i++) {
                bf16* to = a.result(t.first_row + row + i) + first * PANEL;
                for (int64_t j = 0; j < panels * PANEL; j += W) narrow(to + j, load<vf>(sums + sum_at(i, j)));
            }
        }
    }
}

inline std::vector<ExpertTask> tasks_of(const ExpertsWords& a, int64_t panels) {
    std::vector<ExpertTask> tasks;
    int64_t row = 0;
    for (int64_t expert = 0; expert < a.e; row += a.counts[expert++]) {
        const int64_t count = a.counts[expert], per_task = task_panels(count);
        for (int64_t begin = 0; count && begin < panels; begin += per_task)
            tasks.push_back({expert, row, count, begin, begin + per_task < panels ? begin + per_task : panels});
    }
    return tasks;
}

void experts(const int64_t* words) {
    const ExpertsWords& a = *reinterpret_cast<const ExpertsWords*>(words);
    const std::vector<ExpertTask> up = tasks_of(a, 2 * a.F / PANEL), down = tasks_of(a, a.D / PANEL);
    const int64_t rows = up.back().first_row + up.back().count;
    std::atomic<size_t> next_up{0}, next_down{0};
#pragma omp parallel if (rows * a.D * a.F > ALONE)
    {
        Session session;
        Taken* x = reinterpret_cast<Taken*>(thread_floats(taken_floats(a.D > a.F ? a.D : a.F)));
        alignas(64) float sums[PASS_SUMS];
        for (size_t i; (i = next_up.fetch_add(1, std::memory_order_relaxed)) < up.size();)
            gate_up_task(a, up[i], x, sums);
#pragma omp barrier
        for (size_t i; (i = next_down.fetch_add(1, std::memory_order_relaxed)) < down.size();)
            down_task(a, down[i], x, sums);
    }
}

}  // namespace
