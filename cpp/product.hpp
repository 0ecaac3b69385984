// dst = round(src × scale + left · right): a move with the product of two thin matrices added in fp32.
#pragma once

#include <cstdint>

#include "move.hpp"

namespace gemma4_moe {

// For each expert, left [rows, rank] and right [rank, columns], contiguous; `left_stride` elements from one to the next.
struct Product {
  const float* left;
  const float* right;
  const bool* acts;  // for each expert: where it is false nothing is added, and the move is an ordinary one
  int64_t left_stride, rank;
};

// The move has the axes [experts, rows, columns], in this order. A sum over the rank goes from 0 up, from zero on, and is
// then added to the product of value and scale: every instruction set gives the same bits.
void run_with_product(const Move& move, const Product& product);

}  // namespace gemma4_moe
