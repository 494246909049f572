// Sixteen numbers at a time, in whatever registers the target has: AVX-512 (with AMX beside it), AVX2, NEON, or plain arrays.
//
// F: sixteen float32. Dots: sixteen int32 sums of products of four unsigned weights and four signed inputs.
// Everything above this file is written once, against these two types.
#pragma once

#include <cstdint>
#include <cstring>

// Before a loop over an array of sums, which lie in registers only where the compiler sees every index.
#define UNROLLED _Pragma("GCC unroll 16")

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#if defined(__AMX_INT8__)
#define INFOPT_ISA amx
#else
#define INFOPT_ISA avx512
#endif
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#define INFOPT_ISA avx2
#include "lanes_avx2.h"
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define INFOPT_ISA neon
#include "lanes_neon.h"
#else
#define INFOPT_ISA plain
#include "lanes_plain.h"
#endif

namespace INFOPT_ISA {

constexpr int LANES = 16;

// e^x, to 2 units in the last place between −87 and 88 (Cephes' polynomial); 0 below.
static inline F exp(F x) {
    x = max(set1(-87.5f), min(set1(88.0f), x));  // in this order a NaN stays one
    const F magic = set1(12582912.0f);  // 1.5·2^23: adding it rounds to a whole number, in the low bits
    const F shifted = fma(x, set1(1.44269504088896341f), magic);
    const F n = sub(shifted, magic);
    F r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    F p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set1(1.0f)));
    return mul(p, power_of_two(shifted));
}

// x·sigmoid(x)
static inline F silu(F x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// tanh by e^2x, which is what the approximate GELU needs of it
static inline F tanh(F x) {
    const F e = exp(mul(max(set1(-15.0f), min(set1(15.0f), x)), set1(2.0f)));
    return div(sub(e, set1(1.0f)), add(e, set1(1.0f)));
}

// 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))
static inline F gelu_tanh(F x) {
    const F inner = mul(set1(0.7978845608028654f), fma(mul(set1(0.044715f), mul(x, x)), x, x));
    return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
}

}  // namespace INFOPT_ISA
