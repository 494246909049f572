// Products of packed weights with one to many columns of inputs, a block of 16 rows and a few columns at a time.
#pragma once

#include <vector>

#include "interface.h"
#include "lanes.h"

namespace INFOPT_ISA {

constexpr int GROUP = 32;          // inputs that are rounded together
constexpr int AHEAD = 8 << 10;     // bytes ahead of the weights in use, where several columns keep them there for a while
constexpr int NEAR = 2 << 10;      // and for one column, whose weights the processor asks for by itself where it is let

// Asks for weights that are needed soon: into the second cache, which takes many more requests at a time than the first.
template <int COLUMNS = 8>
static inline void prefetch(const void* p) {
    __builtin_prefetch((const char*)p + (COLUMNS == 1 ? NEAR : AHEAD), 0, 2);
}

// Inputs of a product, [tokens, inner]: as they are, and, for integer weights, rounded to int8 by groups of 32.
struct Inputs {
    int inner;  // padded to 32
    float* values;
    int8_t* rounded;
    float* scales;     // [tokens / 16, inner / 32, 16]: side by side for the tokens that are multiplied together
    int32_t* offsets;  // the same of −128·Σ rounded
    uint16_t* halves;  // [parts, tokens padded to 16, inner], bfloat16, for products of prompts
    int parts;         // 0 for others
    size_t apart;      // from one part to the next

    size_t first_scale(int token) const { return size_t(token / LANES) * (inner / GROUP) * LANES + token % LANES; }
};

// Room for them, which grows to the largest product.
struct Buffers {
    std::vector<float> values, scales;
    std::vector<int8_t> rounded;
    std::vector<int32_t> offsets;
    std::vector<uint16_t> halves;

