// What a path offers: one function per operation. Each takes its arguments as one array of 8-byte words, which is the
// struct of that operation: pointers, sizes, and floats as doubles.
#pragma once

#include <cstdint>

typedef void (*Operation)(const int64_t* words);

struct Path {
    const char* name;
    Operation operations[13];
};

enum OperationIndex {
    LINEAR,
    EXPERTS,
    ATTENTION,
    RMS_NORM,
    COMBINE,
    SCORES,
    ROTARY,
    SORT,
    GATHER,
    ROUTE,
    MOE,
    ADD,
    ARGMAX,
    NUM_OPERATIONS
};
