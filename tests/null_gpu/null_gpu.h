// What is counted, and how the parts of the null GPU report it.
#pragma once
#include <cstddef>

#define COUNTED(X)                                                                                             \
    X(launch) X(gemm) X(convolution) X(batch_norm) X(collective) X(copy_to_gpu) X(copy_to_gpu_pageable)         \
    X(copy_to_host) X(copy_to_host_pageable) X(copy_on_gpu) X(copy_blocking) X(memset_) X(wait_stream)           \
    X(wait_device) X(wait_event) X(stream) X(event) X(allocation) X(pinned_allocation)

enum Counted {
#define X(name) name,
    COUNTED(X)
#undef X
    KINDS
};

extern "C" void null_gpu_count(int what, size_t bytes);
