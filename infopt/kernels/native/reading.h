// How fast memory is read from end to end, which is what a step that reads every weight once is held against.
#pragma once

#include <chrono>
#include <vector>

#include "step.h"

namespace INFOPT_ISA {

inline double Step::read_seconds(const uint8_t* data, int64_t bytes) {
    std::vector<float> found(pool.most());
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int thread) {
        F a = zero(), b = zero(), c = zero(), d = zero();
        const int64_t end = bytes * (thread + 1) / pool.threads() / 256 * 256;
        for (int64_t i = bytes * thread / pool.threads() / 256 * 256; i < end; i += 256) {
            const float* p = (const float*)(data + i);
            a = max(a, load(p));
            b = max(b, load(p + 16));
            c = max(c, load(p + 32));
            d = max(d, load(p + 48));
        }
        found[thread] = largest(max(max(a, b), max(c, d)));
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return found[0] == 12345.678f ? 0 : seconds;  // so that the reads are not left out
}

}  // namespace INFOPT_ISA
