// Attention's inner products with vectors, in float32: queries lie across a vector for scores, the width of a head for
// the weighted sums, so that nothing is added up within a vector.

namespace {

inline int64_t queries_floats(int64_t d) { return d * GROUP; }                  // (d, GROUP)
inline int64_t keys_floats(int64_t d) { return CHUNK * up_to(d, 16); }          // (CHUNK, d)
inline int64_t values_floats(int64_t d) { return CHUNK * up_to(d, 16); }        // (CHUNK, d up to a multiple of 16)

// A row that is not there is zeros.
inline void take_queries(const bf16* const* rows, int64_t d, float* to) {
    for (int64_t r = 0; r < GROUP; r++)
        for (int64_t i = 0; i < d; i++) to[i * GROUP + r] = rows[r] ? widen(rows[r][i]) : 0.0f;
}

inline void take_key(const bf16* from, int64_t i, int64_t d, float* to) { widen_row(from, d, to + i * d); }

inline void take_values(const bf16* even, const bf16* odd, int64_t i, int64_t d, float* to) {
    const int64_t width = up_to(d, 16);
    for (const bf16* from : {even, odd}) {
        if (from) widen_row(from, d, to + i * width);
        if (from && width > d) std::memset(to + i * width + d, 0, size_t(width - d) * 4);
        i++;
    }
}

inline void end_values(int64_t, int64_t, float*) {}

template <int N>
inline void products_of(const float* q, const float* keys, int64_t d, float* to) {
    vf acc[N];
    for (int j = 0; j < N; j++) acc[j] = vf{};
    for (int64_t i = 0; i < d; i++) {
        const vf across = load<vf>(q + i * GROUP);
        for (int j = 0; j < N; j++) acc[j] = across * keys[j * d + i] + acc[j];
    }
    for (int j = 0; j < N; j++) store(to + j * GROUP, acc[j]);
}

inline void score(const float* q, const float* keys, int64_t n, int64_t d, float* to) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) products_of<8>(q, keys + i * d, d, to + i * GROUP);
    for (; i < n; i++) products_of<1>(q, keys + i * d, d, to + i * GROUP);
}

template <int R, int N>
inline void sums_of(float* sums, int64_t width, const float* keep, const float* weights, const float* values,
                    int64_t n) {
    vf acc[R][N];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < N; j++) acc[r][j] = load<vf>(sums + r * width + j * W) * keep[r];
    for (int64_t i = 0; i < n; i++) {
        vf v[N];
        for (int j = 0; j < N; j++) v[j] = load<vf>(values + i * width + j * W);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < N; j++) acc[r][j] = v[j] * weights[i * GROUP + r] + acc[r][j];
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < N; j++) store(sums + r * width + j * W, acc[r][j]);
}

template <int R>
inline void sums_of_rows(float* sums, const float* keep, const float* weights, const float* values, int64_t n,
                         int64_t width) {
    constexpr int N = W == 16 ? 4 : 2;
    int64_t at = 0;
    for (; at + N * W <= width; at += N * W) sums_of<R, N>(sums + at, width, keep, weights, values + at, n);
    for (; at < width; at += W) sums_of<R, 1>(sums + at, width, keep, weights, values + at, n);
}

inline void weigh(float* sums, const float* keep, const float* weights, const float* values, int64_t n, int64_t d,
                  int64_t queries) {
    const int64_t width = up_to(d, 16);
    int64_t r = 0;
    for (; r + 4 <= queries; r += 4) sums_of_rows<4>(sums + r * width, keep + r, weights + r, values, n, width);
    for (; r < queries; r++) sums_of_rows<1>(sums + r * width, keep + r, weights + r, values, n, width);
}

}  // namespace
