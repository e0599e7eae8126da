// Attention over the paged cache: see attention.py for the contract.
//
// A query's keys are met in chunks of CHUNK positions and spans of SPAN, both counted from position 0, and spans are
// joined first to last: the order of every sum follows from positions alone, whichever thread takes which span.

namespace {

constexpr int64_t CHUNK = 64, SPAN = 1024;
constexpr int64_t GROUP = W;          // queries that lie across a vector
constexpr int64_t TILE_QUERIES = 128; // of one sequence and KV head, which share the keys that were taken

inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

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

// Of some queries, in whole groups: what a span gave. Sums are relative to `most`.
struct Partial {
    float* most;   // (queries,)
    float* total;  // (queries,)
    float* sums;   // (queries, d up to a multiple of 16)
};

struct TileOfQueries {
    int64_t sequence, head, first, tokens, span;  // span -1: all of them, one after the other
};

inline const bf16* query_at(const AttentionWords& a, const TileOfQueries& t, int64_t r) {
    const int64_t per_kv = a.H / a.G, first = a.sequences[t.sequence * 4] + t.first;
    return a.q + (first + r / per_kv) * a.q_stride + (t.head * per_kv + r % per_kv) * a.d;
}

// Where the positions of a chunk lie in a cache, from its slot 0 and head 0 on.
inline void find_in_cache(const AttentionWords& a, const TileOfQueries& t, int64_t from, int64_t count, int64_t* at) {
    const int32_t* block = a.blocks + a.sequences[t.sequence * 4 + 3] + from / a.block_size;
    int64_t within = from % a.block_size;
    for (int64_t i = 0; i < count; i++) {
        at[i] = ((*block * a.block_size + within) * a.G + t.head) * a.d;
        if (++within == a.block_size) within = 0, block++;
    }
}

}  // namespace

// What a path gives. Its buffers, in floats: queries_floats() of a group, keys_floats(), values_floats().
// take_queries(), take_key(), take_values(): rows of the model into them. score(): products of one group with `n` keys,
// (n, GROUP). weigh(): sums = sums * keep + weights (n, GROUP) . values (n, d), of one group.
#ifdef MOE_AMX
#include "attend_amx.inl"
#else
#include "attend_vector.inl"
#endif

namespace {

struct Buffers {
    float *q, *keys, *values, *weights;
    static int64_t floats(int64_t groups, int64_t d) {
        return groups * queries_floats(d) + keys_floats(d) + values_floats(d) + CHUNK * GROUP;
    }
    Buffers(float* from, int64_t groups, int64_t d)
        : q(from),
          keys(q + groups * queries_floats(d)),
          values(keys + keys_floats(d)),
          weights(values + values_floats(d)) {}
};

// Scores (n, GROUP) become weights relative to the largest so far; gives what earlier sums are to be multiplied with.
// A query sees keys 0 to its `limit`. A score that is not a number shows in `total`, and so in the result.
inline vf soften(float* weights, int64_t n, float scale, vi limit, bool all_seen, float* most, float* total) {
    const vf before = load<vf>(most);
    vf largest_ = splat(-INFINITY);
    for (int64_t i = 0; i < n; i++) {
        vf s = load<vf>(weights + i * W);
        if (!all_seen) {
            s = select((vi)(limit >= int32_t(i)), s, splat(-INFINITY));
            store(weights + i * W, s);
        }
        largest_ = larger(s, largest_);
    }
    largest_ = larger(largest_ * scale, before);
    const vf from = select((vi)(largest_ == splat(-INFINITY)), vf{}, largest_);
    vf sum_ = vf{};
    for (int64_t i = 0; i < n; i++) {
        vf p = exp_(load<vf>(weights + i * W) * scale - from);
        store(weights + i * W, p);
        sum_ += p;
    }
    const vf keep = exp_(before - from);
    store(most, largest_);
    store(total, load<vf>(total) * keep + sum_);
    return keep;
}

// The queries of a tile against the keys of one span that they may see.
inline void attend_span(const AttentionWords& a, const TileOfQueries& t, int64_t span, const Buffers& b, Partial out) {
    const int64_t per_kv = a.H / a.G, start = a.sequences[t.sequence * 4 + 2] + t.first, width = up_to(a.d, 16);
    const int64_t queries = t.tokens * per_kv, groups = (queries + GROUP - 1) / GROUP;
    for (int64_t r = 0; r < groups * GROUP; r++) out.most[r] = -INFINITY, out.total[r] = 0;
    std::memset(out.sums, 0, size_t(groups * GROUP * width) * 4);
    const int64_t end = start + t.tokens < (span + 1) * SPAN ? start + t.tokens : (span + 1) * SPAN;
    for (int64_t from = span * SPAN; from < end; from += CHUNK) {
        const int64_t count = end - from < CHUNK ? end - from : CHUNK;
        int64_t at[CHUNK];
        find_in_cache(a, t, from, count, at);
        for (int64_t i = 0; i < count; i++) take_key(a.k + at[i], i, a.d, b.keys);
        for (int64_t i = 0; i < count; i += 2)
            take_values(a.v + at[i], i + 1 < count ? a.v + at[i + 1] : nullptr, i, a.d, b.values);
        end_values(count, a.d, b.values);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = g * GROUP, last = first + GROUP < queries ? first + GROUP : queries;
            const int64_t nearest = start + first / per_kv - from, furthest = start + (last - 1) / per_kv - from;
            if (furthest < 0) continue;
            const int64_t n = furthest + 1 < count ? furthest + 1 : count;
            int32_t limits[GROUP];
            for (int64_t r = 0; r < GROUP; r++)
                limits[r] = int32_t(start + (first + r < last ? first + r : last - 1) / per_kv - from);
            score(b.q + g * queries_floats(a.d), b.keys, n, a.d, b.weights);
            float keep[GROUP];
            store(keep, soften(b.weights, n, float(a.scale), load<vi>(limits), nearest >= n - 1, out.most + first,
                               out.total + first));
            weigh(out.sums + first * width, keep, b.weights, b.values, n, a.d, last - first);
        }
    }
}

