// lanes.h on AVX2 with FMA and F16C: two registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace avx2 {

constexpr int MOST_COLUMNS = 4;

struct F {
    __m256 a, b;
};

static inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
static inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline F abs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline float sum(F x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
static inline float largest(F x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}

static inline __m256 power_of_two(__m256 shifted) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(127 << 23)));
}
static inline F power_of_two(F shifted) { return {power_of_two(shifted.a), power_of_two(shifted.b)}; }

static inline F load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
static inline void store_half(uint16_t* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
static inline __m256 widened(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline F load_bf16(const uint16_t* p) { return {widened(p), widened(p + 8)}; }
static inline void load_bf16_pairs(const uint16_t* p, F& first, F& second) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)p), y = _mm256_loadu_si256((const __m256i*)(p + 16));
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(x, upper)), _mm256_castsi256_ps(_mm256_and_si256(y, upper))};
}
static inline int32_t store_rounded(int8_t* p, F x) {
    alignas(32) int32_t q[16];
    _mm256_store_si256((__m256i*)q, _mm256_cvtps_epi32(x.a));
    _mm256_store_si256((__m256i*)(q + 8), _mm256_cvtps_epi32(x.b));
    int32_t total = 0;
    for (int i = 0; i < 16; i++) {
        p[i] = int8_t(q[i]);
        total += q[i];
    }
    return total;
}

struct Bytes {
    __m256i a, b;
};

static inline Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
static inline Bytes low_halves(Bytes w) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
}
static inline Bytes high_halves(Bytes w) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(w.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(w.b, 4), mask)};
}

struct Dots {
    __m256i a, b;
    // Weights are taken as signed bytes here, so there is no offset to take out.
    void start8(int32_t) { a = b = _mm256_setzero_si256(); }
    void start4(int32_t offset) { a = b = _mm256_set1_epi32(offset >> 4); }
    void add8(Bytes w, const int8_t* x) {
        const __m256i four = broadcast(x), flip = _mm256_set1_epi8(-128);
        a = _mm256_add_epi32(a, signed_dots(_mm256_xor_si256(w.a, flip), four));
        b = _mm256_add_epi32(b, signed_dots(_mm256_xor_si256(w.b, flip), four));
    }
    void add4(Bytes w, const int8_t* x) {
        const __m256i four = broadcast(x), ones = _mm256_set1_epi16(1);
        a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, four), ones));
        b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, four), ones));
    }
    F total() const { return {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)}; }

   private:
    static __m256i broadcast(const int8_t* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        return _mm256_set1_epi32(four);
    }
    // |w|·(x with w's sign): two products fit 16 bits, since x lies within ±127.
    static __m256i signed_dots(__m256i w, __m256i x) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1));
    }
};

}  // namespace avx2
