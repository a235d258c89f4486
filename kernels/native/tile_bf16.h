// What products of bfloat16 numbers are made of on a processor with AVX512-BF16: sums of a few rows by 16 C columns.
//
// One operand lies row after row; of the other, two consecutive numbers of a column lie side by side and 16 columns make
// a register ("pairs"), so that one instruction adds 32 products to 16 float32 sums. A sum takes its products in the
// order of the pairs, whatever rows it is computed beside.
//
// Include it after all other headers: everything below is compiled for that processor alone, templates too where they are
// first used below. So such a file uses none that another file may use as well, but those that are always inlined.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")

namespace minirksc {
namespace {

constexpr int LANES = 16;

// The first `count` lanes; none or all of them where it is below 0 or above LANES.
inline __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? (__mmask16)-1 : count <= 0 ? (__mmask16)0 : (__mmask16)((1u << count) - 1);
}

inline __m512 load_some(const uint16_t* from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

inline void store_some(uint16_t* to, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}
inline void store_some(float* to, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }

// sums[r][c] += a[r] b[c] over all pairs. Strides are in numbers; a register of `b[c]` is at each `b_stride`.
template <int R, int C>
inline __attribute__((always_inline)) void multiply(const uint16_t* a, int64_t a_stride, const uint16_t* const (&b)[C],
                                                    int64_t b_stride, int64_t num_pairs, __m512 (&sums)[R][C]) {
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
        __m512bh columns[C];
        for (int c = 0; c < C; ++c) columns[c] = (__m512bh)_mm512_loadu_si512(b[c] + pair * b_stride);
        for (int r = 0; r < R; ++r) {
            int32_t two;
            std::memcpy(&two, a + r * a_stride + 2 * pair, sizeof two);
            __m512bh row = (__m512bh)_mm512_set1_epi32(two);
            for (int c = 0; c < C; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], row, columns[c]);
        }
    }
}

// f<R>(begin) for all rows, up to MAX of them at a time, in groups as equal as they can be.
template <int MAX, typename F>
inline void by_rows(int64_t num_rows, F f) {
    int64_t num_groups = (num_rows + MAX - 1) / MAX;
    for (int64_t group = 0; group < num_groups; ++group) {
        int64_t begin = num_rows * group / num_groups, end = num_rows * (group + 1) / num_groups;
        auto some = [&](auto self, auto count) {
            if constexpr (count > 0) {
                if (end - begin == count)
                    f(count, begin);
                else
                    self(self, std::integral_constant<int, count - 1>());
            }
        };
        some(some, std::integral_constant<int, MAX>());
    }
}

// 2^x; 0 far below, NaN stays NaN. A polynomial of degree 6 on [-1/2, 1/2]: relative error 1e-7.
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.54035304e-4f);  // log(2)^n / n!, n = 6 .. 0
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.33335581e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61812911e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147181e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

}  // namespace
}  // namespace minirksc
