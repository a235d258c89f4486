// One pass over float32 logits, in parts that several cores take; see kernels/confidence.py for the formulas.
#include "numbers.h"
#include "ops.h"
#include "threads.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

namespace minirksc {
namespace {

constexpr int64_t PART = 4096;

struct Part {
    float largest, total, below_total, sum;  // m, s and t of the formulas, and the sum of the logits
    int64_t argmax;                          // -1: no logit is the largest, since all are NaN
};

Part part_of(const float* logits, int64_t count, int64_t first) {
    const float least = -std::numeric_limits<float>::infinity();
    int64_t whole = count / WIDTH * WIDTH;
    Floats most = Floats{} + least;
    for (int64_t i = 0; i < whole; i += WIDTH) {
        Floats x = load(logits + i);
        most = x > most ? x : most;
    }
    float largest = least;
    for (int i = 0; i < WIDTH; ++i) largest = std::max(largest, most[i]);
    for (int64_t i = whole; i < count; ++i) largest = std::max(largest, logits[i]);
    int64_t argmax = std::find(logits, logits + count, largest) - logits;
    // Of a part that is all -inf nothing must be subtracted: -inf - -inf is NaN.
    const Floats shift = Floats{} + (largest == least ? 0.0f : largest), zero = {};
    Floats totals = {}, below_totals = {}, sums = {};
    auto add = [&](Floats x, Ints is_there) {
        Floats below = x - shift, weights = exponential(below);
        totals += is_there ? weights : zero;
        below_totals += (is_there & (weights > zero)) ? weights * below : zero;
        sums += is_there ? x : zero;
    };
    for (int64_t i = 0; i < whole; i += WIDTH) add(load(logits + i), Ints{} - 1);
    if (whole < count) {
        Floats rest = {};
        Ints is_there = {};
        for (int64_t i = whole; i < count; ++i) rest[i - whole] = logits[i], is_there[i - whole] = -1;
        add(rest, is_there);
    }
    return {largest, sum_of(totals), sum_of(below_totals), sum_of(sums), argmax < count ? first + argmax : -1};
}

}  // namespace

void confidence(const float* logits, int64_t* argmax, float* results, int64_t rows, int64_t vocab, int64_t stride) {
    int64_t num_parts = (vocab + PART - 1) / PART;
    std::unique_ptr<Part[]> parts(new Part[rows * num_parts]);
    for_all(rows * num_parts, PART, [&](int64_t item) {
        int64_t row = item / num_parts, first = item % num_parts * PART;
        parts[item] = part_of(logits + row * stride + first, std::min(PART, vocab - first), first);
    });
    for (int64_t row = 0; row < rows; ++row) {
        const Part *begin = &parts[row * num_parts], *end = begin + num_parts;
        // The first of the largest, as everywhere.
        const Part* top = std::max_element(begin, end, [](const Part& a, const Part& b) { return a.largest < b.largest; });
        float total = 0, below_total = 0, sum = 0;
        for (const Part* part = begin; part < end; ++part) {
            float below = part->largest - (std::isinf(top->largest) && top->largest < 0 ? 0.0f : top->largest);
            float weight = exponential(below);
            total += weight * part->total;
            below_total += weight * part->below_total + (weight > 0 ? weight * below * part->total : 0.0f);
            sum += part->sum;
        }
        argmax[row] = std::max<int64_t>(top->argmax, 0);
        results[row] = total > 0 ? 1 / total : std::nanf("");
        results[rows + row] = std::log(total) - below_total / total;
        results[2 * rows + row] = top->largest + std::log(total);
        results[3 * rows + row] = sum / vocab;
    }
}

}  // namespace minirksc
