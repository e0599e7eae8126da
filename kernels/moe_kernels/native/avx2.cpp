#define MOE_PATH avx2
#define MOE_WIDTH 8
#include "path.inl"
