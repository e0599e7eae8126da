#include <immintrin.h>

#define MOE_PATH avx512_bf16
#define MOE_WIDTH 16
#define MOE_PAIRS
#include "path.inl"
