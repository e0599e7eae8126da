#define MOE_PATH avx512
#define MOE_WIDTH 16
#include "path.inl"
