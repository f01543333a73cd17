// What every file of the kernels begins with.
#pragma once

#include <metal_stdlib>

#include "paged/constants.h"

using namespace metal;

#ifndef UNROLL
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

// The parameters of a launch: a small array of 32-bit words, in the order of the struct's members.
template <typename Parameters>
METAL_FUNC const constant Parameters& parameters_in(const constant int* words) {
  return *(const constant Parameters*)words;
}
