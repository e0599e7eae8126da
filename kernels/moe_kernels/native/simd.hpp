// Vectors of W floats by the compiler's own vector types, so that one source serves every instruction set: which
// instructions come out is decided by the flags of the file that includes this.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef MOE_WIDTH
#error "the path's file says how many floats a vector has"
#endif

namespace {

constexpr int W = MOE_WIDTH;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t bf16;

template <typename V, typename T>
inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <typename V, typename T>
inline void store(T* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

inline vf splat(float x) { return x - vf{}; }

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline vf widen(const bf16* from) { return (vf)(__builtin_convertvector(load<vh>(from), vu) << 16); }

// To the nearest, ties to even; what is not a number stays so.
inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void narrow(bf16* to, vf x) {
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &rounded, sizeof rounded);
#else
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(x != x);
    store(to, __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vh));
#endif
}

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// As narrow() rounds, but still in float32.
inline vf nearest_bf16(vf x) {
    vu bits = (vu)x;
    return select((vi)(x != x), x, (vf)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u));
}

// Elements as floats, and back, so that one source serves rows of either type.
inline vf take(const bf16* from) { return widen(from); }
inline vf take(const float* from) { return load<vf>(from); }
inline float take_one(bf16 x) { return widen(x); }
inline float take_one(float x) { return x; }
inline void put(bf16* to, vf x) { narrow(to, x); }
inline void put(float* to, vf x) { store(to, nearest_bf16(x)); }
inline void put_one(bf16* to, float x) { *to = narrow(x); }
inline void put_one(float* to, float x) { *to = widen(narrow(x)); }

inline vf larger(vf a, vf b) { return select((vi)(a > b), a, b); }

inline float sum(vf v) {
    float parts[W];
    store(parts, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}

// e to the x, to 2 units in the last place: 2^n from the exponent's bits, and a polynomial of degree 6 for what is left
// (Cephes, expf.c). 0 below -87.3, infinite above 88.7; with AVX-512 what lies between 0 and the smallest normal number
// is kept, and a NaN passes because the processor's max and min give the second operand then.
inline vf exp_(vf x) {
#ifdef __AVX512F__
    __m512 y = _mm512_min_ps(_mm512_set1_ps(100.0f), _mm512_max_ps(_mm512_set1_ps(-110.0f), (__m512)x));
    vf whole = (vf)_mm512_roundscale_ps(y * _mm512_set1_ps(1.44269504088896341f),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = (vf)y - whole * 0.693359375f - whole * -2.12194440e-4f;
#else
    vf high = splat(88.7f), low = splat(-87.3f);
    vi over = (vi)(x > high), under = (vi)(x < low), nan = (vi)(x != x);
    vf y = select(over | nan, high, select(under, low, x));
    vf scaled = y * 1.44269504088896341f;
    vi n = __builtin_convertvector(scaled + select((vi)(scaled < 0), splat(-0.5f), splat(0.5f)), vi);
    vf whole = __builtin_convertvector(n, vf);
    vf r = y - whole * 0.693359375f - whole * -2.12194440e-4f;
#endif
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
#ifdef __AVX512F__
    return (vf)_mm512_scalef_ps((__m512)(p * r * r + r + 1.0f), (__m512)whole);
#else
    vf result = (p * r * r + r + 1.0f) * (vf)((n + 127) << 23);
    result = select(under, splat(0.0f), select(over, splat(__builtin_inff()), result));
    return select(nan, x, result);
#endif
}

inline vf silu(vf x) { return x / (1.0f + exp_(-x)); }

}  // namespace
