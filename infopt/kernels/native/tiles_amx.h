// Products of sixteen tokens by AMX: the same integer sums as `Dots`, so that results agree bit for bit.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <vector>

#include "lanes.h"

namespace INFOPT_ISA {

constexpr int TILE = 16;           // tokens of a tile
constexpr int PREFETCH = 4 << 10;  // bytes ahead of the weights in use
constexpr int LEAST_TILED = 32;  // fewer wait for memory, which lanes overlap better with: 5 tokens cost 1.2 steps so, and 1.5 in tiles

// Whether the kernel lets this process use tiles; asked once.
static inline bool may_use_tiles() {
    static const bool may = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return may;
}

enum class Tiles { NONE, INTEGERS, HALVES };

struct TileShape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles have shapes while one of these lives. 0–3: sums, [16 tokens][16 rows] of 32 bits. HALVES: 4, 5: inputs, [16 tokens][32]
// bfloat16; 6, 7: weights, [16][16 rows][2]. INTEGERS: 4: inputs, [16 tokens][32] int8; 5: weights, [8][16 rows][4].
class Tiled {
   public:
    explicit Tiled(Tiles use) : use(use) {
        if (use == Tiles::NONE) return;
        TileShape shape;
        if (use == Tiles::INTEGERS) {
            shape.bytes[4] = 32;
            shape.rows[5] = 8;
        }
        asm volatile("" : : "r"(&shape) : "memory");  // the compiler does not know that this is read
        _tile_loadconfig(&shape);
    }
    ~Tiled() {
        if (use != Tiles::NONE) _tile_release();
    }
    Tiled(const Tiled&) = delete;

   private:
    const Tiles use;
};

// Four groups of a block's weights as tiles read them, [8][16 rows][4] unsigned bytes each: as they lie, or unpacked to `room`.
template <int KIND>
static inline const uint8_t* group_weights(const uint8_t* p, int groups, uint8_t* room) {
    for (int i = 0; KIND == INT4 && i < groups * GROUP * LANES / 2; i += 64) {
        const Bytes both = load_bytes(p + i);
        _mm512_store_si512(room + 2 * i, low_halves(both).v);
        _mm512_store_si512(room + 2 * i + 64, high_halves(both).v);
    }
    asm volatile("" ::: "memory");  // tile loads are not known to read memory
    return KIND == INT8 ? p : room;
}

// The sums of one group of tokens with one block, by tile `i`: [tokens][16 rows]. A macro, since the assembler reads the tile's
// number.
#define INFOPT_TILE_SUMS(i)                                                  \
    _tile_zero(i);                                                           \
    _tile_loadd(4, in + i * GROUP, stride);                                  \
    _tile_loadd(5, weights + i * GROUP * LANES, 64);                         \
    _tile_dpbsud(i, 4, 5);                                                   \
    _tile_stored(i, sums[side][i], 64)

// y[16] = the products of sixteen tokens with one block. Rows of `x` are padded to whole tiles.
template <int KIND, bool HAS_ZEROS>
static inline void tile_tokens(const Matrix& w, const Inputs& x, int token, int block, F* y) {
    constexpr int TOGETHER = 4;  // groups whose sums are on their way while others are scaled
    constexpr int BYTES = GROUP * LANES / (KIND == INT4 ? 2 : 1);
    const int groups = x.inner / GROUP, span = w.group / GROUP, stride = x.inner;
    const size_t first = size_t(block) * (groups / span);
    const uint8_t* p = (const uint8_t*)w.weights + size_t(block) * groups * BYTES;
    const int8_t* in = x.rounded + size_t(token) * stride;
    const float* scales = x.scales + x.first_scale(token);
    const int32_t* offsets = x.offsets + x.first_scale(token);
    alignas(64) int32_t sums[2][TOGETHER][TILE][LANES];  // of these groups, and of those before, which are in memory by now
    alignas(64) uint8_t room[TOGETHER * GROUP * LANES];
    F part[TILE];
    for (int m = 0; m < TILE; m++) part[m] = zero();
    const auto add_group = [&](int g, const int32_t (*sum)[LANES], const uint8_t* ahead) __attribute__((always_inline)) {
        const F scale = load_scales(w.scales, w.scales_are_float32, first + g / span);
        F stored_zero = zero();
        if (HAS_ZEROS) stored_zero = load_scales(w.zeros, w.scales_are_float32, first + g / span);
        const float* by_token = scales + size_t(g) * LANES;
        const int32_t* offset = offsets + size_t(g) * LANES;
#pragma GCC unroll 16
        for (int m = 0; m < TILE; m++) {
            if (m * 64 < BYTES) __builtin_prefetch(ahead + m * 64);  // one by one: many at once wait for one another
            __m512i whole = _mm512_load_si512(sum[m]);
            if (KIND == INT8) whole = _mm512_add_epi32(whole, _mm512_set1_epi32(offset[m]));
            if (KIND == INT4 && !HAS_ZEROS) whole = _mm512_add_epi32(whole, _mm512_set1_epi32(offset[m] >> 4));
            F total = {_mm512_cvtepi32_ps(whole)};
            if (HAS_ZEROS) total = fma(stored_zero, set1(float(offset[m]) * (1.0f / 128)), total);
            part[m] = fma(total, mul(scale, set1(by_token[m])), part[m]);
        }
    };
    int g = 0, side = 0;
    for (; g + TOGETHER <= groups; g += TOGETHER, side ^= 1, in += TOGETHER * GROUP, p += TOGETHER * BYTES) {
        const uint8_t* weights = group_weights<KIND>(p, TOGETHER, room);
        INFOPT_TILE_SUMS(0);
        INFOPT_TILE_SUMS(1);
        INFOPT_TILE_SUMS(2);
        INFOPT_TILE_SUMS(3);
        for (int i = 0; g && i < TOGETHER; i++) add_group(g - TOGETHER + i, sums[side ^ 1][i], p + i * BYTES + PREFETCH);
    }
    for (int i = 0; g && i < TOGETHER; i++) add_group(g - TOGETHER + i, sums[side ^ 1][i], p + i * BYTES + PREFETCH);
    for (; g < groups; g++, in += GROUP, p += BYTES) {
        const uint8_t* weights = group_weights<KIND>(p, 1, room);
        INFOPT_TILE_SUMS(0);
        add_group(g, sums[side][0], p + PREFETCH);
    }
    for (int m = 0; m < TILE; m++) y[m] = w.bias ? add(part[m], load(w.bias + block * LANES)) : part[m];
}

[[gnu::noinline]] static void tile(const Matrix& w, const Inputs& x, int token, int block, F* y) {
    if (w.kind == INT8) return tile_tokens<INT8, false>(w, x, token, block, y);
    w.zeros ? tile_tokens<INT4, true>(w, x, token, block, y) : tile_tokens<INT4, false>(w, x, token, block, y);
}

}  // namespace INFOPT_ISA
