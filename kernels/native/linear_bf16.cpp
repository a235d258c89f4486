// y = x W^T + b in bfloat16 with sums in float32, for processors with AVX512-BF16.
//
// Packed in panels of 32 columns of the result: of each pair of consecutive numbers of all 32, so that a panel is read
// from its beginning to its end. A panel goes through all rows of a chunk of x, up to 14 at a time: 28 sums and what
// they are made of fill the registers. A row's result does not depend on the rows beside it.
#include "ops.h"
#include "threads.h"

#include <algorithm>
#include <type_traits>

#include "tile_bf16.h"

namespace minirksc {
namespace {

constexpr int REGISTERS = 2;
constexpr int PANEL = REGISTERS * LANES;
constexpr int MAX_ROWS = 14;
constexpr int64_t CHUNK_ROWS = 8 * MAX_ROWS;  // of x, that stay in the second cache while panels pass

int64_t num_panels(int64_t out_features) { return (out_features + PANEL - 1) / PANEL; }

template <int R, typename T>
void rows_by_panel(const uint16_t* x, const uint16_t* panel, const uint16_t* bias, T* out, int64_t in_features,
                   int64_t out_features, int64_t columns) {
    __m512 sums[R][REGISTERS] = {};
    multiply<R, REGISTERS>(x, in_features, {panel, panel + 2 * LANES}, 2 * PANEL, in_features / 2, sums);
    for (int c = 0; c < REGISTERS; ++c) {
        __mmask16 mask = first_lanes(columns - c * LANES);
        __m512 added = bias == nullptr ? _mm512_setzero_ps() : load_some(bias + c * LANES, mask);
        for (int r = 0; r < R; ++r)
            store_some(out + r * out_features + c * LANES, mask, _mm512_add_ps(sums[r][c], added));
    }
}

template <typename T>
void typed(const uint16_t* x, const uint16_t* packed, const uint16_t* bias, void* out_, int64_t rows,
           int64_t in_features, int64_t out_features) {
    T* out = (T*)out_;
    int64_t panels = num_panels(out_features), num_chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    for_all(num_chunks * panels, PANEL * in_features, [&](int64_t item) {
        int64_t chunk = item / panels, first = item % panels * PANEL;
        int64_t begin = rows * chunk / num_chunks, end = rows * (chunk + 1) / num_chunks;
        by_rows<MAX_ROWS>(end - begin, [&](auto count, int64_t row) {
            rows_by_panel<count>(x + (begin + row) * in_features, packed + first * in_features,
                                 bias == nullptr ? nullptr : bias + first, out + (begin + row) * out_features + first,
                                 in_features, out_features, std::min<int64_t>(PANEL, out_features - first));
        });
    });
}

}  // namespace

void pack_weight_bf16(const uint16_t* weight, uint32_t* packed, int64_t out_features, int64_t in_features) {
    int64_t num_pairs = in_features / 2;
    for_all(num_panels(out_features), PANEL * in_features, [&](int64_t panel) {
        uint32_t* to = packed + panel * num_pairs * PANEL;
        for (int64_t column = 0; column < PANEL; ++column) {
            int64_t row = panel * PANEL + column;
            for (int64_t pair = 0; pair < num_pairs; ++pair) {
                to[pair * PANEL + column] = 0;
                if (row < out_features)  // a weight may begin between two words
                    std::memcpy(to + pair * PANEL + column, weight + 2 * (row * num_pairs + pair), sizeof *to);
            }
        }
    });
}

int64_t unpack_rows_bf16(const uint32_t* packed, const int64_t* rows, uint32_t* out, int64_t num_rows,
                         int64_t in_features, int64_t out_features) {
    int64_t bad = first_outside(rows, num_rows, out_features);
    if (bad >= 0) return bad;
    int64_t num_pairs = in_features / 2;
    for_all(num_rows, in_features, [&](int64_t i) {
        const uint32_t* from = packed + rows[i] / PANEL * num_pairs * PANEL + rows[i] % PANEL;
        for (int64_t pair = 0; pair < num_pairs; ++pair) out[i * num_pairs + pair] = from[pair * PANEL];
    });
    return -1;
}

void linear_bf16(const uint16_t* x, const uint16_t* packed, const uint16_t* bias, void* out, int64_t rows,
                 int64_t in_features, int64_t out_features, int64_t is_out_float32) {
    auto run = is_out_float32 ? typed<float> : typed<uint16_t>;
    run(x, packed, bias, out, rows, in_features, out_features);
}

}  // namespace minirksc
