// AVX2: two lanes of 128 bits.

#include "kernels.hpp"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx2")))
#define INLINE TARGET __attribute__((always_inline)) inline

namespace gemma4_moe {
namespace {

constexpr int lanes = 2;
constexpr bool streams = true;
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef uint32_t U32 __attribute__((vector_size(32)));
typedef float F32 __attribute__((vector_size(32)));

INLINE static __m256i raw(U16 v) { return (__m256i)v; }

INLINE static U16 gather(const char* p, ptrdiff_t stride) {
  __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + stride));
  return (U16)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

INLINE static U16 zip16_low(U16 a, U16 b) { return (U16)_mm256_unpacklo_epi16(raw(a), raw(b)); }
INLINE static U16 zip16_high(U16 a, U16 b) { return (U16)_mm256_unpackhi_epi16(raw(a), raw(b)); }
INLINE static U16 zip32_low(U16 a, U16 b) { return (U16)_mm256_unpacklo_epi32(raw(a), raw(b)); }
INLINE static U16 zip32_high(U16 a, U16 b) { return (U16)_mm256_unpackhi_epi32(raw(a), raw(b)); }
INLINE static U16 zip64_low(U16 a, U16 b) { return (U16)_mm256_unpacklo_epi64(raw(a), raw(b)); }
INLINE static U16 zip64_high(U16 a, U16 b) { return (U16)_mm256_unpackhi_epi64(raw(a), raw(b)); }
INLINE static U16 narrow(U32 a, U32 b) { return (U16)_mm256_packus_epi32((__m256i)a, (__m256i)b); }
INLINE static U32 join(U32 low, U32 high) { return (U32)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xAA); }
INLINE static U16 larger(U16 a, U16 b) { return (U16)_mm256_max_epu16(raw(a), raw(b)); }
INLINE static bool any_sign(U16 v) { return _mm256_movemask_epi8(_mm256_srai_epi16(raw(v), 15)) != 0; }
INLINE static void settle(U16& a, U16& b) { asm("" : "+x"(a), "+x"(b)); }

template <bool stream>
INLINE static void put(char* p, U16 v) {
  if constexpr (stream) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), raw(v));
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), raw(v));
  }
}

#include "kernels_vector.inc"

constexpr Kernels kernels{"avx2", vector_bytes, all_pairs()};

}  // namespace

const Kernels* avx2_kernels() { return __builtin_cpu_supports("avx2") ? &kernels : nullptr; }

}  // namespace gemma4_moe

#else

const gemma4_moe::Kernels* gemma4_moe::avx2_kernels() { return nullptr; }

#endif
