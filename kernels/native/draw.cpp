// One token a row, drawn with the row's random number; see kernels/draw.py.
#include "numbers.h"
#include "ops.h"
#include "threads.h"

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

// The top_k, and of them those before which less than top_p of all has come: likeliest first.
std::vector<Candidate> truncate(const float* weights, int64_t vocab, double total, int64_t top_k, double top_p) {
    std::vector<Candidate> candidates;
    bool is_counted = 0 < top_k && top_k < vocab;
    for (float least : {1e-2f, 1e-4f, 1e-7f, 0.0f}) {  // sorting a whole vocabulary is slow: try few, then more
        candidates.clear();
        double sum = 0;
        for (int64_t i = 0; i < vocab; ++i)
            if (weights[i] >= least) candidates.push_back({weights[i], i}), sum += weights[i];
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
