// Rows in the order of the experts that want them: see sorting.py for the contract.

namespace {

struct SortWords {
    const void* slots;  // (P,) int64 if `wide`, else int32
    int64_t* pairs;     // (P,), of which the first R are written
    int64_t* counts;    // (e + 1,): rows of each expert, and R
    int64_t P, first, e, wide;
};

template <typename Slot>
inline void sort_slots(const SortWords& a) {
    const Slot* slots = static_cast<const Slot*>(a.slots);
    std::vector<int64_t> next(size_t(a.e), 0);
    for (int64_t p = 0; p < a.P; p++) {
        const uint64_t local = uint64_t(int64_t(slots[p]) - a.first);  // what lies before is too large, too
        if (local < uint64_t(a.e)) next[local]++;
    }
    int64_t before = 0;
    for (int64_t i = 0; i < a.e; i++) {
        a.counts[i] = next[size_t(i)];
        next[size_t(i)] = before;
        before += a.counts[i];
    }
    a.counts[a.e] = before;
    for (int64_t p = 0; p < a.P; p++) {
        const uint64_t local = uint64_t(int64_t(slots[p]) - a.first);
        if (local < uint64_t(a.e)) a.pairs[next[local]++] = p;
    }
}

void sort(const int64_t* words) {
    const SortWords& a = *reinterpret_cast<const SortWords*>(words);
    if (a.wide) sort_slots<int64_t>(a);
    else sort_slots<int32_t>(a);
}

struct GatherWords {
    const char* rows;      // (T, row_bytes), `stride_bytes` apart
    const int64_t* pairs;  // (R,)
    char* out;             // (R, row_bytes)
    int64_t R, K, row_bytes, stride_bytes;
};

void gather(const int64_t* words) {
    const GatherWords& a = *reinterpret_cast<const GatherWords*>(words);
    constexpr int64_t ROWS = 64;
    const int64_t tasks = (a.R + ROWS - 1) / ROWS;
    std::atomic<int64_t> next{0};
#pragma omp parallel if (tasks > 1 && a.R * a.row_bytes > 1 << 18)
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        const int64_t until = (task + 1) * ROWS < a.R ? (task + 1) * ROWS : a.R;
        for (int64_t r = task * ROWS; r < until; r++)
            std::memcpy(a.out + r * a.row_bytes, a.rows + a.pairs[r] / a.K * a.stride_bytes, size_t(a.row_bytes));
    }
}

}  // namespace
