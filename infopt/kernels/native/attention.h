// Attention of new tokens over the pages of their sequence.
//
// A page holds `page` positions of every layer and key/value head: first the keys, in blocks of 16 positions, [block]
// [head_dim][16], so that sixteen scores are made at a time without adding across lanes; then the values, [position]
// [head_dim padded to 16].
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "interface.h"
#include "lanes.h"

namespace INFOPT_ISA {

constexpr int ROWS = 6;       // queries that share a pass over the keys
constexpr int STRETCH = 128;  // positions that a task attends to, where there are several for some queries

static inline int padded(int n, int to = LANES) { return (n + to - 1) / to * to; }

static inline int64_t head_elements(const Model& m) { return int64_t(m.page) * (m.head_dim + padded(m.head_dim)); }

static inline int64_t page_bytes(const Model& m) {
    return head_elements(m) * m.layers * m.kv_heads * (m.kv_is_half ? 2 : 4);
}

static inline F load_kv(const float* p) { return load(p); }
static inline F load_kv(const uint16_t* p) { return load_half(p); }
static inline void store_kv(float* p, const float* from, int n) { memcpy(p, from, size_t(n) * 4); }
static inline void store_kv(uint16_t* p, const float* from, int n) {
    alignas(64) float whole[LANES] = {};
    uint16_t halves[LANES];
    for (int i = 0; i < n; i += LANES) {
        const int count = n - i < LANES ? n - i : LANES;
        memcpy(whole, from + i, size_t(count) * 4);
        store_half(halves, load(whole));
        memcpy(p + i, halves, size_t(count) * 2);
    }
}

// One layer and key/value head within the pages of a sequence.
template <class T>
struct Cache {
    const Model& m;
    void* const* pages;
    int64_t offset;  // elements from a page's start

    Cache(const Model& model, void* const* pages, int layer, int head)
        : m(model), pages(pages), offset((int64_t(layer) * model.kv_heads + head) * head_elements(model)) {}

    T* start(int position) const { return (T*)pages[position / m.page] + offset; }
    T* keys(int position) const { return start(position) + int64_t(position % m.page / LANES) * LANES * m.head_dim; }
    T* values(int position) const {
        return start(position) + int64_t(m.page) * m.head_dim + int64_t(position % m.page) * padded(m.head_dim);
    }
    void write(int position, const float* key, const float* value) const {
        T* to = keys(position) + position % LANES;
        T stored[512];
        store_kv(stored, key, m.head_dim);
        for (int d = 0; d < m.head_dim; d++) to[int64_t(d) * LANES] = stored[d];
        store_kv(values(position), value, m.head_dim);
    }
};

// Up to ROWS queries, and the positions [first, last) that they look at here.
struct Queries {
    int rows, first, last;
    const float* query[ROWS];  // [head_dim]
    int reach[ROWS];           // one past the last position that a row may see
    int from[ROWS];            // the first that it may
};

// Keys that the thread needs after those in use, and asks for meanwhile; none where `last` is 0.
template <class T>
struct Later {
    Cache<T> cache;
    int first, last;  // `first` begins a block

