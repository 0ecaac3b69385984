// NEON: one lane of 128 bits. These processors notice whole lines being written, so there are no streaming stores.

#include "kernels.hpp"

#if defined(__aarch64__)

#include <arm_neon.h>

#define TARGET
#define INLINE __attribute__((always_inline)) inline

namespace gemma4_moe {
namespace {

constexpr int lanes = 1;
constexpr bool streams = false;
typedef uint16_t U16 __attribute__((vector_size(16)));
typedef uint32_t U32 __attribute__((vector_size(16)));
typedef float F32 __attribute__((vector_size(16)));

INLINE static U16 gather(const char* p, ptrdiff_t) {
  return (U16)vld1q_u8(reinterpret_cast<const uint8_t*>(p));
}

INLINE static U16 zip16_low(U16 a, U16 b) { return (U16)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b); }
INLINE static U16 zip16_high(U16 a, U16 b) { return (U16)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b); }
INLINE static U16 zip32_low(U16 a, U16 b) { return (U16)vzip1q_u32((uint32x4_t)a, (uint32x4_t)b); }
INLINE static U16 zip32_high(U16 a, U16 b) { return (U16)vzip2q_u32((uint32x4_t)a, (uint32x4_t)b); }
INLINE static U16 zip64_low(U16 a, U16 b) { return (U16)vzip1q_u64((uint64x2_t)a, (uint64x2_t)b); }
INLINE static U16 zip64_high(U16 a, U16 b) { return (U16)vzip2q_u64((uint64x2_t)a, (uint64x2_t)b); }
INLINE static U16 narrow(U32 a, U32 b) { return (U16)vuzp1q_u16((uint16x8_t)a, (uint16x8_t)b); }
INLINE static U32 join(U32 low, U32 high) { return (low & 0xFFFFu) | (high & 0xFFFF0000u); }
INLINE static U16 larger(U16 a, U16 b) { return (U16)vmaxq_u16((uint16x8_t)a, (uint16x8_t)b); }
INLINE static bool any_sign(U16 v) { return vmaxvq_u16((uint16x8_t)v) >= 0x8000; }
INLINE static void settle(U16& a, U16& b) { asm("" : "+w"(a), "+w"(b)); }

template <bool>
INLINE static void put(char* p, U16 v) {
  vst1q_u8(reinterpret_cast<uint8_t*>(p), (uint8x16_t)v);
}

#include "kernels_vector.inc"

constexpr Kernels kernels{"neon", 0, all_pairs()};

}  // namespace

const Kernels* neon_kernels() { return &kernels; }

}  // namespace gemma4_moe

#else

const gemma4_moe::Kernels* gemma4_moe::neon_kernels() { return nullptr; }

#endif
