// Adds up what pieces of a place's keys gave. Each piece left, a head, a weighted sum of values, the largest score, and
// the sum of exp(score - largest).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "numbers.h"

namespace minirksc {
namespace {  // each file its own, compiled for its own processors

// Of one head of one place, whose parts are rows begin .. end of the partial results; writes to[head_dim].
template <typename T>
void add_up(const int64_t* begin, const int64_t* end, int64_t head, int64_t num_heads, int64_t head_dim,
            const float* partial_out, const float* partial_sums, float* sums, T* to) {
    float largest = -INFINITY, total = 0;
    for (const int64_t* part = begin; part < end; ++part)
        largest = std::max(largest, partial_sums[2 * (*part * num_heads + head)]);
    std::fill_n(sums, head_dim, 0.0f);
    for (const int64_t* part = begin; part < end; ++part) {
        int64_t at = *part * num_heads + head;
        float weight = exponential(partial_sums[2 * at] - largest);
        total += weight * partial_sums[2 * at + 1];
        for (int64_t d = 0; d < head_dim; ++d) sums[d] += weight * partial_out[at * head_dim + d];
    }
    for (int64_t d = 0; d < head_dim; ++d) to[d] = from_float<T>(sums[d] / total);
}

}  // namespace
}  // namespace minirksc
