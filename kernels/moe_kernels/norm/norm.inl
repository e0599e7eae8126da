// x / rms(x) * scale: see norm.py for the contract.

namespace {

struct NormWords {
    const bf16* x;      // (rows, groups, n): rows `row_stride` apart, groups `n` apart
    const bf16* scale;  // (n,)
    bf16* out;          // (rows, groups, n), contiguous
    int64_t rows, groups, n, row_stride;
    double eps;
};

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
    for (int64_t i = 0; i < all; i++)
        norm_row(a.x + i / a.groups * a.row_stride + i % a.groups * a.n, a.scale, a.n, float(a.eps), a.out + i * a.n);
}

}  // namespace