    // `parts`: bfloat16 numbers that stand for an input in products of prompts, 0 for others.
    Inputs of(int inner, int tokens, int parts = 0) {
        // Scales lie by sixteen tokens, and whole tiles of inputs are read.
        const size_t all = size_t(tokens + LANES - 1) / LANES * LANES * inner;
        if (values.size() < all) {
            values.resize(all);
            rounded.resize(all);
            scales.resize(all / GROUP);
            offsets.resize(all / GROUP);
        }
        if (halves.size() < parts * all) halves.resize(parts * all);
        return {inner, values.data(), rounded.data(), scales.data(), offsets.data(), halves.data(), parts, all};
    }
};

static inline bool is_integer(const Matrix& w) { return w.kind == INT8 || w.kind == INT4; }
static inline int blocks_of(const Matrix& w) { return (w.rows + LANES - 1) / LANES; }
static inline size_t block_bytes(const Matrix& w) {
    constexpr int BITS[] = {32, 16, 8, 4};  // by kind
    return size_t(w.inner) * LANES * BITS[w.kind] / 8;
}

// Rounds one row of inputs, each group of 32 by its own scale.
static inline void round_row(const Inputs& x, int token) {
    const int groups = x.inner / GROUP;
    for (int g = 0; g < groups; g++) {
        const float* from = x.values + size_t(token) * x.inner + g * GROUP;
        int8_t* to = x.rounded + size_t(token) * x.inner + g * GROUP;
        const F a = load(from), b = load(from + LANES);
        const float most = largest(max(abs(a), abs(b)));
        const F inverse = set1(most > 0 ? 127.0f / most : 0.0f);
        const int32_t total = store_rounded(to, mul(a, inverse)) + store_rounded(to + LANES, mul(b, inverse));
        // A NaN has no int8; its group's scale carries it on.
        const float checked = sum(add(a, b));
        const size_t at = x.first_scale(token) + size_t(g) * LANES;
        x.scales[at] = checked == checked ? most / 127.0f : checked;
        x.offsets[at] = -128 * total;
    }
}

// Scales, or zeros, of one block's group.
static inline F load_scales(const void* scales, bool are_float32, size_t index) {
    return are_float32 ? load((const float*)scales + index * LANES) : load_bf16((const uint16_t*)scales + index * LANES);
}

template <int COLUMNS>
static inline void tile_float32(const Matrix& w, const Inputs& x, int token, int block, F* y) {
    constexpr int CHAINS = COLUMNS == 1 ? 4 : COLUMNS == 2 ? 2 : 1;  // sums that do not wait for one another
    const float* p = (const float*)w.weights + size_t(block) * w.inner * LANES;
    const float* in = x.values + size_t(token) * x.inner;
    F part[COLUMNS][CHAINS];
    UNROLLED for (int m = 0; m < COLUMNS; m++)
        UNROLLED for (int c = 0; c < CHAINS; c++) part[m][c] = zero();
    for (int k = 0; k < w.inner; k += CHAINS) {
        UNROLLED for (int c = 0; c < CHAINS; c++, p += LANES) {
            prefetch<COLUMNS>(p);
            const F weights = load(p);
            UNROLLED for (int m = 0; m < COLUMNS; m++) part[m][c] = fma(weights, set1(in[size_t(m) * x.inner + k + c]), part[m][c]);
        }
    }
    UNROLLED for (int m = 0; m < COLUMNS; m++) {
        y[m] = part[m][0];
        UNROLLED for (int c = 1; c < CHAINS; c++) y[m] = add(y[m], part[m][c]);
    }
}

template <int COLUMNS>
static inline void tile_bfloat16(const Matrix& w, const Inputs& x, int token, int block, F* y) {
    constexpr int CHAINS = COLUMNS <= 2 ? 2 : 1;
    const uint16_t* p = (const uint16_t*)w.weights + size_t(block) * w.inner * LANES;
    const float* in = x.values + size_t(token) * x.inner;
    F part[COLUMNS][2 * CHAINS];
    UNROLLED for (int m = 0; m < COLUMNS; m++)
        UNROLLED for (int c = 0; c < 2 * CHAINS; c++) part[m][c] = zero();
    for (int k = 0; k < w.inner; k += 2 * CHAINS) {
        UNROLLED for (int c = 0; c < CHAINS; c++, p += 2 * LANES) {
            prefetch<COLUMNS>(p);
            F first, second;
            load_bf16_pairs(p, first, second);
            UNROLLED for (int m = 0; m < COLUMNS; m++) {
                const float* at = in + size_t(m) * x.inner + k + 2 * c;
                part[m][2 * c] = fma(first, set1(at[0]), part[m][2 * c]);
                part[m][2 * c + 1] = fma(second, set1(at[1]), part[m][2 * c + 1]);
            }
        }
    }
    UNROLLED for (int m = 0; m < COLUMNS; m++) {
        y[m] = part[m][0];
        UNROLLED for (int c = 1; c < 2 * CHAINS; c++) y[m] = add(y[m], part[m][c]);
    }
}

template <int KIND, int COLUMNS, bool HAS_ZEROS>
static inline void tile_integer(const Matrix& w, const Inputs& x, int token, int block, F* y) {
    const int groups = x.inner / GROUP, span = w.group / GROUP;  // groups of inputs that share the weights' scale
    size_t shared = size_t(block) * (groups / span);
    const uint8_t* p = (const uint8_t*)w.weights + size_t(block) * x.inner * LANES / (KIND == INT4 ? 2 : 1);
    const int8_t* in = x.rounded + size_t(token) * x.inner;
    const float* scales = x.scales + x.first_scale(token);
    const int32_t* offsets = x.offsets + x.first_scale(token);
    F sums[COLUMNS];
    UNROLLED for (int m = 0; m < COLUMNS; m++) sums[m] = zero();
    F scale = zero(), stored_zero = zero();
    for (int g = 0, left = 0; g < groups; g++, left--, scales += LANES, offsets += LANES, in += GROUP) {
        if (!left) {
            scale = load_scales(w.scales, w.scales_are_float32, shared);
            if (HAS_ZEROS) stored_zero = load_scales(w.zeros, w.scales_are_float32, shared);
            left = span;
            shared++;
        }
        Dots dots[COLUMNS];
        UNROLLED for (int m = 0; m < COLUMNS; m++) {
            const int32_t offset = offsets[m];
            KIND == INT8 ? dots[m].start8(offset) : dots[m].start4(HAS_ZEROS ? 0 : offset);
        }
        if (KIND == INT8) {
            for (int k = 0; k < GROUP; k += 4, p += 64) {
                prefetch<COLUMNS>(p);
                const Bytes weights = load_bytes(p);
                UNROLLED for (int m = 0; m < COLUMNS; m++) dots[m].add8(weights, in + size_t(m) * x.inner + k);
            }
        } else {
            for (int k = 0; k < GROUP; k += 8, p += 64) {
                prefetch<COLUMNS>(p);
                const Bytes both = load_bytes(p), low = low_halves(both), high = high_halves(both);
                UNROLLED for (int m = 0; m < COLUMNS; m++) {
                    dots[m].add4(low, in + size_t(m) * x.inner + k);
                    dots[m].add4(high, in + size_t(m) * x.inner + k + 4);
                }
            }
        }
        UNROLLED for (int m = 0; m < COLUMNS; m++) {
            F total = dots[m].total();
            if (HAS_ZEROS) total = fma(stored_zero, set1(float(offsets[m]) * (1.0f / 128)), total);
            sums[m] = fma(total, mul(scale, set1(scales[m])), sums[m]);
        }
    }
    UNROLLED for (int m = 0; m < COLUMNS; m++) y[m] = sums[m];
}

template <int COLUMNS>
[[gnu::noinline]] static void tile(const Matrix& w, const Inputs& x, int token, int block, F* y) {
    switch (w.kind) {
        case FLOAT32: tile_float32<COLUMNS>(w, x, token, block, y); break;
        case BFLOAT16: tile_bfloat16<COLUMNS>(w, x, token, block, y); break;
        case INT8: tile_integer<INT8, COLUMNS, false>(w, x, token, block, y); break;
        default:
            w.zeros ? tile_integer<INT4, COLUMNS, true>(w, x, token, block, y)
                    : tile_integer<INT4, COLUMNS, false>(w, x, token, block, y);
    }
    if (w.bias)
        for (int m = 0; m < COLUMNS; m++) y[m] = add(y[m], load(w.bias + block * LANES));
}

}  // namespace INFOPT_ISA

