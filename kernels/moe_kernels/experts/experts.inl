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

// One expert's rows through some of its gate and up panels.
inline void gate_up_task(const ExpertsWords& a, const Busy& busy, int64_t first, int64_t last, float* x) {
    const bf16* weights = a.gate_up + busy.expert * 2 * a.F * a.D;
    for (int64_t row = 0; row < busy.count; row += BLOCK_ROWS) {
        int block = int(busy.count - row < BLOCK_ROWS ? busy.count - row : BLOCK_ROWS);
        widen_rows(a.rows + (busy.first + row) * a.D, a.D, block, a.D, x);
        for (int64_t pair = first; pair < last; pair++) {
            for (int m = 0; m < block; m += TILE_ROWS) {
                int rows = block - m < TILE_ROWS ? block - m : TILE_ROWS;
                float sums[TILE_ROWS * 2 * PANEL];
                tiles_of_two(rows, x + m * a.D, a.D, weights + pair * 2 * PANEL * a.D, sums);
                for (int i = 0; i < rows; i++) {
                    bf16* to = a.inner + (busy.first + row + m + i) * a.F + pair * PANEL;
                    for (int j = 0; j < PANEL; j += W) {
                        vf gate = load<vf>(sums + i * 2 * PANEL + j), up = load<vf>(sums + i * 2 * PANEL + PANEL + j);
                        narrow(to + j, silu(gate) * up);
                    }
                }
            }
        }
    }
}

inline void down_task(const ExpertsWords& a, const Busy& busy, int64_t first, int64_t last, float* x) {
    const bf16* weights = a.down + busy.expert * a.D * a.F;
    for (int64_t row = 0; row < busy.count; row += BLOCK_ROWS) {
        int block = int(busy.count - row < BLOCK_ROWS ? busy.count - row : BLOCK_ROWS);
        widen_rows(a.inner + (busy.first + row) * a.F, a.F, block, a.F, x);
        for (int64_t p = first; p < last; p += 2) {
            bool both = p + 1 < last;
            for (int m = 0; m < block; m += TILE_ROWS) {
                int rows = block - m < TILE_ROWS ? block - m : TILE_ROWS;
                float sums[TILE_ROWS * 2 * PANEL];
                const bf16* w = weights + p * PANEL * a.F;
                if (both) tiles_of_two(rows, x + m * a.F, a.F, w, sums);
                else tiles(rows, x + m * a.F, a.F, w, sums, 2 * PANEL);
                for (int i = 0; i < rows; i++)
                    for (int j = 0; j < (both ? 2 : 1) * PANEL; j += W)
                        narrow(a.out + (busy.first + row + m + i) * a.D + p * PANEL + j,
                               load<vf>(sums + i * 2 * PANEL + j));
            }
        }
    }
}

void experts(const int64_t* words) {
    const ExpertsWords& a = *reinterpret_cast<const ExpertsWords*>(words);
    std::vector<Busy> busy;
    int64_t first = 0;
    for (int64_t expert = 0; expert < a.e; first += a.counts[expert++])
        if (a.counts[expert]) busy.push_back({expert, first, a.counts[expert]});
    const int64_t per_task = 4, pairs = a.F / PANEL, panels = a.D / PANEL;
    const int64_t up_tasks = (pairs + per_task - 1) / per_task, down_tasks = (panels + 2 * per_task - 1) / (2 * per_task);
    const int64_t num_busy = int64_t(busy.size());
    std::atomic<int64_t> next_up{0}, next_down{0};
#pragma omp parallel if (first * a.D * a.F > ALONE)
    {
        float* x = thread_floats(size_t(BLOCK_ROWS * (a.D > a.F ? a.D : a.F)));
        for (int64_t task; (task = next_up.fetch_add(1, std::memory_order_relaxed)) < num_busy * up_tasks;) {
            int64_t from = task % up_tasks * per_task, to = from + per_task < pairs ? from + per_task : pairs;
            gate_up_task(a, busy[size_t(task / up_tasks)], from, to, x);
        }
#pragma omp barrier
        for (int64_t task; (task = next_down.fetch_add(1, std::memory_order_relaxed)) < num_busy * down_tasks;) {
            int64_t from = task % down_tasks * 2 * per_task;
            int64_t to = from + 2 * per_task < panels ? from + 2 * per_task : panels;
            down_task(a, busy[size_t(task / down_tasks)], from, to, x);
        }
    }
}

}  // namespace
