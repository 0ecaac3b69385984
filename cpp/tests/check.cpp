// Random moves through every instruction set, on buffers of exactly the size that the strides reach, compared with the
// element-by-element loop. Meant to be built with -fsanitize=address,undefined or thread, and for other processors
// under an emulator; the Python tests check the values themselves.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "../move.hpp"

using namespace gemma4_moe;

namespace {

std::mt19937_64 random_bits(20240229);

int64_t draw(std::initializer_list<int64_t> choices) { return choices.begin()[random_bits() % choices.size()]; }

std::vector<size_t> random_order(size_t axes) {
  std::vector<size_t> order(axes);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_bits);
  return order;
}

// Strides for axes in this order, the innermost first, with gaps; returns the bytes that they span.
int64_t random_strides(const std::vector<int64_t>& sizes, const std::vector<size_t>& order, int64_t element,
                       std::vector<ptrdiff_t>& strides) {
  int64_t stride = element * draw({1, 1, 1, 2});
  int64_t last = 0;
  for (size_t axis : order) {
    strides[axis] = stride;
    last += stride * (sizes[axis] - 1);
    stride *= sizes[axis];
    stride += element * draw({0, 0, 3});
    if (draw({0, 1}) != 0) stride = (stride + line_bytes - 1) / line_bytes * line_bytes;
  }
  return last + element;
}

bool same(const Move& move, const std::vector<char>& wanted, const char* found) {
  return std::equal(wanted.begin(), wanted.end(), found) ||
         (std::fprintf(stderr, "%s differs: dtypes %d to %d, threads %d, scale %d\n", move.kernels->name.data(),
                       static_cast<int>(move.in), static_cast<int>(move.out), move.threads, move.scale != nullptr),
          false);
}

bool once(bool large) {
  auto in = static_cast<DType>(random_bits() % dtypes), out = static_cast<DType>(random_bits() % dtypes);
  std::vector<int64_t> sizes{draw({1, 2, 3}), draw({1, 7, 32, 64, 65, 130}), draw({1, 5, 31, 33, 64, 96, 100})};
  if (large) sizes = {3, draw({700, 1024}), draw({1024, 1056, 1111})};
  std::vector<ptrdiff_t> src(sizes.size()), dst(sizes.size());
  // The same order on both sides makes rows, others make tiles or single elements.
  std::vector<size_t> src_order = random_order(sizes.size());
  std::vector<size_t> dst_order = draw({0, 1}) != 0 ? src_order : random_order(sizes.size());
  int64_t src_bytes = random_strides(sizes, src_order, size_of(in), src);
  int64_t dst_bytes = random_strides(sizes, dst_order, size_of(out), dst);

  // Exactly as large as needed, so that a step beyond is a step out of the allocation.
  int64_t shift = draw({0, 0, 1, 2, 32});
  std::vector<char> input(src_bytes + shift);
  for (char& byte : input) byte = static_cast<char>(random_bits() >> 56);
  std::vector<float> scale(sizes[0]);
  for (float& factor : scale) factor = static_cast<float>(static_cast<double>(random_bits() % 2000) / 700 - 1);
  scale[0] = draw({0, 1}) != 0 ? 1.0f : INFINITY;

  Move move{input.data() + shift, in, nullptr, out, draw({0, 1}) != 0 ? scale.data() : nullptr, {}, 1, plain_kernels()};
  for (size_t i = 0; i < sizes.size(); ++i) {
    move.axes.push_back({sizes[i], src[i], dst[i], i == 0 && move.scale != nullptr ? 1 : 0});
  }
  std::vector<char> wanted(dst_bytes, 0x5A);
  for (int64_t i = 0; i < sizes[0]; ++i) {
    for (int64_t j = 0; j < sizes[1]; ++j) {
      strided_kernel(in, out)(move.src + i * src[0] + j * src[1], src[2], wanted.data() + i * dst[0] + j * dst[1],
                              dst[2], sizes[2], move.scale == nullptr ? nullptr : move.scale + i, 0);
    }
  }
  bool right = true;
  for (const Kernels* kernels : available_kernels()) {
    for (int threads : {1, 3}) {
      char* result = static_cast<char*>(std::aligned_alloc(line_bytes, (dst_bytes / line_bytes + 2) * line_bytes));
      int64_t from = large ? 0 : draw({0, 0, 1, 32});
      std::fill(result + from, result + from + dst_bytes, 0x5A);
      move.dst = result + from;
      move.threads = threads;
      move.kernels = kernels;
      run(move);
      right = right && same(move, wanted, move.dst);
      std::free(result);
    }
  }
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  int rounds = argc > 1 ? std::atoi(argv[1]) : 400;
  bool right = true;
  for (int i = 0; i < rounds; ++i) right = once(i % 40 == 39) && right;
  for (const Kernels* kernels : available_kernels()) std::printf("%s ", kernels->name.data());
  std::printf("%s\n", right ? "right" : "wrong");
  return right ? 0 : 1;
}
