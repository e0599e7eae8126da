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
};

struct Busy {
    int64_t expert, first, count;
};

// One expert's rows through some of its panels of gate and up.
inline void gate_up_task(const ExpertsWords& a, const Busy& busy, int64_t first, int64_t panels, Taken* x, float* sums) {
    const bf16* weights = a.gate_up + busy.expert * 2 * a.F * a.D;
    for (int64_t row = 0; row < busy.count; row += BLOCK_ROWS) {
        const int rows = int(busy.count - row < BLOCK_ROWS ? busy.count - row : BLOCK_ROWS);
        take_rows(a.rows + (busy.first + row) * a.D, a.D, rows, a.D, x);
        products(rows, x, a.D, weights + first * PANEL * a.D, panels, sums);
        for (int i = 0; i < rows; i++) {
            bf16* to = a.inner + (busy.first + row + i) * a.F + first / 2 * PANEL;
            for (int64_t j = 0; j < panels / 2 * PANEL; j += W) {
                const int64_t gate = sum_at(i, j / PANEL * 2 * PANEL + j % PANEL);
                narrow(to + j, silu(load<vf>(sums + gate)) * load<vf>(sums + gate + PANEL));
            }
        }
    }
}

inline void down_task(const ExpertsWords& a, const Busy& busy, int64_t first, int64_t panels, Taken* x, float* sums) {
    const bf16* weights = a.down + busy.expert * a.D * a.F;
    for (int64_t row = 0; row < busy.count; row += BLOCK_ROWS) {
        const int rows = int(busy.count - row < BLOCK_ROWS ? busy.count - row : BLOCK_ROWS);
        take_rows(a.inner + (busy.first + row) * a.F, a.F, rows, a.F, x);
        products(rows, x, a.F, weights + first * PANEL * a.F, panels, sums);
        for (int i = 0; i < rows; i++) {
            bf16* to = a.out + (busy.first + row + i) * a.D + first * PANEL;
            for (int64_t j = 0; j < panels * PANEL; j += W) narrow(to + j, load<vf>(sums + sum_at(i, j)));
        }
    }
}

void experts(const int64_t* words) {
    const ExpertsWords& a = *reinterpret_cast<const ExpertsWords*>(words);
    std::vector<Busy> busy;
    int64_t first = 0;
    for (int64_t expert = 0; expert < a.e; first += a.counts[expert++])
        if (a.counts[expert]) busy.push_back({expert, first, a.counts[expert]});
    const int64_t up_panels = 2 * a.F / PANEL, down_panels = a.D / PANEL;
    const int64_t up_tasks = (up_panels + TASK_PANELS - 1) / TASK_PANELS;
    const int64_t down_tasks = (down_panels + TASK_PANELS - 1) / TASK_PANELS;
    const int64_t num_busy = int64_t(busy.size());
    std::atomic<int64_t> next_up{0}, next_down{0};
#pragma omp parallel if (first * a.D * a.F > ALONE)
    {
        Session session;
        Taken* x = reinterpret_cast<Taken*>(thread_floats(taken_floats(a.D > a.F ? a.D : a.F)));
        alignas(64) float sums[TASK_SUMS];
        for (int64_t task; (task = next_up.fetch_add(1, std::memory_order_relaxed)) < num_busy * up_tasks;) {
            const int64_t from = task % up_tasks * TASK_PANELS, left = up_panels - from;
            gate_up_task(a, busy[size_t(task / up_tasks)], from, left < TASK_PANELS ? left : TASK_PANELS, x, sums);
        }
#pragma omp barrier
        for (int64_t task; (task = next_down.fetch_add(1, std::memory_order_relaxed)) < num_busy * down_tasks;) {
            const int64_t from = task % down_tasks * TASK_PANELS, left = down_panels - from;
            down_task(a, busy[size_t(task / down_tasks)], from, left < TASK_PANELS ? left : TASK_PANELS, x, sums);
        }
    }
}

}  // namespace
