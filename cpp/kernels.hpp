// The kernels of one instruction set: a tile transposed, a row converted. Everything larger is built from these.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>
#include <vector>

#include "formats.hpp"
#include "lines.hpp"

namespace gemma4_moe {

// A tile is whole 64-byte lines on both sides: `tile_columns` elements along the input's contiguous axis, `tile_rows`
// along the output's. These are the only tile sizes; every instruction set fills the same tiles.
constexpr int64_t tile_columns(DType in) { return line_bytes / size_of(in); }
constexpr int64_t tile_rows = 32;

// dst[c][r] = convert(src[r][c]); the strides are in bytes. Meanwhile it asks for `tile_rows` lines `src_stride` apart,
// from `next_tile` on, in the first-level cache, and for as many of `next_block` in the second-level one. Returns false
// where an input was Inf or NaN and the kernel does not know how to convert it: the tile must then be done again by
// `strided`.
using TileKernel = bool (*)(const char* src, ptrdiff_t src_stride, char* dst, ptrdiff_t dst_stride, float scale,
                            const char* next_tile, Lines& next_block);

// dst[i] = convert(src[i]) for i < n, both contiguous. Any value; src == dst is allowed.
using RowKernel = void (*)(const char* src, char* dst, int64_t n, float scale);

// dst[i] = convert(src[i]) with any strides in bytes; the scale of element i is scale[i * scale_stride].
using StridedKernel = void (*)(const char* src, ptrdiff_t src_stride, char* dst, ptrdiff_t dst_stride, int64_t n,
                               const float* scale, ptrdiff_t scale_stride);

// The kernels of one pair of dtypes. `copy` ones move bits and exist for equal dtypes only; `stream` ones write past
// the caches and need destinations aligned to `Kernels::alignment`.
struct PairKernels {
  TileKernel tile, stream_tile, copy_tile, stream_copy_tile;
  RowKernel row, stream_row, stream_copy_row;
};

struct Kernels {
  std::string_view name;
  int64_t alignment;  // bytes; 0 where no streaming store is to be had
  std::array<std::array<PairKernels, dtypes>, dtypes> pairs;
};

// nullptr where the program or the processor lacks the instruction set.
const Kernels* plain_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

// All that work here, best first; `plain` is always the last.
std::vector<const Kernels*> available_kernels();

StridedKernel strided_kernel(DType in, DType out);

}  // namespace gemma4_moe
