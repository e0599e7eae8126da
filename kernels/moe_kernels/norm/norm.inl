// x / rms(x) * scale, and a sum before it: see norm.py for the contracts.

namespace {

struct NormWords {
    const bf16* x;      // (rows, groups, n): rows `row_stride` apart, groups `n` apart
    const bf16* scale;  // (n,)
    bf16* out;          // (rows, groups, n), contiguous
    int64_t rows, groups, n, row_stride;
    double eps;
    const bf16* delta;  // (rows, n), contiguous, to be added to x first; null: nothing. Then `groups` is 1
    bf16* sum;          // (rows, n), contiguous: x + delta
};

struct AddWords {
    const bf16 *x, *y;  // (size,)
    bf16* out;          // (size,)
    int64_t size;
};

// out = x + y, rounded once.
inline void add_row(const bf16* x, const bf16* y, int64_t n, bf16* out) {
    int64_t k = 0;
    for (; k + W <= n; k += W) narrow(out + k, widen(x + k) + widen(y + k));
    for (; k < n; k++) out[k] = narrow(widen(x[k]) + widen(y[k]));
}

// One row, into bfloat16 or into floats that are rounded to it.
template <typename Out>
inline void norm_row(const bf16* x, const bf16* scale, int64_t n, float eps, Out* out) {
    vf squares = vf{};
    int64_t k = 0;
    for (; k + W <= n; k += W) {
        vf v = widen(x + k);
        squares += v * v;
    }
    float total = sum(squares);
    for (; k < n; k++) total += widen(x[k]) * widen(x[k]);
    const float inverse = 1.0f / std::sqrt(total / float(n) + eps);
    for (k = 0; k + W <= n; k += W) put(out + k, nearest_bf16(widen(x + k) * inverse) * widen(scale + k));
    for (; k < n; k++) put_one(out + k, widen(narrow(widen(x[k]) * inverse)) * widen(scale[k]));
}

void rms_norm(const int64_t* words) {
    const NormWords& a = *reinterpret_cast<const NormWords*>(words);
    const int64_t all = a.rows * a.groups;
#pragma omp parallel for schedule(static) if (all * a.n > 1 << 16)
    for (int64_t i = 0; i < all; i++) {
        const bf16* x = a.x + i / a.groups * a.row_stride + i % a.groups * a.n;
        if (a.delta) {
            add_row(x, a.delta + i * a.n, a.n, a.sum + i * a.n);
            x = a.sum + i * a.n;
        }
        norm_row(x, a.scale, a.n, float(a.eps), a.out + i * a.n);
    }
}

void add(const int64_t* words) {
    const AddWords& a = *reinterpret_cast<const AddWords*>(words);
    constexpr int64_t PIECE = 1 << 14;
#pragma omp parallel for schedule(static) if (a.size > 1 << 16)
    for (int64_t k = 0; k < a.size; k += PIECE)
        add_row(a.x + k, a.y + k, a.size - k < PIECE ? a.size - k : PIECE, a.out + k);
}

}  // namespace
