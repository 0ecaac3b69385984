// The whole operation: dst = round(src × scale), for any strides. A transposition is nothing but a choice of strides.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "layout.hpp"

namespace gemma4_moe {

struct Move {
  const char* src;
  DType in;
  char* dst;
  DType out;
  const float* scale;  // nullptr for none
  std::vector<Axis> axes;
  int threads;
  const Kernels* kernels;
};

// src and dst may be the same memory with the same strides and dtypes; any other overlap is undefined.
void run(const Move& move);

}  // namespace gemma4_moe
