// AVX-512 (F and BW): four lanes of 128 bits.

#include "kernels.hpp"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw")))
#define INLINE TARGET __attribute__((always_inline)) inline

namespace gemma4_moe {
namespace {

constexpr int lanes = 4;
constexpr bool streams = true;
typedef uint16_t U16 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef float F32 __attribute__((vector_size(64)));

INLINE static __m512i raw(U16 v) { return (__m512i)v; }
INLINE static __m128i load(const char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

INLINE static U16 gather(const char* p, ptrdiff_t stride) {
  __m512i v = _mm512_castsi128_si512(load(p));
  v = _mm512_inserti32x4(v, load(p + stride), 1);
  v = _mm512_inserti32x4(v, load(p + 2 * stride), 2);
  return (U16)_mm512_inserti32x4(v, load(p + 3 * stride), 3);
}

INLINE static U16 zip16_low(U16 a, U16 b) { return (U16)_mm512_unpacklo_epi16(raw(a), raw(b)); }
INLINE static U16 zip16_high(U16 a, U16 b) { return (U16)_mm512_unpackhi_epi16(raw(a), raw(b)); }
INLINE static U16 zip32_low(U16 a, U16 b) { return (U16)_mm512_unpacklo_epi32(raw(a), raw(b)); }
INLINE static U16 zip32_high(U16 a, U16 b) { return (U16)_mm512_unpackhi_epi32(raw(a), raw(b)); }
INLINE static U16 zip64_low(U16 a, U16 b) { return (U16)_mm512_unpacklo_epi64(raw(a), raw(b)); }
INLINE static U16 zip64_high(U16 a, U16 b) { return (U16)_mm512_unpackhi_epi64(raw(a), raw(b)); }
INLINE static U16 narrow(U32 a, U32 b) { return (U16)_mm512_packus_epi32((__m512i)a, (__m512i)b); }
INLINE static U32 join(U32 low, U32 high) { return (U32)_mm512_mask_blend_epi16(0xAAAAAAAA, (__m512i)low, (__m512i)high); }
INLINE static U16 larger(U16 a, U16 b) { return (U16)_mm512_max_epu16(raw(a), raw(b)); }
INLINE static bool any_sign(U16 v) { return _mm512_movepi16_mask(raw(v)) != 0; }
INLINE static void settle(U16& a, U16& b) { asm("" : "+v"(a), "+v"(b)); }

template <bool stream>
INLINE static void put(char* p, U16 v) {
  if constexpr (stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), raw(v));
  } else {
    _mm512_storeu_si512(p, raw(v));
  }
}

#include "kernels_vector.inc"

constexpr Kernels kernels{"avx512", vector_bytes, all_pairs()};

}  // namespace

const Kernels* avx512_kernels() { return __builtin_cpu_supports("avx512bw") ? &kernels : nullptr; }

}  // namespace gemma4_moe

#else

const gemma4_moe::Kernels* gemma4_moe::avx512_kernels() { return nullptr; }

#endif
