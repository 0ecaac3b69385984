// Kernels in plain C++, for processors that nothing wider is written for, and for strides that nothing else serves.

#include <cstring>

#include "kernels.hpp"

namespace gemma4_moe {
namespace {

using namespace scalar;

template <class In, class Out>
void strided(const char* src, ptrdiff_t src_stride, char* dst, ptrdiff_t dst_stride, int64_t n, const float* scale,
             ptrdiff_t scale_stride) {
  for (int64_t i = 0; i < n; ++i) {
    float factor = scale == nullptr ? 1.0f : scale[i * scale_stride];
    if (In::dtype == Out::dtype && factor == 1.0f) {
      std::memcpy(dst + i * dst_stride, src + i * src_stride, sizeof(typename In::Code));
    } else {
      convert<In, Out>(src + i * src_stride, dst + i * dst_stride, factor);
    }
  }
}

template <class In, class Out, bool scaled>
bool tile(const char* src, ptrdiff_t src_stride, char* dst, ptrdiff_t dst_stride, float scale, const char* next_tile,
          Lines& next_block) {
  constexpr int64_t in = size_of(In::dtype), out = size_of(Out::dtype);
  for (int64_t r = 0; r < tile_rows; ++r) __builtin_prefetch(next_tile + r * src_stride, 0, 3);
  next_block.fetch(tile_rows);
  for (int64_t c = 0; c < tile_columns(In::dtype); ++c) {
    for (int64_t r = 0; r < tile_rows; ++r) {
      if constexpr (scaled) {
        convert<In, Out>(src + r * src_stride + c * in, dst + c * dst_stride + r * out, scale);
      } else {
        std::memcpy(dst + c * dst_stride + r * out, src + r * src_stride + c * in, in);
      }
    }
  }
  return true;
}

template <class In, class Out>
void row(const char* src, char* dst, int64_t n, float scale) {
  for (int64_t i = 0; i < n; ++i) {
    convert<In, Out>(src + i * size_of(In::dtype), dst + i * size_of(Out::dtype), scale);
  }
}

template <class In, class Out>
constexpr PairKernels pair() {
  constexpr TileKernel copy = In::dtype == Out::dtype ? tile<In, Out, false> : nullptr;
  return {tile<In, Out, true>, nullptr, copy, nullptr, row<In, Out>, nullptr, nullptr};
}

template <class In>
constexpr std::array<PairKernels, dtypes> pairs() {
  return {pair<In, Bf16>(), pair<In, Fp16>(), pair<In, Fp32>()};
}

constexpr Kernels kernels{"plain", 0, {pairs<Bf16>(), pairs<Fp16>(), pairs<Fp32>()}};

constexpr StridedKernel strided_kernels[dtypes][dtypes] = {
    {strided<Bf16, Bf16>, strided<Bf16, Fp16>, strided<Bf16, Fp32>},
    {strided<Fp16, Bf16>, strided<Fp16, Fp16>, strided<Fp16, Fp32>},
    {strided<Fp32, Bf16>, strided<Fp32, Fp16>, strided<Fp32, Fp32>},
};

}  // namespace

const Kernels* plain_kernels() { return &kernels; }

StridedKernel strided_kernel(DType in, DType out) {
  return strided_kernels[static_cast<int>(in)][static_cast<int>(out)];
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
  for (const Kernels* each : {avx512_kernels(), avx2_kernels(), neon_kernels(), plain_kernels()}) {
    if (each != nullptr) found.push_back(each);
  }
  return found;
}

}  // namespace gemma4_moe
