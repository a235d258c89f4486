// y = x W^T + b with W in 8 bits and x in bfloat16: see kernels/weights/int8_weight.py.
//
// Every 32 consecutive numbers of a row of W have one scale. First every row of x is rounded to 8 bits in the same way.
// Then one instruction adds 64 products to 16 sums of 32 bits, twice as many as of bfloat16 numbers; after a group these
// become float32 and are scaled. The instruction wants one factor without a sign: W has 128 added, and a group's sums begin
// with what that adds, 128 times the sum of x, negative.
//
// Packed in panels of 32 columns of the result: of each four consecutive numbers of all 32. A row's result does not
// depend on the rows beside it.
#include "ops.h"
#include "threads.h"

#include <algorithm>
#include <limits>

#include "tile_bf16.h"

namespace minirksc {
namespace {

constexpr int REGISTERS = 2;
constexpr int PANEL = REGISTERS * LANES;
constexpr int GROUP = INT8_GROUP, QUAD = 4;
constexpr int MAX_ROWS = 8;  // of a block
constexpr int64_t CHUNK_BLOCKS = 12;  // of x, that stay in the second cache while panels pass

// Of a group of a row of x: x = scale number. `start` is -128 times the sum of the numbers.
struct GroupScale {
    float scale;  // NaN where a number is not finite
    int32_t start;
};

// A group of a row, zeros beyond the end; each four numbers `stride` bytes after the last.
GroupScale round_group(const uint16_t* x, int64_t count, int8_t* to, int64_t stride) {
    __m512 numbers[GROUP / LANES], largest = _mm512_setzero_ps();
    __mmask16 not_finite = 0;
    for (int i = 0; i < GROUP / LANES; ++i) {
        numbers[i] = load_some(x + i * LANES, first_lanes(count - i * LANES));
        largest = _mm512_max_ps(largest, _mm512_abs_ps(numbers[i]));
        not_finite |= _mm512_fpclass_ps_mask(numbers[i], 0x99);  // NaN of either kind, either infinity
    }
    float most = _mm512_reduce_max_ps(largest);
    __m512 inverse = _mm512_set1_ps(most > 0 ? 127 / most : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    int8_t rounded[GROUP];
    for (int i = 0; i < GROUP / LANES; ++i) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(numbers[i], inverse));
        sum = _mm512_add_epi32(sum, whole);
        _mm_storeu_si128((__m128i*)(rounded + i * LANES), _mm512_cvtepi32_epi8(whole));
    }
    for (int i = 0; i < GROUP; i += QUAD) std::memcpy(to + i / QUAD * stride, rounded + i, QUAD);
    if (not_finite) return {std::numeric_limits<float>::quiet_NaN(), 0};
    return {most / 127, -128 * _mm512_reduce_add_epi32(sum)};
}

// Rows of x, rounded: four numbers of each row beside each other, then the next four.
struct Block {
    const int8_t* numbers;
    const GroupScale* scales;  // of each group, that of each row
};

// A matrix as it is packed, from some column on.
struct Panel {
    const uint8_t* numbers;
    const uint16_t* scales;  // of each group, that of each of its columns
    const uint16_t* bias;
    int64_t groups;
};

// sums[i] + the products of four unsigned and four signed numbers, the latter the same for all i. As an instruction: of
// the intrinsic, GCC 12 makes two copies of the sums for each.
__m512i plus_products(__m512i sums, __m512i columns, const int8_t* row) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(columns), "m"(*(const int32_t*)row));
    return sums;
}

