// Attention over the paged cache: see attention.py for the contract.
//
// A query's keys are met in chunks of CHUNK positions and spans of SPAN, both counted from position 0, and spans are
// joined first to last: the order of every sum follows from positions alone, whichever thread takes which span.

namespace {

constexpr int64_t CHUNK = 32, SPAN = 1024;
constexpr int64_t TILE_TOKENS = 8;  // new tokens of one sequence that share widened keys

struct AttentionWords {
    const bf16* q;              // (T, H, d), rows `q_stride` apart
    const bf16* k;              // (slots, G, d)
    const bf16* v;              // (slots, G, d)
    bf16* out;                  // (T, H, d)
    const int32_t* blocks;      // of all sequences, one after the other
    const int64_t* sequences;   // (S, 4): first row, rows, position of the first row, first of its blocks
    int64_t S, H, G, d, block_size, q_stride;
    double scale;
};

// Of `rows` queries: what a span gave. Sums are relative to `most`.
struct Partial {
    float* most;   // (rows,)
    float* total;  // (rows,)
    float* sums;   // (rows, d)
};

struct TileOfQueries {
    int64_t sequence, head, first, tokens, span;  // span -1: all of them, one after the other
};

inline void widen_head(const bf16* cache, const AttentionWords& a, const int32_t* blocks, int64_t head, int64_t from,
                       int64_t count, float* to) {
    for (int64_t i = 0; i < count; i++) {
        int64_t position = from + i;
        int64_t slot = blocks[position / a.block_size] * a.block_size + position % a.block_size;
        widen_rows(cache + (slot * a.G + head) * a.d, a.d, 1, a.d, to + i * a.d);
    }
}

inline float dot(const float* a, const float* b, int64_t n) {
    vf acc = vf{};
    int64_t i = 0;
    for (; i + W <= n; i += W) acc = load<vf>(a + i) * load<vf>(b + i) + acc;
    float total = sum(acc);
    for (; i < n; i++) total = a[i] * b[i] + total;
    return total;
}

// sums (d,) = sums * keep + p (n,) . v (n, d)
template <int N>
inline void weigh(float* sums, float keep, const float* p, const float* v, int64_t n, int64_t d) {
    vf acc[N];
    for (int j = 0; j < N; j++) acc[j] = load<vf>(sums + j * W) * keep;
    for (int64_t i = 0; i < n; i++)
        for (int j = 0; j < N; j++) acc[j] = load<vf>(v + i * d + j * W) * p[i] + acc[j];
    for (int j = 0; j < N; j++) store(sums + j * W, acc[j]);
}

inline void weigh_all(float* sums, float keep, const float* p, const float* v, int64_t n, int64_t d) {
    int64_t at = 0;
    for (; at + 4 * W <= d; at += 4 * W) weigh<4>(sums + at, keep, p, v + at, n, d);
    for (; at + W <= d; at += W) weigh<1>(sums + at, keep, p, v + at, n, d);
    for (; at < d; at++) {
        float acc = sums[at] * keep;
        for (int64_t i = 0; i < n; i++) acc = v[i * d + at] * p[i] + acc;
        sums[at] = acc;
    }
}

// The queries of a tile against the keys of one span that they may see.
inline void attend_span(const AttentionWords& a, const TileOfQueries& t, int64_t span, const float* q, float* keys,
                        Partial out) {
    const int64_t* seq = a.sequences + t.sequence * 4;
    const int32_t* blocks = a.blocks + seq[3];
    const int64_t per_kv = a.H / a.G, start = seq[2] + t.first, rows = t.tokens * per_kv;
    for (int64_t r = 0; r < rows; r++) {
        out.most[r] = -INFINITY;
        out.total[r] = 0;
        for (int64_t i = 0; i < a.d; i++) out.sums[r * a.d + i] = 0;
    }
    const int64_t end = start + t.tokens < (span + 1) * SPAN ? start + t.tokens : (span + 1) * SPAN;
    for (int64_t from = span * SPAN; from < end; from += CHUNK) {
        const int64_t count = end - from < CHUNK ? end - from : CHUNK;
        float* values = keys + CHUNK * a.d;
        widen_head(a.k, a, blocks, t.head, from, count, keys);
        widen_head(a.v, a, blocks, t.head, from, count, values);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t seen = start + r / per_kv + 1 - from, n = seen < count ? seen : count;
            if (n <= 0) continue;
            float p[CHUNK];
            float most = out.most[r];
            for (int64_t i = 0; i < n; i++) {
                p[i] = dot(q + r * a.d, keys + i * a.d, a.d);
                most = p[i] > most || p[i] != p[i] ? p[i] : most;
            }
            for (int64_t i = n; i < CHUNK; i++) p[i] = -INFINITY;
            for (int64_t i = 0; i < CHUNK; i += W) store(p + i, exp_(load<vf>(p + i) - most));
            float keep[W];
            store(keep, exp_(splat(out.most[r] - most)));
            float total = 0;
            for (int64_t i = 0; i < n; i++) total += p[i];
            out.total[r] = out.total[r] * keep[0] + total;
            out.most[r] = most;
            weigh_all(out.sums + r * a.d, keep[0], p, values, n, a.d);
        }
    }
}

