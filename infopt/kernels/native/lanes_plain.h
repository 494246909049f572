// lanes.h in plain C++: what the other files mean, and what runs where there is none of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace plain {

constexpr int MOST_COLUMNS = 2;

struct F {
    float v[16];
};

#define EACH(expression)                     \
    F r;                                     \
    for (int i = 0; i < 16; i++) r.v[i] = expression; \
    return r

static inline float widened(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

static inline F load(const float* p) { EACH(p[i]); }
static inline void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
static inline F set1(float x) { EACH(x); }
static inline F zero() { return set1(0); }
static inline F add(F a, F b) { EACH(a.v[i] + b.v[i]); }
static inline F sub(F a, F b) { EACH(a.v[i] - b.v[i]); }
static inline F mul(F a, F b) { EACH(a.v[i] * b.v[i]); }
static inline F div(F a, F b) { EACH(a.v[i] / b.v[i]); }
static inline F max(F a, F b) { EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline F min(F a, F b) { EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline F abs(F a) { EACH(std::fabs(a.v[i])); }
static inline F fma(F a, F b, F c) { EACH(a.v[i] * b.v[i] + c.v[i]); }
static inline float sum(F a) {
    float total = 0;
    for (float x : a.v) total += x;
    return total;
}
static inline float largest(F a) {
    float most = a.v[0];
    for (float x : a.v) most = x > most ? x : most;
    return most;
}
static inline F power_of_two(F shifted) { EACH(widened((bits_of(shifted.v[i]) << 23) + (127u << 23))); }

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 31) return widened(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return widened(sign | (exponent + 112) << 23 | mantissa << 13);
    return (sign ? -1.0f : 1.0f) * float(mantissa) * 5.9604644775390625e-8f;
}
static inline uint16_t float_to_half(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (rest < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(widened(rest) * 16777216.0f)));
    return uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}
static inline F load_half(const uint16_t* p) { EACH(half_to_float(p[i])); }
static inline void store_half(uint16_t* p, F a) {
    for (int i = 0; i < 16; i++) p[i] = float_to_half(a.v[i]);
}
static inline F load_bf16(const uint16_t* p) { EACH(widened(uint32_t(p[i]) << 16)); }
static inline void load_bf16_pairs(const uint16_t* p, F& first, F& second) {
    for (int i = 0; i < 16; i++) {
        first.v[i] = widened(uint32_t(p[2 * i]) << 16);
        second.v[i] = widened(uint32_t(p[2 * i + 1]) << 16);
    }
}
static inline int32_t store_rounded(int8_t* p, F a) {
    int32_t total = 0;
    for (int i = 0; i < 16; i++) {
        p[i] = int8_t(std::nearbyint(a.v[i]));
        total += p[i];
    }
    return total;
}

struct Bytes {
    uint8_t v[64];
};

static inline Bytes load_bytes(const uint8_t* p) {
    Bytes w;
    std::memcpy(w.v, p, 64);
    return w;
}
static inline Bytes low_halves(Bytes w) {
    for (auto& byte : w.v) byte &= 15;
    return w;
}
static inline Bytes high_halves(Bytes w) {
    for (auto& byte : w.v) byte >>= 4;
    return w;
}

struct Dots {
    int32_t v[16];
    // `offset`: −128·Σx, which takes out that weights are stored as q + 128
    void start8(int32_t offset) {
        for (auto& part : v) part = offset;
    }
    void start4(int32_t offset) { start8(offset >> 4); }
    void add8(Bytes w, const int8_t* x) { add4(w, x); }
    void add4(Bytes w, const int8_t* x) {
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 4; j++) v[i] += int32_t(w.v[4 * i + j]) * x[j];
    }
    F total() const { EACH(float(v[i])); }
};

#undef EACH

}  // namespace plain
