// One token a row, drawn with the row's random number; see kernels/draw.py.
#include "numbers.h"
#include "ops.h"
#include "threads.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace minirksc {
namespace {

struct Candidate {
    float weight;
    int64_t token;
    bool operator<(const Candidate& other) const {  // likeliest first, equal ones in order
        return weight != other.weight ? weight > other.weight : token < other.token;
    }
};

bool any_of(Ints x) {
    return _mm256_movemask_ps((__m256)x) != 0;
}

// weights[i] = exp((logits[i] - largest) / temperature); returns their sum.
double weigh(const float* logits, int64_t vocab, float temperature, float* weights) {
    float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < vocab; ++i) largest = logits[i] > largest ? logits[i] : largest;
    double total = 0;
    int64_t i = 0;
    for (; i + WIDTH <= vocab; i += WIDTH) {
        Floats weight = exponential((load(logits + i) - largest) / temperature);
        store(weights + i, weight);
        total += sum_of(weight);
    }
    for (; i < vocab; ++i) total += weights[i] = exponential((logits[i] - largest) / temperature);
    return total;
}

// The first whose weight, with those of all before it, exceeds `target`; where rounding passes the end, the last that has
// any. `weight(i)` of `count` candidates.
template <typename F>
int64_t reach(int64_t count, double target, F weight) {
    double sum = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) {
        float one = weight(i);
        if (!(one > 0)) continue;
        last = i;
        sum += one;
        if (sum > target) break;
    }
    return last;
}

// The same where all have their weight: whole stretches of the vocabulary are passed at once.
int64_t reach_all(const float* weights, int64_t vocab, double target) {
    constexpr int64_t STRETCH = 8 * WIDTH;
    double sum = 0;
    int64_t begin = 0;
    for (; begin + STRETCH <= vocab; begin += STRETCH) {
        Floats sums = {};
        for (int64_t i = 0; i < STRETCH; i += WIDTH) sums += load(weights + begin + i);
        double more = sum_of(sums);
        if (sum + more > target) break;
        sum += more;
    }
    for (int64_t i = begin; i < vocab; ++i) {
        sum += weights[i];
        if (sum > target && weights[i] > 0) return i;
    }
    while (vocab > 1 && !(weights[vocab - 1] > 0)) --vocab;
    return vocab - 1;
}

// The top_k, and of them those before which less than top_p of all has come: likeliest first.
std::vector<Candidate> truncate(const float* weights, int64_t vocab, double total, int64_t top_k, double top_p) {
    std::vector<Candidate> candidates;
    bool is_counted = 0 < top_k && top_k < vocab;
    for (float least : {1e-2f, 1e-4f, 1e-7f, 0.0f}) {  // sorting a whole vocabulary is slow: try few, then more
        candidates.clear();
        double sum = 0;
        auto take = [&](int64_t i) {
            if (weights[i] >= least) candidates.push_back({weights[i], i}), sum += weights[i];
        };
        int64_t whole = vocab / WIDTH * WIDTH;
        for (int64_t i = 0; i < whole; i += WIDTH) {
            if (!any_of(load(weights + i) >= least)) continue;
            for (int64_t j = i; j < i + WIDTH; ++j) take(j);
        }
        for (int64_t i = whole; i < vocab; ++i) take(i);
        if (is_counted ? (int64_t)candidates.size() >= top_k : sum >= top_p * total) break;
    }
    if (is_counted && top_k < (int64_t)candidates.size()) {
        std::partial_sort(candidates.begin(), candidates.begin() + top_k, candidates.end());
        candidates.resize(top_k);
    } else {
        std::sort(candidates.begin(), candidates.end());
    }
    if (is_counted) {
        total = 0;
        for (const Candidate& one : candidates) total += one.weight;
    }
    double before = 0;
    size_t kept = 0;
    for (; kept < candidates.size() && (top_p == 1 || before < top_p * total); ++kept) before += candidates[kept].weight;
    candidates.resize(std::max<size_t>(kept, 1));
    return candidates;
}

}  // namespace

void draw(const float* logits, const double* numbers, const int64_t* top_k, int64_t* tokens, int64_t rows,
          int64_t vocab, int64_t stride) {
    for_ranges(rows, 8, [&](int64_t begin, int64_t end) {
        std::vector<float> weights(vocab);
        for (int64_t row = begin; row < end; ++row) {
            double temperature = numbers[4 * row], top_p = numbers[4 * row + 1], min_p = numbers[4 * row + 2];
            double uniform = numbers[4 * row + 3], total = 0;
            double all = weigh(logits + row * stride, vocab, (float)temperature, weights.data());
            bool is_counted = 0 < top_k[row] && top_k[row] < vocab;
            std::vector<Candidate> candidates;
            if (is_counted || top_p != 1) candidates = truncate(weights.data(), vocab, all, top_k[row], top_p);
            if (candidates.empty() && min_p == 0) {
                tokens[row] = reach_all(weights.data(), vocab, uniform * all);
                continue;
            }
            int64_t count = candidates.empty() ? vocab : candidates.size();
            auto weight = [&](int64_t i) {
                float one = candidates.empty() ? weights[i] : candidates[i].weight;
                return one < min_p ? 0.0f : one;  // the likeliest has weight 1
            };
            for (int64_t i = 0; i < count; ++i) total += weight(i);
            int64_t drawn = reach(count, uniform * total, weight);
            tokens[row] = candidates.empty() ? drawn : candidates[drawn].token;
        }
    });
}

}  // namespace minirksc
