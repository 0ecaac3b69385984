// Four rows by two vectors of sums stay in registers; a panel of `right` as wide stays in the first-level cache.

#include "product.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "arithmetic.hpp"
#include "pool.hpp"

namespace gemma4_moe {
namespace {

typedef float F32 __attribute__((vector_size(64)));  // compilers split it where registers are narrower
constexpr int64_t lanes = 16, width = 2 * lanes, height = 4;

#define INLINE __attribute__((always_inline)) inline

INLINE F32 load(const float* from) {
  F32 vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

INLINE void add_to(float* to, F32 sum) {
  F32 vector = load(to) + sum;
  std::memcpy(to, &vector, sizeof vector);
}

template <int count>
INLINE void rows_of_panel(float* values, const float* left, const float* right, int64_t rank, int64_t columns) {
  F32 sums[count][2] = {};
  for (int64_t k = 0; k < rank; ++k) {
    F32 low = load(right + k * columns), high = load(right + k * columns + lanes);
    for (int i = 0; i < count; ++i) {
      float factor = left[i * rank + k];
      sums[i][0] += low * factor;
      sums[i][1] += high * factor;
    }
  }
  for (int i = 0; i < count; ++i) {
    add_to(values + i * columns, sums[i][0]);
    add_to(values + i * columns + lanes, sums[i][1]);
  }
}

INLINE void product(float* values, const float* left, const float* right, int64_t rows, int64_t rank, int64_t columns) {
  int64_t whole = columns / width * width;
  for (int64_t j = 0; j < whole; j += width) {
    int64_t i = 0;
    for (; i + height <= rows; i += height) {
      rows_of_panel<height>(values + i * columns + j, left + i * rank, right + j, rank, columns);
    }
    for (; i < rows; ++i) rows_of_panel<1>(values + i * columns + j, left + i * rank, right + j, rank, columns);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = whole; j < columns; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < rank; ++k) sum += left[i * rank + k] * right[k * columns + j];
      values[i * columns + j] += sum;
    }
  }
}

#if defined(__x86_64__)
#define FOR(target_name, function)                                                                                \
  __attribute__((target(target_name))) void function(float* values, const float* left, const float* right,       \
                                                     int64_t rows, int64_t rank, int64_t columns) {               \
    product(values, left, right, rows, rank, columns);                                                            \
  }
FOR("avx2", product_avx2)
FOR("avx512f", product_avx512)
#undef FOR
#endif

void add_product(float* values, const float* left, const float* right, int64_t rows, int64_t rank, int64_t columns) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return product_avx512(values, left, right, rows, rank, columns);
  if (__builtin_cpu_supports("avx2")) return product_avx2(values, left, right, rows, rank, columns);
#endif
  product(values, left, right, rows, rank, columns);
}

// Elements of a piece: fp32 values that stay in the second-level cache.
constexpr int64_t piece_elements = 1 << 17;

// Rows [first, first + count) of one expert; `values` has room for them.
void run_piece(const Move& move, const Product& add, int64_t expert, int64_t first, int64_t count, float* values) {
  const Axis &experts = move.axes[0], &rows = move.axes[1], &columns = move.axes[2];
  const float* scale = move.scale == nullptr ? nullptr : move.scale + expert;
  const char* src = move.src + expert * experts.src + first * rows.src;
  char* dst = move.dst + expert * experts.dst + first * rows.dst;
  Axis one{1, 0, 0, scale == nullptr ? 0 : 1};
  ptrdiff_t line = columns.size * static_cast<ptrdiff_t>(sizeof(float)), step = sizeof(float);
  if (!add.acts[expert]) {
    run({src, move.in, dst, move.out, scale, {one, {count, rows.src, rows.dst, 0}, columns}, 1, move.kernels});
    return;
  }
  char* own = reinterpret_cast<char*>(values);
  run({src, move.in, own, DType::fp32, scale,
       {one, {count, rows.src, line, 0}, {columns.size, columns.src, step, 0}}, 1, move.kernels});
  add_product(values, add.left + expert * add.left_stride + first * add.rank,
              add.right + expert * add.rank * columns.size, count, add.rank, columns.size);
  run({own, DType::fp32, dst, move.out, nullptr,
       {{count, line, rows.dst, 0}, {columns.size, step, columns.dst, 0}}, 1, move.kernels});
}

}  // namespace

void run_with_product(const Move& move, const Product& add) {
  int64_t experts = move.axes[0].size, rows = move.axes[1].size, columns = move.axes[2].size;
  if (experts * rows * columns == 0) return;
  int64_t step = std::max<int64_t>(1, piece_elements / columns);
  if (step > tile_rows) step -= step % tile_rows;
  int64_t each = (rows + step - 1) / step;
  std::atomic<int64_t> next{0};
  run_on_threads(std::max(1, move.threads), [&] {
    StandardArithmetic standard;
    std::vector<float> values(std::min(step, rows) * columns);
    for (int64_t piece; (piece = next.fetch_add(1)) < experts * each;) {
      int64_t first = piece % each * step;
      run_piece(move, add, piece / each, first, std::min(step, rows - first), values.data());
    }
  });
}

}  // namespace gemma4_moe