template <int R, typename T>
void block_by_panel(const Block& x, const Panel& panel, T* out, int64_t out_features, int64_t columns) {
    alignas(64) float sums[R][PANEL] = {};  // in memory: the registers are for sums of whole numbers
    for (int64_t group = 0; group < panel.groups; ++group) {
        __m512i whole[R][REGISTERS];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < REGISTERS; ++c) whole[r][c] = _mm512_set1_epi32(x.scales[group * R + r].start);
        const int8_t* numbers = x.numbers + group * GROUP * R;
        const uint8_t* weights = panel.numbers + group * GROUP * PANEL;
        for (int quad = 0; quad < GROUP / QUAD; ++quad, numbers += QUAD * R, weights += QUAD * PANEL) {
            __m512i columns_of[REGISTERS];
            for (int c = 0; c < REGISTERS; ++c) columns_of[c] = _mm512_loadu_si512(weights + c * LANES * QUAD);
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < REGISTERS; ++c)
                    whole[r][c] = plus_products(whole[r][c], columns_of[c], numbers + r * QUAD);
        }
        for (int c = 0; c < REGISTERS; ++c) {
            __m512 of_columns = load_some(panel.scales + group * PANEL + c * LANES, first_lanes(LANES));
            for (int r = 0; r < R; ++r) {
                __m512 scale = _mm512_mul_ps(of_columns, _mm512_set1_ps(x.scales[group * R + r].scale));
                float* sum = sums[r] + c * LANES;
                _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r][c]), scale, _mm512_load_ps(sum)));
            }
        }
    }
    for (int c = 0; c < REGISTERS; ++c) {
        __mmask16 mask = first_lanes(columns - c * LANES);
        __m512 added = panel.bias == nullptr ? _mm512_setzero_ps() : load_some(panel.bias + c * LANES, mask);
        for (int r = 0; r < R; ++r)
            store_some(out + r * out_features + c * LANES, mask,
                       _mm512_add_ps(_mm512_load_ps(sums[r] + c * LANES), added));
    }
}

// f<R>() for the number that it is called with.
template <typename F>
void with_rows(int64_t rows, F f) {
    by_rows<MAX_ROWS>(rows, [&](auto count, int64_t) { f(count); });
}

template <typename T>
void typed(const int8_t* x, const GroupScale* x_scales, const Panel& matrix, void* out_, int64_t rows,
           int64_t out_features) {
    T* out = (T*)out_;
    int64_t panels = (out_features + PANEL - 1) / PANEL, num_blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    int64_t width = matrix.groups * GROUP, num_chunks = (num_blocks + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
    for_all(num_chunks * panels, PANEL * width, [&](int64_t item) {
        int64_t chunk = item / panels, first = item % panels * PANEL;
        Panel panel = {matrix.numbers + first * width, matrix.scales + first * matrix.groups,
                       matrix.bias == nullptr ? nullptr : matrix.bias + first, matrix.groups};
        for (int64_t block = num_blocks * chunk / num_chunks; block < num_blocks * (chunk + 1) / num_chunks; ++block) {
            int64_t begin = rows * block / num_blocks, end = rows * (block + 1) / num_blocks;
            with_rows(end - begin, [&](auto count) {
                block_by_panel<count>({x + begin * width, x_scales + begin * matrix.groups}, panel,
                                      out + begin * out_features + first, out_features,
                                      std::min<int64_t>(PANEL, out_features - first));
            });
        }
    });
}

}  // namespace

void linear_int8(const uint16_t* x, const uint8_t* packed, const uint16_t* scales, const uint16_t* bias,
                 int8_t* x_numbers, void* x_scales_, void* out, int64_t rows, int64_t in_features,
                 int64_t out_features, int64_t is_out_float32) {
    if (rows == 0) return;
    GroupScale* x_scales = (GroupScale*)x_scales_;
    int64_t groups = (in_features + GROUP - 1) / GROUP, num_blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    constexpr int64_t AT_A_TIME = 8;  // numbers are rounded in the time that for_all expects of one
    for_all(num_blocks * groups, rows * GROUP / (num_blocks * AT_A_TIME), [&](int64_t item) {
        int64_t block = item / groups, group = item % groups;
        int64_t begin = rows * block / num_blocks, size = rows * (block + 1) / num_blocks - begin;
        int8_t* to = x_numbers + (begin * groups + group * size) * GROUP;
        for (int64_t r = 0; r < size; ++r)
            x_scales[begin * groups + group * size + r] = round_group(
                x + (begin + r) * in_features + group * GROUP, in_features - group * GROUP, to + r * QUAD, size * QUAD);
    });
    auto run = is_out_float32 ? typed<float> : typed<uint16_t>;
    run(x_numbers, x_scales, {packed, scales, bias, groups}, out, rows, out_features);
}

}  // namespace minirksc
