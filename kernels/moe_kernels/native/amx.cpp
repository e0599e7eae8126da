#define MOE_PATH amx
#define MOE_WIDTH 16
#define MOE_AMX
#include "amx.hpp"
#include "path.inl"
