// lanes.h on AVX-512 with VNNI: one register holds all sixteen.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace INFOPT_ISA {

constexpr int MOST_COLUMNS = 8;  // columns of inputs that one tile keeps in registers

struct F {
    __m512 v;
};

static inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
static inline F zero() { return {_mm512_setzero_ps()}; }
static inline F set1(float x) { return {_mm512_set1_ps(x)}; }
static inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
static inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline float sum(F a) { return _mm512_reduce_add_ps(a.v); }
static inline float largest(F a) { return _mm512_reduce_max_ps(a.v); }

// 2^n, where `shifted` is n + 1.5·2^23
static inline F power_of_two(F shifted) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(127 << 23)))};
}

static inline F load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
static inline void store_half(uint16_t* p, F a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT)); }
static inline F load_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
// Sixteen pairs of bfloat16 that lie side by side: the first of each, and the second.
static inline void load_bf16_pairs(const uint16_t* p, F& first, F& second) {
    const __m512i both = _mm512_loadu_si512(p);
    first = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
    second = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))))};
}
// Rounds to int8 (which fits); returns the sum.
static inline int32_t store_rounded(int8_t* p, F a) {
    const __m512i q = _mm512_cvtps_epi32(a.v);
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(q));
    return _mm512_reduce_add_epi32(q);
}

// 64 weights: sixteen rows × four inputs.
struct Bytes {
    __m512i v;
};

static inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Bytes low_halves(Bytes w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
static inline Bytes high_halves(Bytes w) { return {_mm512_and_si512(_mm512_srli_epi16(w.v, 4), _mm512_set1_epi8(15))}; }

struct Dots {
    __m512i v;
    // `offset`: −128·Σx, which takes out that weights are stored as q + 128
    void start8(int32_t offset) { v = _mm512_set1_epi32(offset); }
    void start4(int32_t offset) { v = _mm512_set1_epi32(offset >> 4); }
    void add8(Bytes w, const int8_t* x) { add4(w, x); }
    void add4(Bytes w, const int8_t* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        v = _mm512_dpbusd_epi32(v, w.v, _mm512_set1_epi32(four));
    }
    F total() const { return {_mm512_cvtepi32_ps(v)}; }
};

}  // namespace INFOPT_ISA
