// x / rms(x) * scale: see norm.py for the contract.

namespace {

struct NormWords {
    const bf16* x;      // (rows, groups, n): rows `row_stride` apart, groups `n` apart
    const bf16* scale;  // (n,)
    bf16* out;          // (rows, groups, n), contiguous
    int64_t rows, groups, n, row_stride;
    double eps;
};

// One row; `out` may be where `x` is.
inline void norm_row(const bf16* x, const bf16* scale, int64_t n, float eps, bf16* out) {
    vf squares = vf{};
    int64_t k = 0;
    for (; k + W <= n; k += W) {
        vf v = widen(x + k);
        squares += v * v;
    }
    float total = sum(squares);
    for (; k < n; k++) total += widen(x[k]) * widen(x[k]);
    const float inverse = 1.0f / std::sqrt(total / float(n) + eps);
    for (k = 0; k + W <= n; k += W) {
        bf16 rounded[W];
        narrow(rounded, widen(x + k) * inverse);
        narrow(out + k, widen(rounded) * widen(scale + k));
    }
    for (; k < n; k++) out[k] = narrow(widen(narrow(widen(x[k]) * inverse)) * widen(scale[k]));
}

void rms_norm(const int64_t* words) {
    const NormWords& a = *reinterpret_cast<const NormWords*>(words);
    const int64_t all = a.rows * a.groups;
#pragma omp parallel for schedule(static) if (all * a.n > 1 << 16)
    for (int64_t i = 0; i < all; i++)
        norm_row(a.x + i / a.groups * a.row_stride + i % a.groups * a.n, a.scale, a.n, float(a.eps), a.out + i * a.n);
}

}  // namespace
