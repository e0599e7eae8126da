// The largest value of each row and whether the row is sound: see argmax.py for the contract.

namespace {

struct ArgmaxWords {
    const float* x;  // (S, V), rows `stride` apart
    int64_t* ids;    // (S,)
    bool* sound;     // (S,)
    int64_t S, V, stride;
};

struct Found {
    float value;
    int64_t id;
    bool nan;
};

constexpr int64_t PIECE = 1 << 14, RUN = 32 * W;  // floats of a task; of what is compared as one

// The largest of a run and, in `odd`, where the lanes held a NaN. No ids yet: they would double the work.
inline float largest_of_run(const float* x, vi& odd) {
    vf most[4];
    for (int n = 0; n < 4; n++) most[n] = load<vf>(x + n * W);
    for (int n = 0; n < 4; n++) odd |= (vi)(most[n] != most[n]);
    for (int64_t i = 4 * W; i < RUN; i += 4 * W) {
        for (int n = 0; n < 4; n++) {
            vf v = load<vf>(x + i + n * W);
            odd |= (vi)(v != v);
            most[n] = larger(v, most[n]);
        }
    }
    float parts[W], best = -__builtin_inff();
    store(parts, larger(larger(most[0], most[1]), larger(most[2], most[3])));
    for (int i = 0; i < W; i++) best = parts[i] > best ? parts[i] : best;
    return best;
}

// Elements [first, last) of a row. Only the run that holds the largest value is read again, for its place.
inline Found largest_of(const float* x, int64_t first, int64_t last) {
    Found found{-__builtin_inff(), first, false};
    vi odd = vi{};
    int64_t at = first, winner = -1;
    for (; at + RUN <= last; at += RUN) {
        const float value = largest_of_run(x + at, odd);
        if (value > found.value) {
            found.value = value;
            winner = at;
        }
    }
    if (winner >= 0) {
        found.id = winner;
        while (found.id < winner + RUN - 1 && x[found.id] != found.value) found.id++;
    }
    for (; at < last; at++) {
        found.nan |= x[at] != x[at];
        if (x[at] > found.value) found.value = x[at], found.id = at;
    }
    int32_t lanes[W];
    store(lanes, odd);
    for (int i = 0; i < W; i++) found.nan |= lanes[i] != 0;
    return found;
}

void argmax(const int64_t* words) {
    const ArgmaxWords& a = *reinterpret_cast<const ArgmaxWords*>(words);
    const int64_t pieces = (a.V + PIECE - 1) / PIECE, tasks = a.S * pieces;
    std::vector<Found> found(static_cast<size_t>(tasks));
#pragma omp parallel for schedule(static) if (a.S * a.V > 1 << 17)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t first = task % pieces * PIECE, last = first + PIECE < a.V ? first + PIECE : a.V;
        found[size_t(task)] = largest_of(a.x + task / pieces * a.stride, first, last);
    }
    for (int64_t row = 0; row < a.S; row++) {
        Found best = found[size_t(row * pieces)];
        for (int64_t i = 1; i < pieces; i++) {  // in order, so that of equal values the first stays
            const Found& next = found[size_t(row * pieces + i)];
            const bool nan = best.nan | next.nan;
            if (next.value > best.value) best = next;
            best.nan = nan;
        }
        a.ids[row] = best.id;
        a.sound[row] = !best.nan && best.value - best.value == 0;  // neither infinity
    }
}

}  // namespace
