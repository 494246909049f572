// Weights as modules hold them → blocks of 16 rows as products read them: what `packed.pack` does in torch, in one pass.
#pragma once

#include <cmath>
#include <thread>
#include <vector>

#include "interface.h"
#include "lanes.h"

namespace INFOPT_ISA {

static inline uint16_t to_bf16(float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float from_bf16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

// One row of the source as float32, zeros behind it.
static inline void read_source(const Source& from, int row, int inner, float* to) {
    const size_t base = size_t(row) * from.stride;
    for (int k = from.inner; k < inner; k++) to[k] = 0;
    switch (from.kind) {
        case SOURCE_FLOAT32: memcpy(to, (const float*)from.data + base, size_t(from.inner) * 4); break;
        case SOURCE_BFLOAT16:
            for (int k = 0; k < from.inner; k++) to[k] = from_bf16(((const uint16_t*)from.data)[base + k]);
            break;
        case SOURCE_FLOAT16: {
            int k = 0;
            for (; k + LANES <= from.inner; k += LANES) store(to + k, load_half((const uint16_t*)from.data + base + k));
            if (k < from.inner) {
                uint16_t rest[LANES] = {};
                float wide[LANES];
                memcpy(rest, (const uint16_t*)from.data + base + k, size_t(from.inner - k) * 2);
                store(wide, load_half(rest));
                memcpy(to + k, wide, size_t(from.inner - k) * 4);
            }
            break;
        }
        default:
            for (int k = 0; k < from.inner; k++) to[k] = float(((const int8_t*)from.data)[base + k]);
    }
}

// Where weight (lane, k) of a block lies among its bytes, and the sixteen scales of group g.
static inline void put_integer(const Matrix& w, uint8_t* block, int lane, int k, int q) {
    if (w.kind == INT8) {
        block[size_t(k / 4) * 64 + 4 * lane + k % 4] = uint8_t(q + 128);
    } else {
        uint8_t& both = block[size_t(k / 8) * 64 + 4 * lane + k % 4];
        both = k % 8 < 4 ? uint8_t(q & 15) : uint8_t(both | q << 4);
    }
}

// Rounds one row, group by group: the largest weight is ±(2^(bits − 1) − 1). Its bfloat16 scales go to `scales[g · 16]`.
static inline void round_weights(const Matrix& w, const float* row, int lane, uint8_t* block, uint16_t* scales) {
    const float most = w.kind == INT8 ? 127.0f : 7.0f;
    for (int g = 0; g < w.inner / w.group; g++) {
        const float* x = row + size_t(g) * w.group;
        F high = zero(), odd = zero();
        for (int k = 0; k < w.group; k += LANES) {
            high = max(high, abs(load(x + k)));
            odd = fma(load(x + k), zero(), odd);
        }
        float largest_weight = largest(high);
        if (sum(odd) != 0) largest_weight = sum(odd);  // a NaN, which its group's scale carries on
        const uint16_t stored = to_bf16(largest_weight / most);
        scales[size_t(g) * LANES] = stored;
        const float step = std::fmax(from_bf16(stored), 1.17549435e-38f);
        for (int k = 0; k < w.group; k++) {
            const float q = std::nearbyint(x[k] / step);
            const int rounded = q != q ? 0 : int(q > most ? most : q < -most ? -most : q);
            put_integer(w, block, lane, g * w.group + k, rounded + (w.kind == INT8 ? 0 : 8));
        }
    }
}

// One block of 16 rows of the source, as `to`'s block `block`. `row`: room for a row.
static inline void pack_block(const Matrix& to, const Source& from, int first_row, int block, std::vector<float>& row) {
    const size_t weights = size_t(block) * to.inner * LANES;
    for (int lane = 0; lane < LANES && first_row + lane < from.rows; lane++) {
        read_source(from, first_row + lane, to.inner, row.data());
        if (to.kind == FLOAT32) {
            float* at = (float*)to.weights + weights + lane;
            for (int k = 0; k < to.inner; k++) at[size_t(k) * LANES] = row[k];
        } else if (to.kind == BFLOAT16) {
            uint16_t* at = (uint16_t*)to.weights + weights + 2 * lane;
            for (int k = 0; k < to.inner; k++) at[size_t(k / 2) * 2 * LANES + k % 2] = to_bf16(row[k]);
        } else {
            uint8_t* at = (uint8_t*)to.weights + weights / (to.kind == INT4 ? 2 : 1);
            if (from.kind == SOURCE_INT8) {
                for (int k = 0; k < to.inner; k++) put_integer(to, at, lane, k, int(row[k]) + (to.kind == INT8 ? 0 : 8));
            } else {
                const size_t scales = size_t(block) * (to.inner / to.group) * LANES + lane;
                round_weights(to, row.data(), lane, at, (uint16_t*)to.scales + scales);
            }
        }
    }
}

static inline void pack_source(const Matrix& to, const Source& from, int first_block, int every, int threads) {
    const int blocks = (from.rows + LANES - 1) / LANES;
    std::vector<std::thread> others;
    const auto work = [&](int thread) {
        std::vector<float> row(to.inner);
        for (int b = blocks * thread / threads; b < blocks * (thread + 1) / threads; b++)
            pack_block(to, from, b * LANES, first_block + b * every, row);
    };
    for (int thread = 1; thread < threads; thread++) others.emplace_back(work, thread);
    work(0);
    for (auto& other : others) other.join();
}

}  // namespace INFOPT_ISA
