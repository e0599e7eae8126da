// Rows times panels with AMX: a tile of weights is 1 KiB of a panel as it lies in memory, 32 inputs x 16 columns.

namespace {

typedef bf16 Taken;
typedef Tiles Session;
constexpr int64_t DEPTH = 512;  // of 32 rows: 32 KiB, which stay in the first cache while panel after panel passes

// Not a multiple of 2 KiB, or the rows of a tile would meet in few sets of the cache.
inline int64_t taken_stride(int64_t K) { return (K + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH + TILE_DEPTH; }

inline int64_t taken_floats(int64_t K) { return BLOCK_ROWS * taken_stride(K) / 2; }

// Rows without a name below the last one hold what was there before, and give sums that nobody reads.
inline void take_row(const bf16* x, int64_t K, Taken* to) {
    std::memcpy(to, x, size_t(K) * 2);
    if (K % TILE_DEPTH) std::memset(to + K, 0, TILE_DEPTH);
}

// A panel's last 16 inputs, where their number is no multiple of 32, and as many zeros.
struct Tail {
    alignas(64) bf16 weights[TILE_ELEMENTS];
    const bf16* of(const bf16* panel, int64_t k) {
        std::memcpy(weights, panel + k * PANEL, TILE_ELEMENTS);
        std::memset(weights + TILE_ELEMENTS / 2, 0, TILE_ELEMENTS);
        return weights;
    }
};

template <int A, int B>
inline void tile_sums(const Taken* x, int64_t K, const bf16* w, int64_t from, int64_t to, float* sums) {
    constexpr int64_t out = 2 * PANEL * 4;
    const int64_t apart = taken_stride(K), panel = K * PANEL;
    float *right = sums + PANEL, *below = sums + TILE * 2 * PANEL, *last = below + PANEL;
    if (from) {
        _tile_loadd(0, sums, out);
        if (B == 2) _tile_loadd(1, right, out);
        if (A == 2) _tile_loadd(2, below, out);
        if (A == 2 && B == 2) _tile_loadd(3, last, out);
    } else {
        _tile_zero(0);
        if (B == 2) _tile_zero(1);
        if (A == 2) _tile_zero(2);
        if (A == 2 && B == 2) _tile_zero(3);
    }
    Tail tails[2];
    for (int64_t k = from; k < to; k += TILE_DEPTH) {
        const bool whole = k + TILE_DEPTH <= K;
        _tile_loadd(4, x + k, apart * 2);
        _tile_loadd(6, whole ? w + k * PANEL : tails[0].of(w, k), 64);
        _tile_dpbf16ps(0, 4, 6);
        if (B == 2) {
            _tile_loadd(7, whole ? w + panel + k * PANEL : tails[1].of(w + panel, k), 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (A == 2) {
            _tile_loadd(5, x + TILE * apart + k, apart * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (B == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, out);
    if (B == 2) _tile_stored(1, right, out);
    if (A == 2) _tile_stored(2, below, out);
    if (A == 2 && B == 2) _tile_stored(3, last, out);
}

inline void product(int rows, const Taken* x, int64_t K, const bf16* w, bool both, int64_t from, int64_t to,
                    float* sums) {
    if (rows > TILE) return both ? tile_sums<2, 2>(x, K, w, from, to, sums) : tile_sums<2, 1>(x, K, w, from, to, sums);
    return both ? tile_sums<1, 2>(x, K, w, from, to, sums) : tile_sums<1, 1>(x, K, w, from, to, sums);
}

}  // namespace
