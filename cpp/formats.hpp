// Dtypes, and one element's conversion: the law that every wider kernel equals bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace gemma4_moe {

// The values are part of the Python binding.
enum class DType : int { bf16 = 0, fp16 = 1, fp32 = 2 };
constexpr int dtypes = 3;

constexpr int64_t size_of(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }

namespace scalar {

using U32 = uint32_t;
using F32 = float;

inline U32 word_of(F32 value) {
  U32 word;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

inline F32 value_of(U32 word) {
  F32 value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

#define INLINE inline
#include "formats.inc"
#undef INLINE

// How far above the lowest bit of its 32-bit word a code begins.
template <class Format>
constexpr int shift = sizeof(typename Format::Code) == 4 ? 0 : 16;

template <class Format>
inline typename Format::Code load(const char* from) {
  typename Format::Code code;
  std::memcpy(&code, from, sizeof code);
  return code;
}

// The value of a code, Inf and NaN too. The formats' own `decode` need not widen fp16's largest exponent.
template <class Format>
inline float decode(typename Format::Code code) {
  U32 high = static_cast<U32>(code) << shift<Format>;
  if constexpr (Format::dtype == DType::fp16) {
    if ((high & 0x7C000000u) == 0x7C000000u) {
      return value_of((high & 0x80000000u) | 0x7F800000u | (high & 0x03FF0000u) >> 3);
    }
  }
  return Format::decode(high);
}

// One element at `from`, times `scale` in fp32, rounded once, written to `to`. A NaN product becomes the target's quiet
// NaN with the element's sign.
template <class In, class Out>
inline void convert(const char* from, char* to, float scale) {
  typename In::Code code = load<In>(from);
  float product = decode<In>(code) * scale;
  typename Out::Code result;
  if (product != product) {
    result = static_cast<typename Out::Code>(Out::quiet_nan | ((code & In::sign_bit) != 0 ? Out::sign_bit : 0));
  } else {
    result = static_cast<typename Out::Code>(Out::encode(product) >> shift<Out>);
  }
  std::memcpy(to, &result, sizeof result);
}

template <DType>
struct FormatOf;
template <>
struct FormatOf<DType::bf16> : Bf16 {};
template <>
struct FormatOf<DType::fp16> : Fp16 {};
template <>
struct FormatOf<DType::fp32> : Fp32 {};

}  // namespace scalar
}  // namespace gemma4_moe