inline void join(Partial whole, Partial part, int64_t rows, int64_t d) {
    for (int64_t r = 0; r < rows; r++) {
        if (part.total[r] == 0) continue;  // it saw no key of this span
        if (whole.total[r] == 0) {
            whole.most[r] = part.most[r];
            whole.total[r] = part.total[r];
            for (int64_t i = 0; i < d; i++) whole.sums[r * d + i] = part.sums[r * d + i];
            continue;
        }
        const float most = part.most[r] > whole.most[r] || part.most[r] != part.most[r] ? part.most[r] : whole.most[r];
        float keep[W], add[W];
        store(keep, exp_(splat(whole.most[r] - most)));
        store(add, exp_(splat(part.most[r] - most)));
        whole.most[r] = most;
        whole.total[r] = whole.total[r] * keep[0] + part.total[r] * add[0];
        for (int64_t i = 0; i < d; i++) whole.sums[r * d + i] = whole.sums[r * d + i] * keep[0] + part.sums[r * d + i] * add[0];
    }
}

inline Partial partial_at(float* from, int64_t rows) { return {from, from + rows, from + 2 * rows}; }

inline void write_out(const AttentionWords& a, const TileOfQueries& t, Partial whole) {
    const int64_t per_kv = a.H / a.G, first = a.sequences[t.sequence * 4] + t.first;
    for (int64_t r = 0; r < t.tokens * per_kv; r++) {
        bf16* out = a.out + ((first + r / per_kv) * a.H + t.head * per_kv + r % per_kv) * a.d;
        const float inverse = 1.0f / whole.total[r];
        for (int64_t i = 0; i < a.d; i++) out[i] = narrow(whole.sums[r * a.d + i] * inverse);
    }
}

inline void load_queries(const AttentionWords& a, const TileOfQueries& t, float* q) {
    const int64_t per_kv = a.H / a.G, first = a.sequences[t.sequence * 4] + t.first;
    for (int64_t token = 0; token < t.tokens; token++) {
        const bf16* from = a.q + (first + token) * a.q_stride + t.head * per_kv * a.d;
        for (int64_t i = 0; i < per_kv * a.d; i++) q[token * per_kv * a.d + i] = widen(from[i]) * float(a.scale);
    }
}

void attention(const int64_t* words) {
    const AttentionWords& a = *reinterpret_cast<const AttentionWords*>(words);
    const int64_t per_kv = a.H / a.G, max_rows = TILE_TOKENS * per_kv, partial_size = max_rows * (a.d + 2);
    std::vector<TileOfQueries> tiles_;
    std::vector<int64_t> split;  // the first tile of each (sequence, head) whose spans are tiles of their own
    for (int64_t s = 0; s < a.S; s++) {
        const int64_t* seq = a.sequences + s * 4;
        const int64_t spans = (seq[2] + seq[1] + SPAN - 1) / SPAN;
        for (int64_t head = 0; head < a.G; head++) {
            if (seq[1] == 1 && spans > 1) {
                split.push_back(int64_t(tiles_.size()));
                for (int64_t span = 0; span < spans; span++) tiles_.push_back({s, head, 0, 1, span});
                continue;
            }
            for (int64_t first = 0; first < seq[1]; first += TILE_TOKENS)
                tiles_.push_back({s, head, first, seq[1] - first < TILE_TOKENS ? seq[1] - first : TILE_TOKENS, -1});
        }
    }
    const int64_t num_tiles = int64_t(tiles_.size()), num_split = int64_t(split.size());
    std::vector<float> parts;  // of the spans that are tiles of their own
    const int64_t part_size = per_kv * (a.d + 2);
    if (num_split) parts.resize(size_t(num_tiles * part_size));
    std::atomic<int64_t> next{0}, next_join{0};
#pragma omp parallel if (num_tiles > 1)
    {
        float* q = thread_floats(size_t(max_rows * a.d + 2 * CHUNK * a.d + 2 * partial_size));
        float *keys = q + max_rows * a.d, *own = keys + 2 * CHUNK * a.d;
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tiles;) {
            const TileOfQueries& t = tiles_[size_t(i)];
            const int64_t rows = t.tokens * per_kv;
            load_queries(a, t, q);
            if (t.span >= 0) {
                attend_span(a, t, t.span, q, keys, partial_at(parts.data() + i * part_size, rows));
                continue;
            }
            const int64_t end = a.sequences[t.sequence * 4 + 2] + t.first + t.tokens;
            Partial whole = partial_at(own, rows), part = partial_at(own + partial_size, rows);
            attend_span(a, t, 0, q, keys, whole);
            for (int64_t span = 1; span * SPAN < end; span++) {
                attend_span(a, t, span, q, keys, part);
                join(whole, part, rows, a.d);
            }
            write_out(a, t, whole);
        }
#pragma omp barrier
        for (int64_t i; (i = next_join.fetch_add(1, std::memory_order_relaxed)) < num_split;) {
            int64_t at = split[size_t(i)];
            const TileOfQueries& t = tiles_[size_t(at)];
            Partial whole = partial_at(parts.data() + at * part_size, per_kv);
            for (int64_t other = at + 1; other < num_tiles && tiles_[size_t(other)].span > 0; other++)
                join(whole, partial_at(parts.data() + other * part_size, per_kv), per_kv, a.d);
            write_out(a, t, whole);
        }
    }
}

}  // namespace
