// lanes.h on NEON with the dot product extension (Armv8.2): four registers.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace neon {

constexpr int MOST_COLUMNS = 4;

struct F {
    float32x4_t v[4];
};

#define EACH(expression)                    \
    F r;                                    \
    for (int i = 0; i < 4; i++) r.v[i] = expression; \
    return r

static inline F load(const float* p) { EACH(vld1q_f32(p + 4 * i)); }
static inline void store(float* p, F a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
static inline F set1(float x) { EACH(vdupq_n_f32(x)); }
static inline F zero() { return set1(0); }
static inline F add(F a, F b) { EACH(vaddq_f32(a.v[i], b.v[i])); }
static inline F sub(F a, F b) { EACH(vsubq_f32(a.v[i], b.v[i])); }
static inline F mul(F a, F b) { EACH(vmulq_f32(a.v[i], b.v[i])); }
static inline F div(F a, F b) { EACH(vdivq_f32(a.v[i], b.v[i])); }
static inline F max(F a, F b) { EACH(vmaxq_f32(a.v[i], b.v[i])); }
static inline F min(F a, F b) { EACH(vminq_f32(a.v[i], b.v[i])); }
static inline F abs(F a) { EACH(vabsq_f32(a.v[i])); }
static inline F fma(F a, F b, F c) { EACH(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
static inline float sum(F a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]))); }
static inline float largest(F a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))); }
static inline F power_of_two(F shifted) {
    EACH(vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(shifted.v[i]), 23), vdupq_n_s32(127 << 23))));
}
static inline F load_half(const uint16_t* p) { EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }
static inline void store_half(uint16_t* p, F a) {
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
static inline F load_bf16(const uint16_t* p) { EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))); }
static inline void load_bf16_pairs(const uint16_t* p, F& first, F& second) {
    for (int i = 0; i < 4; i++) {
        const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(p + 8 * i));
        first.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
        second.v[i] = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000u)));
    }
}
static inline int32_t store_rounded(int8_t* p, F a) {
    int32_t total = 0, q[4];
    for (int i = 0; i < 4; i++) {
        vst1q_s32(q, vcvtnq_s32_f32(a.v[i]));
        for (int j = 0; j < 4; j++) {
            p[4 * i + j] = int8_t(q[j]);
            total += q[j];
        }
    }
    return total;
}

struct Bytes {
    uint8x16_t v[4];
};

static inline Bytes load_bytes(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
static inline Bytes low_halves(Bytes w) {
    Bytes r;
    for (int i = 0; i < 4; i++) r.v[i] = vandq_u8(w.v[i], vdupq_n_u8(15));
    return r;
}
static inline Bytes high_halves(Bytes w) {
    Bytes r;
    for (int i = 0; i < 4; i++) r.v[i] = vshrq_n_u8(w.v[i], 4);
    return r;
}

struct Dots {
    int32x4_t v[4];
    // Weights are taken as signed bytes here, so there is no offset to take out.
    void start8(int32_t) {
        for (auto& part : v) part = vdupq_n_s32(0);
    }
    void start4(int32_t offset) {
        for (auto& part : v) part = vdupq_n_s32(offset >> 4);
    }
    void add8(Bytes w, const int8_t* x) {
        for (auto& part : w.v) part = veorq_u8(part, vdupq_n_u8(128));
        add4(w, x);
    }
    void add4(Bytes w, const int8_t* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
        for (int i = 0; i < 4; i++) v[i] = vdotq_s32(v[i], vreinterpretq_s8_u8(w.v[i]), all);
    }
    F total() const { EACH(vcvtq_f32_s32(v[i])); }
};

#undef EACH

}  // namespace neon
