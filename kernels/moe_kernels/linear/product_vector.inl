// Rows times panels with vectors: in float32 by multiply and add, or where there is MOE_PAIRS by the instruction that
// adds the products of a pair of bfloat16.

namespace {

constexpr int LANES = PANEL / W;            // vectors across a panel
constexpr int TILE_ROWS = W == 16 ? 8 : 4;  // as many accumulators as there are registers, but for the operands
constexpr int64_t DEPTH = 256;              // of 32 rows: 32 KiB, which stay in the first cache

struct Session {
    Session() {}
};

#ifdef MOE_PAIRS

typedef int32_t Taken;  // a pair of inputs
constexpr int64_t TAKEN_PER_PAIR = 1;

inline void take_row(const bf16* x, int64_t K, Taken* to) { std::memcpy(to, x, size_t(K) * 2); }

template <int M, int N>
inline void add_pair(const Taken* x, int64_t apart, const vi (&pairs)[N], vf (&acc)[M][N]) {
    for (int m = 0; m < M; m++)
        for (int j = 0; j < N; j++)
            acc[m][j] =
                (vf)_mm512_dpbf16_ps((__m512)acc[m][j], (__m512bh)_mm512_set1_epi32(x[m * apart]), (__m512bh)pairs[j]);
}

#else

typedef float Taken;
constexpr int64_t TAKEN_PER_PAIR = 2;

inline void take_row(const bf16* x, int64_t K, Taken* to) { widen_row(x, K, to); }

template <int M, int N>
inline void add_pair(const Taken* x, int64_t apart, const vi (&pairs)[N], vf (&acc)[M][N]) {
    for (int j = 0; j < N; j++) {
        vf even = (vf)(pairs[j] << 16), odd = (vf)(pairs[j] & int32_t(0xffff0000));
        for (int m = 0; m < M; m++) {
            acc[m][j] = even * x[m * apart] + acc[m][j];
            acc[m][j] = odd * x[m * apart + 1] + acc[m][j];
        }
    }
}

#endif

inline int64_t taken_stride(int64_t K) { return K / 2 * TAKEN_PER_PAIR; }

inline int64_t taken_floats(int64_t K) { return BLOCK_ROWS * taken_stride(K); }

template <int M, int P>
inline void tile(const Taken* x, int64_t K, const bf16* w, int64_t from, int64_t to, float* sums) {
    const int64_t apart = taken_stride(K), panel = K * PANEL;
    vf acc[M][P * LANES];
    for (int m = 0; m < M; m++)
        for (int j = 0; j < P * LANES; j++) acc[m][j] = from ? load<vf>(sums + m * 2 * PANEL + j * W) : vf{};
    for (int64_t k = from; k < to; k += 2) {
        vi pairs[P * LANES];
        for (int j = 0; j < P * LANES; j++)
            pairs[j] = load<vi>(w + (j / LANES) * panel + k * PANEL + (j % LANES) * 2 * W);
        add_pair<M>(x + k / 2 * TAKEN_PER_PAIR, apart, pairs, acc);
    }
    for (int m = 0; m < M; m++)
        for (int j = 0; j < P * LANES; j++) store(sums + m * 2 * PANEL + j * W, acc[m][j]);
}

template <int P>
inline void tiles(int rows, const Taken* x, int64_t K, const bf16* w, int64_t from, int64_t to, float* sums) {
    switch (rows) {
        case 1: return tile<1, P>(x, K, w, from, to, sums);
        case 2: return tile<2, P>(x, K, w, from, to, sums);
        case 3: return tile<3, P>(x, K, w, from, to, sums);
        case 4: return tile<4, P>(x, K, w, from, to, sums);
#if MOE_WIDTH == 16
        case 5: return tile<5, P>(x, K, w, from, to, sums);
        case 6: return tile<6, P>(x, K, w, from, to, sums);
        case 7: return tile<7, P>(x, K, w, from, to, sums);
        case 8: return tile<8, P>(x, K, w, from, to, sums);
#endif
    }
}

inline void product(int rows, const Taken* x, int64_t K, const bf16* w, bool both, int64_t from, int64_t to,
                    float* sums) {
    for (int m = 0; m < rows; m += TILE_ROWS, x += TILE_ROWS * taken_stride(K), sums += TILE_ROWS * 2 * PANEL) {
        const int count = rows - m < TILE_ROWS ? rows - m : TILE_ROWS;
        // Two panels at once put more sums in flight, where the registers hold them.
        if (both && (W == 16 || count <= 2)) {
            tiles<2>(count, x, K, w, from, to, sums);
        } else {
            tiles<1>(count, x, K, w, from, to, sums);
            if (both) tiles<1>(count, x, K, w + K * PANEL, from, to, sums + PANEL);
        }
    }
}

}  // namespace
