// x W^T + b, where W holds bfloat16 numbers and x, b and the result are float32.
//
// Packed in panels of 16 columns of the result. A word holds a column's number in its low half and that of the column
// 8 further in its high half, so that one load of 8 words, a shift and a mask give 16 numbers as float32. A panel goes
// through all rows of x, up to 6 at a time: 12 sums, as many as registers hold beside what they are made of.
#include "numbers.h"
#include "ops.h"
#include "threads.h"

#include <algorithm>
#include <atomic>

namespace minirksc {
namespace {

constexpr int PANEL = 2 * WIDTH;
constexpr int MAX_ROWS = 6;

Words load_words(const uint32_t* from) {
    Words out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

int64_t num_panels(int64_t out_features) { return (out_features + PANEL - 1) / PANEL; }

// R rows of x by one panel. Few rows keep several sums of each number, or the additions would wait for each other.
template <int R>
void rows_by_panel(const float* x, const uint32_t* panel, const float* bias, float* out, int64_t in_features,
                   int64_t out_features, int64_t columns) {
    constexpr int STEPS = R <= 1 ? 4 : R <= 3 ? 2 : 1;
    Floats low[STEPS][R] = {}, high[STEPS][R] = {};
    auto add = [&](int64_t k, int step) {
        Words words = load_words(panel + k * WIDTH);
        Floats a = (Floats)(words << 16), b = (Floats)(words & 0xffff0000u);
        for (int r = 0; r < R; ++r) {
            Floats number = x[r * in_features + k] - Floats{};
            low[step][r] += number * a;
            high[step][r] += number * b;
        }
    };
    int64_t k = 0;
    for (; k + STEPS <= in_features; k += STEPS)
#pragma GCC unroll 4
        for (int step = 0; step < STEPS; ++step) add(k + step, step);
    for (; k < in_features; ++k) add(k, 0);
    for (int r = 0; r < R; ++r) {
        float sums[PANEL];
        for (int step = 1; step < STEPS; ++step) {
            low[0][r] += low[step][r];
            high[0][r] += high[step][r];
        }
        store(sums, low[0][r]);
        store(sums + WIDTH, high[0][r]);
        for (int64_t i = 0; i < columns; ++i) out[r * out_features + i] = sums[i] + (bias == nullptr ? 0.0f : bias[i]);
    }
}

using Rows = void (*)(const float*, const uint32_t*, const float*, float*, int64_t, int64_t, int64_t);
constexpr Rows ROWS[MAX_ROWS] = {rows_by_panel<1>, rows_by_panel<2>, rows_by_panel<3>,
                                 rows_by_panel<4>, rows_by_panel<5>, rows_by_panel<6>};

}  // namespace

// Returns 0, with `packed` unfinished, where a number is not one of bfloat16.
int64_t pack_weight(const float* weight, uint32_t* packed, int64_t out_features, int64_t in_features) {
    std::atomic<uint32_t> any_lost{0};
    for_all(num_panels(out_features), PANEL * in_features, [&](int64_t panel) {
        uint32_t* to = packed + panel * in_features * WIDTH;
        uint32_t lost = 0;
        for (int column = 0; column < WIDTH; ++column) {
            int64_t low = panel * PANEL + column, high = low + WIDTH;
            const uint32_t* low_row = (const uint32_t*)weight + low * in_features;
            const uint32_t* high_row = (const uint32_t*)weight + high * in_features;
            for (int64_t k = 0; k < in_features; ++k) {
                uint32_t a = low < out_features ? low_row[k] : 0, b = high < out_features ? high_row[k] : 0;
                lost |= (a | b) & 0xffff;
                to[k * WIDTH + column] = (a >> 16) | (b & 0xffff0000u);
            }
        }
        any_lost |= lost;
    });
    return any_lost == 0;
}

int64_t unpack_rows(const uint32_t* packed, const int64_t* rows, float* out, int64_t num_rows, int64_t in_features,
                    int64_t out_features) {
    int64_t bad = first_outside(rows, num_rows, out_features);
    if (bad >= 0) return bad;
    for_all(num_rows, in_features, [&](int64_t i) {
        int64_t panel = rows[i] / PANEL, column = rows[i] % PANEL;
        const uint32_t* from = packed + panel * in_features * WIDTH + column % WIDTH;
        uint32_t* to = (uint32_t*)out + i * in_features;
        for (int64_t k = 0; k < in_features; ++k)
            to[k] = column < WIDTH ? from[k * WIDTH] << 16 : from[k * WIDTH] & 0xffff0000u;
    });
    return -1;
}

void linear(const float* x, const uint32_t* packed, const float* bias, float* out, int64_t rows, int64_t in_features,
            int64_t out_features) {
    int64_t num_blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for_all(num_panels(out_features), PANEL * in_features, [&](int64_t panel) {
        int64_t first = panel * PANEL, columns = std::min<int64_t>(PANEL, out_features - first);
        for (int64_t block = 0; block < num_blocks; ++block) {
            int64_t begin = rows * block / num_blocks, end = rows * (block + 1) / num_blocks;
            ROWS[end - begin - 1](x + begin * in_features, packed + panel * in_features * WIDTH,
                                  bias == nullptr ? nullptr : bias + first, out + begin * out_features + first,
                                  in_features, out_features, columns);
        }
    });
}

}  // namespace minirksc