inline void join(Partial whole, Partial part, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; r++) {
        if (part.total[r] == 0) continue;  // it saw no key of this span
        if (whole.total[r] == 0) {
            whole.most[r] = part.most[r];
            whole.total[r] = part.total[r];
            for (int64_t i = 0; i < width; i++) whole.sums[r * width + i] = part.sums[r * width + i];
            continue;
        }
        const float most = part.most[r] > whole.most[r] || part.most[r] != part.most[r] ? part.most[r] : whole.most[r];
        float keep[W], add[W];
        store(keep, exp_(splat(whole.most[r] - most)));
        store(add, exp_(splat(part.most[r] - most)));
        whole.most[r] = most;
        whole.total[r] = whole.total[r] * keep[0] + part.total[r] * add[0];
        for (int64_t i = 0; i < width; i++)
            whole.sums[r * width + i] = whole.sums[r * width + i] * keep[0] + part.sums[r * width + i] * add[0];
    }
}

inline Partial partial_at(float* from, int64_t rows) { return {from, from + rows, from + 2 * rows}; }

inline void write_out(const AttentionWords& a, const TileOfQueries& t, Partial whole) {
    const int64_t per_kv = a.H / a.G, first = a.sequences[t.sequence * 4] + t.first;
    for (int64_t r = 0; r < t.tokens * per_kv; r++) {
        bf16* out = a.out + ((first + r / per_kv) * a.H + t.head * per_kv + r % per_kv) * a.d;
        const float inverse = 1.0f / whole.total[r];
        for (int64_t i = 0; i < a.d; i++) out[i] = narrow(whole.sums[r * up_to(a.d, 16) + i] * inverse);
    }
}

void attention(const int64_t* words) {
    const AttentionWords& a = *reinterpret_cast<const AttentionWords*>(words);
    const int64_t per_kv = a.H / a.G, width = up_to(a.d, 16);
    const int64_t tile_tokens = per_kv < TILE_QUERIES ? TILE_QUERIES / per_kv : 1;
    const int64_t max_queries = up_to(tile_tokens * per_kv, GROUP), partial_size = max_queries * (width + 2);
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
            for (int64_t first = 0; first < seq[1]; first += tile_tokens)
                tiles_.push_back({s, head, first, seq[1] - first < tile_tokens ? seq[1] - first : tile_tokens, -1});
        }
    }
    const int64_t num_tiles = int64_t(tiles_.size()), num_split = int64_t(split.size());
    std::vector<float> parts;  // of the spans that are tiles of their own
    const int64_t part_queries = up_to(per_kv, GROUP), part_size = part_queries * (width + 2);
    if (num_split) parts.resize(size_t(num_tiles * part_size));
    std::atomic<int64_t> next{0}, next_join{0};
#pragma omp parallel if (num_tiles > 1)
    {
        Session session;
        const int64_t buffers = up_to(Buffers::floats(max_queries / GROUP, a.d), 16);
        float* own = thread_floats(buffers + 2 * partial_size);
        const Buffers b(own, max_queries / GROUP, a.d);
        const Partial whole = partial_at(own + buffers, max_queries),
                      part = partial_at(own + buffers + partial_size, max_queries);
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tiles;) {
            const TileOfQueries& t = tiles_[size_t(i)];
            const int64_t queries = t.tokens * per_kv;
            for (int64_t first = 0; first < queries; first += GROUP) {
                const bf16* rows[GROUP] = {};
                for (int64_t r = first; r < queries && r < first + GROUP; r++) rows[r - first] = query_at(a, t, r);
                take_queries(rows, a.d, b.q + first / GROUP * queries_floats(a.d));
            }
            if (t.span >= 0) {
                attend_span(a, t, t.span, b, partial_at(parts.data() + i * part_size, part_queries));
                continue;
            }
            const int64_t end = a.sequences[t.sequence * 4 + 2] + t.first + t.tokens;
            attend_span(a, t, 0, b, whole);
            for (int64_t span = 1; span * SPAN < end; span++) {
                attend_span(a, t, span, b, part);
                join(whole, part, queries, width);
            }
            write_out(a, t, whole);
        }
#pragma omp barrier
        for (int64_t i; (i = next_join.fetch_add(1, std::memory_order_relaxed)) < num_split;) {
            const int64_t at = split[size_t(i)];
            const Partial first = partial_at(parts.data() + at * part_size, part_queries);
            for (int64_t other = at + 1; other < num_tiles && tiles_[size_t(other)].span > 0; other++)
                join(first, partial_at(parts.data() + other * part_size, part_queries), per_kv, width);
            write_out(a, tiles_[size_t(at)], first);
        }
    }
}

}  // namespace
