// Attention's inner products with AMX: scores as keys (16, d) times queries (d, 16), so that queries lie across a
// vector for the softmax; weights are rounded to bfloat16 and turned around for their product with the values.

namespace {

inline int64_t depth_of(int64_t d) { return up_to(d, TILE_DEPTH); }

inline int64_t queries_floats(int64_t d) { return depth_of(d) / 2 * TILE; }        // pairs (d / 2, 16, 2)
inline int64_t keys_floats(int64_t d) { return CHUNK * depth_of(d) / 2; }          // (CHUNK, d)
inline int64_t values_floats(int64_t d) { return CHUNK / 2 * up_to(d, 16); }       // pairs (CHUNK / 2, d, 2)

// A row that is not there is zeros.
inline void take_queries(const bf16* const* rows, int64_t d, float* to) {
    for (int64_t at = 0; at < d; at += TILE_DEPTH) {
        const __mmask32 there = d - at < TILE_DEPTH ? (1u << (d - at)) - 1 : ~0u;
        __m512i words[TILE];
        for (int r = 0; r < TILE; r++)
            words[r] = rows[r] ? _mm512_maskz_loadu_epi16(there, rows[r] + at) : _mm512_setzero_si512();
        transpose(words, reinterpret_cast<int32_t*>(to) + at / 2 * TILE, TILE);
    }
}

inline void take_key(const bf16* from, int64_t i, int64_t d, float* to) {
    bf16* row = reinterpret_cast<bf16*>(to) + i * depth_of(d);
    for (int64_t at = 0; at < d; at += TILE_DEPTH) {
        const __mmask32 there = d - at < TILE_DEPTH ? (1u << (d - at)) - 1 : ~0u;
        _mm512_storeu_si512(row + at, _mm512_maskz_loadu_epi16(there, from + at));
    }
}

inline void take_values(const bf16* even, const bf16* odd, int64_t i, int64_t d, float* to) {
    int32_t* row = reinterpret_cast<int32_t*>(to) + i / 2 * up_to(d, 16);
    for (int64_t at = 0; at < d; at += 16) {
        const __mmask16 there = d - at < 16 ? __mmask16((1u << (d - at)) - 1) : __mmask16(~0u);
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, even + at));
        if (odd) low |= _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, odd + at)), 16);
        _mm512_storeu_si512(row + at, low);
    }
}

// A tile's values after the last are zeros: their weights are, and nothing times zero may be NaN.
inline void end_values(int64_t count, int64_t d, float* to) {
    const int64_t pairs = (count + 1) / 2, until = up_to(count, TILE_DEPTH) / 2;
    std::memset(to + pairs * up_to(d, 16), 0, size_t((until - pairs) * up_to(d, 16)) * 4);
}

// Keys after the last of `n`, up to a whole tile, give scores that nobody reads.
inline void score(const float* q, const float* keys, int64_t n, int64_t d, float* to) {
    const int64_t depth = depth_of(d);
    const bf16* k = reinterpret_cast<const bf16*>(keys);
    _tile_zero(0);
    if (n > 16) _tile_zero(1);
    if (n > 32) _tile_zero(2);
    if (n > 48) _tile_zero(3);
    for (int64_t at = 0; at < depth; at += TILE_DEPTH) {
        _tile_loadd(6, q + at / 2 * TILE, 64);
        _tile_loadd(4, k + at, depth * 2);
        _tile_dpbf16ps(0, 4, 6);
        if (n > 16) {
            _tile_loadd(5, k + 16 * depth + at, depth * 2);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (n > 32) {
            _tile_loadd(4, k + 32 * depth + at, depth * 2);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (n > 48) {
            _tile_loadd(5, k + 48 * depth + at, depth * 2);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    _tile_stored(0, to, 64);
    if (n > 16) _tile_stored(1, to + 16 * GROUP, 64);
    if (n > 32) _tile_stored(2, to + 32 * GROUP, 64);
    if (n > 48) _tile_stored(3, to + 48 * GROUP, 64);
}

static_assert(CHUNK == 4 * TILE && GROUP == TILE, "score() has a tile for each 16 keys of a chunk");

// Weights (n, 16), n up to a multiple of 32 with zeros, as rows (16, CHUNK) in bfloat16.
inline void turn(const float* weights, int64_t n, int32_t* to) {
    alignas(64) static constexpr uint16_t IN_PAIRS[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i in_pairs = _mm512_load_si512(IN_PAIRS);
    for (int64_t from = 0; from < n; from += TILE_DEPTH) {
        __m512i pairs[TILE_PAIRS];
        for (int64_t i = 0; i < TILE_PAIRS; i++) {
            const int64_t key = from + 2 * i;
            const __m512 even = key < n ? _mm512_loadu_ps(weights + key * GROUP) : _mm512_setzero_ps();
            const __m512 odd = key + 1 < n ? _mm512_loadu_ps(weights + (key + 1) * GROUP) : _mm512_setzero_ps();
            pairs[i] = _mm512_permutexvar_epi16(in_pairs, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
        }
        transpose(pairs, to + from / 2, CHUNK / 2);
    }
}

template <int N>
inline void weigh_tiles(float* sums, int64_t width, const float* keep, const int32_t* weights, const int32_t* values,
                        int64_t n) {
    _tile_zero(0);
    if (N > 1) _tile_zero(1);
    for (int64_t from = 0; from < n; from += TILE_DEPTH) {
        const int32_t* v = values + from / 2 * width;
        _tile_loadd(4, weights + from / 2, CHUNK * 2);
        _tile_loadd(6, v, width * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, v + 16, width * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
    }
    alignas(64) float products[2][TILE * 16];
    _tile_stored(0, products[0], 64);
    if (N > 1) _tile_stored(1, products[1], 64);
    for (int64_t r = 0; r < TILE; r++)
        for (int j = 0; j < N; j++) {
            float* to = sums + r * width + j * 16;
            store(to, load<vf>(to) * keep[r] + load<vf>(products[j] + r * 16));
        }
}

inline void weigh(float* sums, const float* keep, const float* weights, const float* values, int64_t n, int64_t d,
                  int64_t) {
    const int64_t width = up_to(d, 16);
    const int32_t* v = reinterpret_cast<const int32_t*>(values);
    alignas(64) int32_t rows[TILE * CHUNK / 2];
    turn(weights, n, rows);
    int64_t at = 0;
    for (; at + 32 <= width; at += 32) weigh_tiles<2>(sums + at, width, keep, rows, v + at, n);
    if (at < width) weigh_tiles<1>(sums + at, width, keep, rows, v + at, n);
}

}  // namespace
