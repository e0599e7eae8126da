#define MOE_PATH generic
#define MOE_WIDTH 4
#include "path.inl"
