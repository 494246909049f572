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
constexpr int LEAST_TILED = 9;   // fewer tokens are faster lane by lane: a tile costs the same for one as for sixteen

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

// y[16] = the products of sixteen tokens with one block; `signed_w` as above. Rows of `x` are padded to whole tiles.
template <bool HAS_ZEROS>
static inline void tile_tokens(const Matrix& w, const int8_t* signed_w, const Inputs& x, int token, int block, F* y) {
    constexpr int AHEAD = 4;  // groups whose sums are on their way while those before them are scaled
    const int groups = x.inner / GROUP, span = w.group / GROUP;
    const size_t first = size_t(block) * (groups / span);
    const int8_t* in = x.rounded + size_t(token) * x.inner;
    const float* scales = x.scales + x.first_scale(token);
    const int32_t* offsets = x.offsets + x.first_scale(token);
    alignas(64) int32_t sums[2][AHEAD][TILE][LANES];
    F part[TILE];
    for (int m = 0; m < TILE; m++) part[m] = zero();
    const auto multiply = [&](int from) {
        const int count = groups - from < AHEAD ? groups - from : AHEAD;
        auto& to = sums[from / AHEAD % 2];
#define MULTIPLY(i)                                                         \
    if (i < count) {                                                        \
        _tile_zero(i);                                                      \
        _tile_loadd(4, in + (from + i) * GROUP, x.inner);                   \
        _tile_loadd(5, signed_w + size_t(from + i) * GROUP * LANES, 64);    \
        _tile_dpbssd(i, 4, 5);                                              \
        _tile_stored(i, to[i], 64);                                         \
    }
        MULTIPLY(0)
        MULTIPLY(1)
        MULTIPLY(2)
        MULTIPLY(3)
#undef MULTIPLY
    };
    multiply(0);
    for (int from = 0; from < groups; from += AHEAD) {
        if (from + AHEAD < groups) multiply(from + AHEAD);
        for (int g = from; g < groups && g < from + AHEAD; g++, scales += LANES, offsets += LANES) {
            const auto& sum = sums[from / AHEAD % 2][g - from];
            const F scale = load_scales(w.scales, w.scales_are_float32, first + g / span);
            F stored_zero = zero();
            if (HAS_ZEROS) stored_zero = load_scales(w.zeros, w.scales_are_float32, first + g / span);
#pragma GCC unroll 16
            for (int m = 0; m < TILE; m++) {
                F total = {_mm512_cvtepi32_ps(_mm512_load_si512(sum[m]))};
                if (HAS_ZEROS) total = fma(stored_zero, set1(float(offsets[m]) * (1.0f / 128)), total);
                part[m] = fma(total, mul(scale, set1(scales[m])), part[m]);
            }
        }
    }
    for (int m = 0; m < TILE; m++) y[m] = w.bias ? add(part[m], load(w.bias + block * LANES)) : part[m];
}

}  // namespace INFOPT_ISA