#if defined(__AMX_INT8__)
#include "tiles_amx.h"
#include "tiles_prompt.h"
#else
namespace INFOPT_ISA {
constexpr int TILE = 1, LEAST_TILED = 1;  // no tiles
static inline bool may_use_tiles() { return false; }
enum class Tiles { NONE, INTEGERS, HALVES };
struct Tiled {
    explicit Tiled(Tiles) {}
};
static inline void tile(const Matrix&, const Inputs&, int, int, F*) {}
static inline bool is_for_prompts(const Matrix&, int) { return false; }
static inline int parts_of(const Matrix&) { return 0; }
static inline void split_row(const float*, int, int, uint16_t*, size_t) {}
template <int TOGETHER, int BLOCKS, class Use>
static inline void prompt_products(const Matrix&, const Inputs&, int, int, Use) {}
}  // namespace INFOPT_ISA
#endif

namespace INFOPT_ISA {

constexpr int MOST_TOGETHER = TILE > MOST_COLUMNS ? TILE : MOST_COLUMNS;  // tokens that are handed on together

template <int COLUMNS, int BLOCKS>
static inline void tiles(const Matrix& w, const Inputs& x, int token, int block, F (*y)[MOST_TOGETHER]) {
    for (int b = 0; b < BLOCKS; b++) tile<COLUMNS>(w, x, token, block + b, y[b]);
}

// Whether a product of so many tokens goes through tiles; the thread must hold `Tiled`.
static inline bool is_tiled(const Matrix& w, int tokens) {
    return TILE > 1 && is_integer(w) && tokens >= LEAST_TILED && may_use_tiles();
}

template <int BLOCKS, class Use>
static inline void each_token_tile(const Matrix& w, const Inputs& x, int tokens, int block, Use use) {
    F y[BLOCKS][MOST_TOGETHER];
    for (int t = 0; t < tokens; t += TILE) {
        for (int b = 0; b < BLOCKS; b++) tile(w, x, t, block + b, y[b]);
        use(t, tokens - t < TILE ? tokens - t : TILE, y);
    }
}

// Calls `use(first token, columns, F y[BLOCKS][MOST_TOGETHER])` for all tokens' products with BLOCKS blocks of rows.
template <int BLOCKS = 1, class Use>
static inline void each_tile(const Matrix& w, const Inputs& x, int tokens, int block, Use use) {
    if (is_tiled(w, tokens)) return each_token_tile<BLOCKS>(w, x, tokens, block, use);
    F y[BLOCKS][MOST_TOGETHER];
    int t = 0;
    for (; tokens - t >= MOST_COLUMNS; t += MOST_COLUMNS) {
        tiles<MOST_COLUMNS, BLOCKS>(w, x, t, block, y);
        use(t, MOST_COLUMNS, y);
    }
    switch (tokens - t) {
        case 0: return;
        case 1: tiles<1, BLOCKS>(w, x, t, block, y); break;
        case 2: tiles<2, BLOCKS>(w, x, t, block, y); break;
        case 3: tiles<3, BLOCKS>(w, x, t, block, y); break;
        case 4: tiles<4, BLOCKS>(w, x, t, block, y); break;
        case 5: tiles<5, BLOCKS>(w, x, t, block, y); break;
        case 6: tiles<6, BLOCKS>(w, x, t, block, y); break;
        default: tiles<7, BLOCKS>(w, x, t, block, y);
    }
    use(t, tokens - t, y);
}

// One row of a packed matrix, as float32: what an embedding is read by.
static inline void read_row(const Matrix& w, int row, float* to) {
    const int block = row / LANES, lane = row % LANES, span = w.group ? w.group : w.inner;
    const size_t base = size_t(block) * w.inner * LANES;
    for (int k = 0; k < w.inner; k++) {
        if (w.kind == FLOAT32) {
            to[k] = ((const float*)w.weights)[base + size_t(k) * LANES + lane];
        } else if (w.kind == BFLOAT16) {
            const uint32_t bits = uint32_t(((const uint16_t*)w.weights)[base + size_t(k / 2) * 2 * LANES + 2 * lane + k % 2]) << 16;
            memcpy(to + k, &bits, 4);
        } else {
            const size_t group = (size_t(block) * (w.inner / span) + k / span) * LANES + lane;
            const auto number = [&](const void* from) {
                if (w.scales_are_float32) return ((const float*)from)[group];
                const uint32_t bits = uint32_t(((const uint16_t*)from)[group]) << 16;
                float x;
                memcpy(&x, &bits, 4);
                return x;
            };
            float q;
            if (w.kind == INT8) {
                q = float(((const uint8_t*)w.weights)[base + size_t(k / 4) * 64 + 4 * lane + k % 4]) - 128;
            } else {
                const uint8_t both = ((const uint8_t*)w.weights)[base / 2 + size_t(k / 8) * 64 + 4 * lane + k % 4];
                q = float(k % 8 < 4 ? both & 15 : both >> 4) - (w.zeros ? number(w.zeros) : 8.0f);
            }
            to[k] = q * number(w.scales);
        }
    }
}

}  // namespace INFOPT_ISA
