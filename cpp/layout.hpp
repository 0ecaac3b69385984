// From any shape and strides to one of three loops: rows, tiles, or element by element.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats.hpp"

namespace gemma4_moe {

// One axis that both tensors share. Strides are in bytes, the scale's in elements; 0 where the scale doesn't change.
struct Axis {
  int64_t size;
  ptrdiff_t src, dst, scale;
};

enum class Loop {
  rows,      // both sides are contiguous along `row`
  tiles,     // the input is contiguous along `column`, the output along `row`
  elements,  // anything else, along `row`
};

struct Layout {
  Loop loop;
  std::vector<Axis> outer;  // every other axis, the output's largest stride first
  Axis column;              // size 1 unless tiles
  Axis row;

  int64_t outer_size() const;
};

// Drops axes of size one, sorts the rest by the output's strides, joins what can be joined, and chooses the loop. No
// size may be zero.
Layout plan_layout(std::vector<Axis> axes, DType in, DType out);

// Where index `index` of the outer axes begins.
struct Offsets {
  ptrdiff_t src = 0, dst = 0, scale = 0;
};
Offsets offsets_at(const std::vector<Axis>& outer, int64_t index);

}  // namespace gemma4_moe