    // Where the keys of block i of them lie; null beyond the last.
    const char* block(int i) const { return first + i * LANES < last ? (const char*)cache.keys(first + i * LANES) : nullptr; }
    // The first task's, which no other came before.
    void ask() const {
        for (int i = 0; i < STRETCH / LANES && block(i); i++)
            for (int b = 0; b < LANES * cache.m.head_dim * int(sizeof(T)); b += 64) __builtin_prefetch(block(i) + b, 0, 2);
    }
};

// What one pass leaves: not yet divided by `total`. For a row that sees nothing here, `most` is −∞.
struct Partial {
    float most[ROWS], total[ROWS];
};

// scores [rows][16 · BLOCKS] of the positions from `p` on = scale·q·k, −∞ where a row may not look.
template <class T, int N, int BLOCKS>
[[gnu::noinline]] static void score_blocks(const Cache<T>& cache, const Queries& q, float scale, float* scores, int stride, int p) {
    const T* keys[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) keys[b] = cache.keys(p + b * LANES);
    const T* soon = cache.values(p);  // these positions', asked for meanwhile
    F sums[BLOCKS][N];
    UNROLLED for (int b = 0; b < BLOCKS; b++)
        UNROLLED for (int r = 0; r < N; r++) sums[b][r] = zero();
    for (int d = 0; d < cache.m.head_dim; d++) {
        __builtin_prefetch(soon + int64_t(d) * LANES * BLOCKS, 0, 2);
        UNROLLED for (int b = 0; b < BLOCKS; b++) {
            const F k = load_kv(keys[b] + int64_t(d) * LANES);
            UNROLLED for (int r = 0; r < N; r++) sums[b][r] = fma(k, set1(q.query[r][d]), sums[b][r]);
        }
    }
    for (int r = 0; r < N; r++) {
        const int low = q.from[r] > q.first ? q.from[r] : q.first, high = q.reach[r] < q.last ? q.reach[r] : q.last;
        for (int b = 0; b < BLOCKS; b++) {
            float* to = scores + int64_t(r) * stride + b * LANES;
            const int at = p + b * LANES;
            store(to, mul(sums[b][r], set1(scale)));
            if (at < low || at + LANES > high)
                for (int i = 0; i < LANES; i++)
                    if (at + i < low || at + i >= high) to[i] = -INFINITY;
        }
    }
}

// scores [rows][positions padded to 16]; two blocks of positions at a time, whose sums do not wait for one another.
template <class T, int N>
static void score(const Cache<T>& cache, const Queries& q, float scale, float* scores, int stride) {
    const int begin = q.first / LANES * LANES;
    int p = begin;
    for (; p + LANES < q.last; p += 2 * LANES) score_blocks<T, N, 2>(cache, q, scale, scores + (p - begin), stride, p);
    if (p < q.last) score_blocks<T, N, 1>(cache, q, scale, scores + (p - begin), stride, p);
}

// out [rows][16 · WIDE, of a head from `d` on] = Σ weight·v
template <class T, int N, int WIDE>
[[gnu::noinline]] static void gather_part(
    const Cache<T>& cache, const Queries& q, const float* weights, int stride, float* out, int d, const Later<T>& later) {
    const int width = padded(cache.m.head_dim), begin = q.first / LANES * LANES, line = cache.m.head_dim * int(sizeof(T));
    F sums[N][WIDE];
    UNROLLED for (int r = 0; r < N; r++)
        UNROLLED for (int c = 0; c < WIDE; c++) sums[r][c] = zero();
    for (int p = q.first; p < q.last;) {
        const T* v = cache.values(p) + d;
        const char* ask = d ? nullptr : later.block((p - begin) / LANES);
        for (const int end = std::min(q.last, p / LANES * LANES + LANES); p < end; p++, v += width) {
            for (int b = 0; ask && b < line; b += 64, ask += 64) __builtin_prefetch(ask, 0, 2);
            UNROLLED for (int c = 0; c < WIDE; c++) {
                const F value = load_kv(v + c * LANES);
                UNROLLED for (int r = 0; r < N; r++)
                    sums[r][c] = fma(value, set1(weights[int64_t(r) * stride + (p - begin)]), sums[r][c]);
            }
        }
    }
    for (int r = 0; r < N; r++)
        for (int c = 0; c < WIDE; c++) store(out + int64_t(r) * width + d + c * LANES, sums[r][c]);
}

template <class T, int N>
static void gather(const Cache<T>& cache, const Queries& q, const float* weights, int stride, float* out, const Later<T>& later) {
    constexpr int WIDE = N > 3 ? 2 : 4;
    const int width = padded(cache.m.head_dim);
    int d = 0;
    for (; d + WIDE * LANES <= width; d += WIDE * LANES) gather_part<T, N, WIDE>(cache, q, weights, stride, out, d, later);
    for (; d < width; d += LANES) gather_part<T, N, 1>(cache, q, weights, stride, out, d, later);
}

template <class T, int N>
static void attend_rows(
    const Cache<T>& cache, const Queries& q, float scale, std::vector<float>& scratch, float* out, Partial& found,
    const Later<T>& later) {
    const int begin = q.first / LANES * LANES, stride = padded(q.last - begin);
    if (scratch.size() < size_t(ROWS) * stride) scratch.resize(size_t(ROWS) * stride);
    score<T, N>(cache, q, scale, scratch.data(), stride);
    for (int r = 0; r < N; r++) {
        float* row = scratch.data() + int64_t(r) * stride;
        F most = set1(-INFINITY), total = zero();
        for (int i = 0; i < stride; i += LANES) most = max(most, load(row + i));
        found.most[r] = largest(most);
        const F base = set1(found.most[r] == -INFINITY ? 0 : found.most[r]);
        for (int i = 0; i < stride; i += LANES) {
            const F weight = exp(sub(load(row + i), base));  // 1e−38 where a row may not look: nothing, beside the largest's 1
            store(row + i, weight);
            total = add(total, weight);
        }
        found.total[r] = sum(total);
    }
    gather<T, N>(cache, q, scratch.data(), stride, out, later);
}

template <class T>
static void attend(
    const Cache<T>& cache, const Queries& q, float scale, std::vector<float>& scratch, float* out, Partial& found,
    const Later<T>& later) {
    switch (q.rows) {
        case 1: return attend_rows<T, 1>(cache, q, scale, scratch, out, found, later);
        case 2: return attend_rows<T, 2>(cache, q, scale, scratch, out, found, later);
        case 3: return attend_rows<T, 3>(cache, q, scale, scratch, out, found, later);
        case 4: return attend_rows<T, 4>(cache, q, scale, scratch, out, found, later);
        case 5: return attend_rows<T, 5>(cache, q, scale, scratch, out, found, later);
        default: return attend_rows<T, ROWS>(cache, q, scale, scratch, out, found, later);
    }
}

}  // namespace INFOPT_ISA
