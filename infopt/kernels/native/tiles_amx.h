// Products of sixteen tokens by AMX: the same integer sums as `Dots`, so that results agree bit for bit.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <vector>

#include "lanes.h"

namespace INFOPT_ISA {

constexpr int TILE = 16;         // tokens of a tile
constexpr int LEAST_TILED = 32;  // fewer tokens are as fast lane by lane: the weights must be made signed first

// Whether the kernel lets this process use tiles; asked once.
static inline bool may_use_tiles() {
    static const bool may = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return may;
}

// Tiles 0–3: sums, [16 tokens][16 rows] int32. 4: inputs, [16 tokens][32] int8. 5: weights, [8][16 rows][4] int8.
struct TileShape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 32, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 8};
};

// Tiles have their shapes while one of these lives, where `use` says so.
class Tiled {
   public:
    explicit Tiled(bool use) : use(use) {
        if (!use) return;
        static const TileShape shape;
        _tile_loadconfig(&shape);
    }
    ~Tiled() {
        if (use) _tile_release();
    }
    Tiled(const Tiled&) = delete;

   private:
    const bool use;
};

// A block's weights as signed bytes, [inner / 4][16][4]: q, or what is stored where there are zeros.
template <int KIND>
static inline const int8_t* signed_weights(const Matrix& w, int block, int slot) {
    static thread_local std::vector<int8_t> room[2];
    std::vector<int8_t>& to = room[slot];
    const size_t bytes = size_t(w.inner) * LANES;
    if (to.size() < bytes) to.resize(bytes);
    const uint8_t* p = (const uint8_t*)w.weights + size_t(block) * bytes / (KIND == INT4 ? 2 : 1);
    const __m512i middle = _mm512_set1_epi8(int8_t(KIND == INT8 ? 128 : w.zeros ? 0 : 8));
    for (size_t i = 0; i < bytes; i += KIND == INT4 ? 128 : 64, p += 64) {
        __builtin_prefetch(p + PREFETCH);
        const Bytes stored = load_bytes(p);
        if (KIND == INT8) {
            _mm512_storeu_si512(to.data() + i, _mm512_sub_epi8(stored.v, middle));
        } else {
            _mm512_storeu_si512(to.data() + i, _mm512_sub_epi8(low_halves(stored).v, middle));
            _mm512_storeu_si512(to.data() + i + 64, _mm512_sub_epi8(high_halves(stored).v, middle));
        }
    }
    asm volatile("" ::: "memory");  // tile loads are not known to read memory
    return to.data();
}

// The sums of one group of sixteen tokens with one block, by tile `i`: [16 tokens][16 rows]. A macro, since the assembler reads
// the tile's number.
#define INFOPT_TILE_SUMS(i, inputs, stride, weights, to) \
    _tile_zero(i);                                       \
    _tile_loadd(4, inputs, stride);                      \
    _tile_loadd(5, weights, 64);                         \
    _tile_dpbssd(i, 4, 5);                               \
    _tile_stored(i, to, 64)

// y[16] = the products of sixteen tokens with one block; `weights` as above. Rows of `x` are padded to whole tiles.
template <bool HAS_ZEROS>
static inline void tile_tokens(const Matrix& w, const int8_t* weights, const Inputs& x, int token, int block, F* y) {
    constexpr int TOGETHER = 4;  // groups whose sums are on their way while others are scaled
    const int groups = x.inner / GROUP, span = w.group / GROUP, stride = x.inner;
    const size_t first = size_t(block) * (groups / span);
    const int8_t* in = x.rounded + size_t(token) * stride;
    const float* scales = x.scales + x.first_scale(token);
    const int32_t* offsets = x.offsets + x.first_scale(token);
    alignas(64) int32_t sums[TOGETHER][TILE][LANES];
    F part[TILE];
    for (int m = 0; m < TILE; m++) part[m] = zero();
    const auto add_group = [&](int g, const int32_t (*sum)[LANES]) __attribute__((always_inline)) {
        const F scale = load_scales(w.scales, w.scales_are_float32, first + g / span);
        F stored_zero = zero();
        if (HAS_ZEROS) stored_zero = load_scales(w.zeros, w.scales_are_float32, first + g / span);
        const float* by_token = scales + size_t(g) * LANES;
#pragma GCC unroll 16
        for (int m = 0; m < TILE; m++) {
            F total = {_mm512_cvtepi32_ps(_mm512_load_si512(sum[m]))};
            if (HAS_ZEROS) total = fma(stored_zero, set1(float(offsets[size_t(g) * LANES + m]) * (1.0f / 128)), total);
            part[m] = fma(total, mul(scale, set1(by_token[m])), part[m]);
        }
    };
    int g = 0;
    for (; g + TOGETHER <= groups; g += TOGETHER, in += TOGETHER * GROUP, weights += TOGETHER * GROUP * LANES) {
        INFOPT_TILE_SUMS(0, in, stride, weights, sums[0]);
        INFOPT_TILE_SUMS(1, in + GROUP, stride, weights + GROUP * LANES, sums[1]);
        INFOPT_TILE_SUMS(2, in + 2 * GROUP, stride, weights + 2 * GROUP * LANES, sums[2]);
        INFOPT_TILE_SUMS(3, in + 3 * GROUP, stride, weights + 3 * GROUP * LANES, sums[3]);
        for (int i = 0; i < TOGETHER; i++) add_group(g + i, sums[i]);
    }
    for (; g < groups; g++, in += GROUP, weights += GROUP * LANES) {
        INFOPT_TILE_SUMS(0, in, stride, weights, sums[0]);
        add_group(g, sums[0]);
    }
    for (int m = 0; m < TILE; m++) y[m] = w.bias ? add(part[m], load(w.bias + block * LANES)) : part[m];
}

}  // namespace INFOPT_ISA
