// Products of prompts by AMX in bfloat16: sums over all inputs stay in tiles, so that no group is scaled on the way.
//
// Integer weights are made bfloat16 a block at a time, which many tokens share, and so are their inputs: both keep eight
// bits of precision where single tokens round inputs to int8. bfloat16 weights are exact, and their inputs are split into
// three bfloat16 parts that add up to what they were (down to numbers that have no bfloat16 but 0).
#pragma once

#include <immintrin.h>

#include <vector>

#include "interface.h"
#include "lanes.h"
#include "tiles_amx.h"

namespace INFOPT_ISA {

constexpr int PAIR = 2 * TILE;    // tokens that share weights in tiles
constexpr int LEAST_PROMPT = 32;  // tokens for which weights are made bfloat16, as in `infopt/runtime/steps.py`

static inline bool is_for_prompts(const Matrix& w, int tokens) {
    return w.kind != FLOAT32 && tokens >= LEAST_PROMPT && may_use_tiles();
}
static inline int parts_of(const Matrix& w) { return w.kind == BFLOAT16 ? 3 : 1; }

// Splits a row of `inner` inputs into `parts`, the smallest first, each `apart` from the one before.
static inline void split_row(const float* from, int inner, int parts, uint16_t* to, size_t apart) {
    for (int i = 0; i < inner; i += LANES) {
        __m512 left = _mm512_loadu_ps(from + i);
        for (int part = parts - 1; part >= 0; part--) {
            const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(left);
            _mm256_storeu_si256((__m256i*)(to + part * apart + i), rounded);
            left = _mm512_sub_ps(left, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
        }
    }
}

static inline void store_pairs(uint16_t* to, __m512 first, __m512 second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// Four inputs' weights, a byte each in sixteen rows: (stored − zero)·scale.
static inline void store_scaled(uint16_t* to, __m512i stored, __m512 zero, __m512 scale) {
    const __m512i byte = _mm512_set1_epi32(255);
    __m512 value[4];
    for (int i = 0; i < 4; i++)
        value[i] = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(stored, 8 * i), byte)), zero), scale);
    store_pairs(to, value[0], value[1]);
    store_pairs(to + 2 * LANES, value[2], value[3]);
}

// A block's weights as tiles read them: [inner / 2][16 rows][2] bfloat16.
static inline const uint16_t* half_weights(const Matrix& w, int block, int slot) {
    if (w.kind == BFLOAT16) return (const uint16_t*)w.weights + size_t(block) * w.inner * LANES;
    static thread_local std::vector<uint16_t> room[2];
    std::vector<uint16_t>& to = room[slot];
    if (to.size() < size_t(w.inner) * LANES) to.resize(size_t(w.inner) * LANES);
    const int bytes = w.kind == INT8 ? GROUP * LANES : GROUP * LANES / 2, groups = w.inner / GROUP, span = w.group / GROUP;
    const uint8_t* p = (const uint8_t*)w.weights + size_t(block) * groups * bytes;
    uint16_t* out = to.data();
    for (int g = 0; g < groups; g++) {
        const size_t at = size_t(block) * (groups / span) + g / span;
        const F scale = load_scales(w.scales, w.scales_are_float32, at);
        const F zero = w.zeros ? load_scales(w.zeros, w.scales_are_float32, at) : set1(w.kind == INT8 ? 128.0f : 8.0f);
        for (int i = 0; i < bytes; i += 64, p += 64) {
            prefetch(p);
            const Bytes stored = load_bytes(p);
            if (w.kind == INT8) {
                store_scaled(out, stored.v, zero.v, scale.v);
            } else {
                store_scaled(out, low_halves(stored).v, zero.v, scale.v);
                store_scaled(out += 4 * LANES, high_halves(stored).v, zero.v, scale.v);
            }
            out += 4 * LANES;
        }
    }
    asm volatile("" ::: "memory");  // tile loads are not known to read memory
    return to.data();
}

// Sums of one or two tiles of tokens with one or two blocks: tile 2·t + b, from inputs in tiles 4 and 5, weights in 6 and 7.
template <int TOKENS, int BLOCKS>
static inline void pair_sums(const Inputs& x, int token, const uint16_t* const* weights, F (*y)[2][TILE]) {
    const int stride = x.inner * int(sizeof(uint16_t));
    _tile_zero(0);
    if (BLOCKS > 1) _tile_zero(1);
    if (TOKENS > 1) _tile_zero(2);
    if (TOKENS > 1 && BLOCKS > 1) _tile_zero(3);
    for (int part = 0; part < x.parts; part++) {
        const uint16_t *a = x.halves + part * x.apart + size_t(token) * x.inner, *first = weights[0], *second = weights[BLOCKS - 1];
        for (int k = 0; k < x.inner; k += GROUP, a += GROUP, first += GROUP * LANES, second += GROUP * LANES) {
            _tile_loadd(4, a, stride);
            _tile_loadd(6, first, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (TOKENS > 1) {
                _tile_loadd(5, a + size_t(TILE) * x.inner, stride);
                _tile_dpbf16ps(2, 5, 6);
            }
            if (BLOCKS > 1) {
                _tile_loadd(7, second, 64);
                _tile_dpbf16ps(1, 4, 7);
                if (TOKENS > 1) _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, y[0][0], 64);
    if (BLOCKS > 1) _tile_stored(1, y[0][1], 64);
    if (TOKENS > 1) _tile_stored(2, y[1][0], 64);
    if (TOKENS > 1 && BLOCKS > 1) _tile_stored(3, y[1][1], 64);
    asm volatile("" ::: "memory");
}

// Calls use(block, first token, columns, F y[TOGETHER][TILE]) for all tokens' products with one or two blocks.
template <int TOGETHER, int BLOCKS, class Use>
static inline void prompt_products(const Matrix& w, const Inputs& x, int tokens, int block, Use use) {
    static_assert(TOGETHER <= BLOCKS, "blocks that are used together are made together");
    const uint16_t* weights[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) weights[b] = half_weights(w, block + b, b);
    F y[2][2][TILE];
    for (int t = 0; t < tokens; t += PAIR) {
        tokens - t > TILE ? pair_sums<2, BLOCKS>(x, t, weights, y) : pair_sums<1, BLOCKS>(x, t, weights, y);
        for (int half = 0; half < 2 && t + half * TILE < tokens; half++) {
            if (w.bias)
                for (int b = 0; b < BLOCKS; b++)
                    for (F& sum : y[half][b]) sum = add(sum, load(w.bias + (block + b) * LANES));
            const int first = t + half * TILE, columns = tokens - first < TILE ? tokens - first : TILE;
            for (int b = 0; b < BLOCKS; b += TOGETHER) use(block + b, first, columns, y[half] + b);
        }
    }
}

}  // namespace INFOPT_ISA
