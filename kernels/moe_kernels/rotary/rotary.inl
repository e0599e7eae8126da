// Norm and rotation of new queries and keys, and keys and values into the cache: see rotary.py for the contract.

namespace {

struct RotaryWords {
    const bf16 *q, *k, *v;    // (T, H, d) and twice (T, G, d): rows `*_stride` apart, heads contiguous
    bf16* out;                // (T, H, d)
    bf16 *k_cache, *v_cache;  // (N, G, d)
    const int64_t* slots;     // (T,)
    const bf16 *cos, *sin;    // (T, d): the sine's first half negated
    const bf16 *q_scale, *k_scale;  // (d,) or null
    int64_t T, H, G, d, q_stride, k_stride, v_stride;
    double eps;
};

// The rounding in between is that of two operations on bfloat16; a product of two such numbers is exact in float32.
inline void rotate_half(const bf16* x, const bf16* other, const bf16* cos, const bf16* sin, int64_t n, bf16* out) {
    int64_t j = 0;
    for (; j + W <= n; j += W) {
        bf16 rounded[W];
        narrow(rounded, widen(x + j) * widen(cos + j));
        narrow(out + j, widen(rounded) + widen(other + j) * widen(sin + j));
    }
    for (; j < n; j++) out[j] = narrow(widen(narrow(widen(x[j]) * widen(cos[j]))) + widen(other[j]) * widen(sin[j]));
}

// One head; `normed` (d,) is scratch.
inline void rotate_head(const RotaryWords& a, const bf16* x, const bf16* scale, int64_t t, bf16* normed, bf16* out) {
    const int64_t half = a.d / 2;
    const bf16 *cos = a.cos + t * a.d, *sin = a.sin + t * a.d;
    if (scale) {
        norm_row(x, scale, a.d, float(a.eps), normed);
        x = normed;
    }
    rotate_half(x, x + half, cos, sin, half, out);
    rotate_half(x + half, x, cos + half, sin + half, half, out + half);
}

void rotary(const int64_t* words) {
    const RotaryWords& a = *reinterpret_cast<const RotaryWords*>(words);
    constexpr int64_t TOKENS = 16;
    const int64_t tasks = (a.T + TOKENS - 1) / TOKENS;
    std::atomic<int64_t> next{0};
#pragma omp parallel if (tasks > 1 && a.T * (a.H + 2 * a.G) * a.d > 1 << 16)
    {
        bf16* normed = reinterpret_cast<bf16*>(thread_floats(a.d));
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            const int64_t until = (task + 1) * TOKENS < a.T ? (task + 1) * TOKENS : a.T;
            for (int64_t t = task * TOKENS; t < until; t++) {
                const int64_t cached = a.slots[t] * a.G * a.d;
                for (int64_t h = 0; h < a.H; h++)
                    rotate_head(a, a.q + t * a.q_stride + h * a.d, a.q_scale, t, normed, a.out + (t * a.H + h) * a.d);
                for (int64_t g = 0; g < a.G; g++)
                    rotate_head(a, a.k + t * a.k_stride + g * a.d, a.k_scale, t, normed, a.k_cache + cached + g * a.d);
                std::memcpy(a.v_cache + cached, a.v + t * a.v_stride, size_t(a.G * a.d) * sizeof(bf16));
            }
        }
    }
}

}  // namespace
