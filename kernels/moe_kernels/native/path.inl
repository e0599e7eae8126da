// One path: every operation, compiled with the flags of the file that includes this. It says MOE_PATH and MOE_WIDTH.
#include <atomic>
#include <cmath>
#include <vector>

#include "simd.hpp"
#include "table.hpp"

#include "../linear/linear.inl"
#include "../experts/experts.inl"
#include "../attention/attention.inl"
#include "../norm/norm.inl"
#include "../combine/combine.inl"
#include "../scores/scores.inl"
#include "../rotary/rotary.inl"
#include "../sorting/sorting.inl"
#include "../route/route.inl"
#include "../moe/moe.inl"
#include "../argmax/argmax.inl"

#define MOE_TEXT2(x) #x
#define MOE_TEXT(x) MOE_TEXT2(x)
#define MOE_JOIN2(a, b) a##b
#define MOE_JOIN(a, b) MOE_JOIN2(a, b)

extern const Path MOE_JOIN(moe_path_, MOE_PATH);
const Path MOE_JOIN(moe_path_, MOE_PATH) = {
    MOE_TEXT(MOE_PATH),
    {linear, experts, attention, rms_norm, combine, scores, rotary, sort, gather, route, moe, add, argmax},
};
