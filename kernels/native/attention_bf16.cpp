// Attention of bfloat16 queries over keys and values where they lie in the paged cache, for processors with
// AVX512-BF16. Decode rows and prompts alike: a piece is some keys at consecutive positions, and the neighbouring places
// whose queries see all of them, or, in a prompt, each those up to itself.
//
// Each piece and KV head is computed by itself, a tile of keys at a time: turned around so that 16 keys make a register,
// multiplied by all queries of the head's group and of all places, softmax with a running maximum (FlashAttention's
// online softmax), and the weights, rounded to bfloat16, by the values. What branches share is so read once.
#include "ops.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "parts.h"
#include "tile_bf16.h"

namespace minirksc {
namespace {

constexpr int TILE = 64;  // keys at a time
constexpr int MAX_QUERIES = 96;
constexpr int ROWS = 6;  // queries whose sums are in registers, by
constexpr int REGISTERS = 4;

struct Attention {
    const uint16_t* q;
    const uint16_t* cache;
    uint16_t* out;
    const AttentionPlan& plan;
    int64_t q_stride, num_heads, num_kv_heads, head_dim, window;
    float scale, softcap;
};

// Queries of one KV head, with what they have gathered so far. All in one piece of memory a thread.
struct Queries {
    uint16_t* numbers;   // [MAX_QUERIES, head_dim]
    uint16_t* keys;      // [head_dim / 2, TILE, 2]
    uint16_t* values;    // [TILE / 2, head_dim, 2]
    uint16_t* zeros;     // [head_dim]
    uint16_t* weights;   // [MAX_QUERIES, TILE]
    float* scores;       // [MAX_QUERIES, TILE]
    float* sums;         // [MAX_QUERIES, head_dim], of values by weights
    float* largest;      // [MAX_QUERIES], score times log2(e)
    float* totals;       // [MAX_QUERIES], of weights
    float* fades;        // [MAX_QUERIES], of the sums so far

    static int64_t num_bytes(int64_t head_dim) {
        return 2 * head_dim * (MAX_QUERIES + 2 * TILE + 1) + 6 * MAX_QUERIES * TILE + 4 * MAX_QUERIES * (head_dim + 3);
    }
    Queries(char* memory, int64_t head_dim) {
        auto take = [&](auto*& pointer, int64_t count) {
            pointer = (std::remove_reference_t<decltype(pointer)>)memory;
            memory += count * sizeof *pointer;
        };
        take(numbers, MAX_QUERIES * head_dim);
        take(keys, head_dim * TILE);
        take(values, head_dim * TILE);
        take(zeros, head_dim);
        take(weights, MAX_QUERIES * TILE);
        take(scores, MAX_QUERIES * TILE);
        take(sums, MAX_QUERIES * head_dim);
        take(largest, MAX_QUERIES);
        take(totals, MAX_QUERIES);
        take(fades, MAX_QUERIES);
        std::fill_n(zeros, head_dim, 0);
    }
};

// Row i, column j becomes row j, column i.
void transpose(__m512i (&x)[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88), d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
        y[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        y[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        y[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    std::memcpy(x, y, sizeof x);
}

// Pairs of a key's numbers, 16 keys a register.
void turn_keys(const uint16_t* const* keys, int num_groups, int64_t head_dim, uint16_t* to) {
    for (int group = 0; group < num_groups; ++group)
        for (int64_t d = 0; d < head_dim; d += 2 * LANES) {
            __m512i x[LANES];
            for (int i = 0; i < LANES; ++i) x[i] = _mm512_loadu_si512(keys[group * LANES + i] + d);
            transpose(x);
            for (int i = 0; i < LANES; ++i) _mm512_storeu_si512(to + (d + 2 * i) * TILE + group * 2 * LANES, x[i]);
        }
}

// Pairs of consecutive keys' values.
void pair_values(const uint16_t* const* values, int num_pairs, int64_t head_dim, uint16_t* to) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 16; ++i) {
        low[2 * i] = i, low[2 * i + 1] = 32 + i;
        high[2 * i] = 16 + i, high[2 * i + 1] = 48 + i;
    }
    __m512i first = _mm512_load_si512(low), second = _mm512_load_si512(high);
    for (int pair = 0; pair < num_pairs; ++pair)
        for (int64_t d = 0; d < head_dim; d += 2 * LANES) {
            __m512i a = _mm512_loadu_si512(values[2 * pair] + d), b = _mm512_loadu_si512(values[2 * pair + 1] + d);
            uint16_t* at = to + pair * 2 * head_dim + 2 * d;
            _mm512_storeu_si512(at, _mm512_permutex2var_epi16(a, first, b));
            _mm512_storeu_si512(at + 2 * LANES, _mm512_permutex2var_epi16(a, second, b));
        }
}

template <int C>
void score(const Queries& queries, int64_t num_queries, int64_t head_dim) {
    by_rows<ROWS>(num_queries, [&](auto count, int64_t begin) {
        __m512 sums[count][C] = {};
        multiply<count, C>(queries.numbers + begin * head_dim, head_dim, queries.keys, 2 * TILE, head_dim / 2, sums);
        for (int r = 0; r < count; ++r)
            for (int c = 0; c < C; ++c) _mm512_storeu_ps(queries.scores + (begin + r) * TILE + c * LANES, sums[r][c]);
    });
}

template <int C>
void mix(const Queries& queries, int64_t num_queries, int64_t head_dim, int num_pairs, int64_t d) {
    by_rows<ROWS>(num_queries, [&](auto count, int64_t begin) {
        __m512 sums[count][C];
        for (int r = 0; r < count; ++r)
            for (int c = 0; c < C; ++c)
                sums[r][c] = _mm512_mul_ps(_mm512_loadu_ps(queries.sums + (begin + r) * head_dim + d + c * LANES),
                                           _mm512_set1_ps(queries.fades[begin + r]));
        multiply<count, C>(queries.weights + begin * TILE, TILE, queries.values + 2 * d, 2 * head_dim, num_pairs, sums);
        for (int r = 0; r < count; ++r)
            for (int c = 0; c < C; ++c)
                _mm512_storeu_ps(queries.sums + (begin + r) * head_dim + d + c * LANES, sums[r][c]);
    });
}

// 1 - 2 / (1 + exp(2 x)); near 0, where that cancels, by the series.
__m512 tanh_of(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f), square = _mm512_mul_ps(x, x);
    __m512 power = exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(2 * 1.44269504088896341f)));
    __m512 far = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(one, power)));
    __m512 terms = _mm512_fnmadd_ps(square, _mm512_set1_ps(2 / 15.0f), _mm512_set1_ps(1 / 3.0f));
    __m512 near = _mm512_mul_ps(x, _mm512_fnmadd_ps(square, terms, one));
    return _mm512_mask_mov_ps(far, _mm512_cmp_ps_mask(square, _mm512_set1_ps(0.01f), _CMP_LT_OQ), near);
}

// Scores of one query become weights; keys [begin, end) of the tile are visible.
template <int C>
void weigh(const Queries& queries, int64_t q, int64_t begin, int64_t end, float scale, float softcap) {
    constexpr float LOG2_E = 1.44269504088896341f;
    __m512 scores[C], largest = _mm512_set1_ps(-INFINITY);
    for (int c = 0; c < C; ++c) {
        __m512 x = _mm512_loadu_ps(queries.scores + q * TILE + c * LANES);
        if (softcap != 0) {
            x = _mm512_mul_ps(tanh_of(_mm512_mul_ps(x, _mm512_set1_ps(scale / softcap))), _mm512_set1_ps(LOG2_E * softcap));
        } else {
            x = _mm512_mul_ps(x, _mm512_set1_ps(LOG2_E * scale));
        }
        // Bits [begin, end) of the tile, of which these are 16.
        uint64_t seen = (end < TILE ? (1ull << end) - 1 : ~0ull) & ~0ull << begin;
        __mmask16 visible = (__mmask16)(begin < end ? seen >> c * LANES : 0);
        scores[c] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), visible, x);
        largest = _mm512_max_ps(largest, scores[c]);
    }
    float before = queries.largest[q], now = std::max(before, _mm512_reduce_max_ps(largest));
    bool sees_any = now != -INFINITY;
    __m512 shift = _mm512_set1_ps(sees_any ? now : 0.0f), total = _mm512_setzero_ps();
    for (int c = 0; c < C; ++c) {
        __m512 weight = exp2_of(_mm512_sub_ps(scores[c], shift));
        total = _mm512_add_ps(total, weight);
        _mm256_storeu_si256((__m256i*)(queries.weights + q * TILE + c * LANES), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    float fade = sees_any ? _mm512_cvtss_f32(exp2_of(_mm512_set1_ps(before - now))) : 1.0f;
    queries.fades[q] = fade;
    queries.largest[q] = now;
    queries.totals[q] = queries.totals[q] * fade + _mm512_reduce_add_ps(total);
}

// Takes up to TILE keys in. `first_key` is the position of the first, `first_query` that of the first place's query, or
// negative where all keys are visible to all.
void attend(const Attention& on, const Queries& queries, int64_t num_queries, const uint16_t** keys, int num_keys,
            int64_t first_key, int64_t first_query) {
    int num_groups = (num_keys + LANES - 1) / LANES, num_pairs = (num_keys + 1) / 2;
    int64_t head_dim = on.head_dim, group = on.num_heads / on.num_kv_heads;
    for (int i = num_keys; i < num_groups * LANES; ++i) keys[i] = queries.zeros;
    turn_keys(keys, num_groups, head_dim, queries.keys);
    auto weights_of = [&](auto groups) {
        score<groups>(queries, num_queries, head_dim);
        for (int64_t q = 0; q < num_queries; ++q) {
            int64_t begin = 0, end = num_keys;
            if (first_query >= 0) {
                int64_t seen = first_query + q / group + 1 - first_key;  // keys of the tile up to the query's own
                end = std::clamp<int64_t>(seen, 0, num_keys);
                if (on.window) begin = std::clamp<int64_t>(seen - on.window, 0, num_keys);
            }
            weigh<groups>(queries, q, begin, end, on.scale, on.softcap);
        }
    };
    switch (num_groups) {
        case 1: weights_of(std::integral_constant<int, 1>()); break;
        case 2: weights_of(std::integral_constant<int, 2>()); break;
        case 3: weights_of(std::integral_constant<int, 3>()); break;
        default: weights_of(std::integral_constant<int, 4>());
    }
    for (int i = 0; i < num_keys; ++i) keys[i] += on.num_kv_heads * head_dim;
    pair_values(keys, num_pairs, head_dim, queries.values);
    int64_t d = 0;
    for (; d + REGISTERS * LANES <= head_dim; d += REGISTERS * LANES)
        mix<REGISTERS>(queries, num_queries, head_dim, num_pairs, d);
    for (; d < head_dim; d += 2 * LANES) mix<2>(queries, num_queries, head_dim, num_pairs, d);
}

// Places [begin, begin + num_places) of a piece and one KV head. Keys and values of `fetched_heads` from this one on are
// brought near a tile before they are needed.
void piece_of_head(const Attention& on, const Queries& queries, const int64_t* piece, int64_t begin,
                   int64_t num_places, int64_t kv_head, int64_t fetched_heads) {
    int64_t head_dim = on.head_dim, group = on.num_heads / on.num_kv_heads, num_queries = num_places * group;
    int64_t stride = 2 * on.num_kv_heads * head_dim, first_key = piece[5];
    int64_t first_query = piece[6] < 0 ? -1 : piece[6] + begin - piece[0];
    for (int64_t i = 0; i < num_places; ++i)
        std::memcpy(queries.numbers + i * group * head_dim,
                    on.q + on.plan.rows[begin + i] * on.q_stride + kv_head * group * head_dim, 2 * group * head_dim);
    std::fill_n(queries.sums, num_queries * head_dim, 0.0f);
    std::fill_n(queries.largest, num_queries, -INFINITY);
    std::fill_n(queries.totals, num_queries, 0.0f);
    const uint16_t* keys[TILE];
    int num_keys = 0;
    int64_t next_run = piece[2], next = 0;  // of the keys that are to come from memory
    auto fetch = [&](int64_t count) {
        while (fetched_heads && next_run < piece[3] && count) {
            const uint16_t* key = on.cache + (on.plan.runs[2 * next_run] + next) * stride + kv_head * head_dim;
            for (int64_t d = 0; d < fetched_heads * head_dim; d += 2 * LANES) {
                _mm_prefetch(key + d, _MM_HINT_T1);
                _mm_prefetch(key + stride / 2 + d, _MM_HINT_T1);
            }
            --count;
            if (++next == on.plan.runs[2 * next_run + 1]) ++next_run, next = 0;
        }
    };
    fetch(TILE);
    for (int64_t run = piece[2]; run < piece[3]; ++run) {
        const uint16_t* from = on.cache + on.plan.runs[2 * run] * stride + kv_head * head_dim;
        for (int64_t i = 0; i < on.plan.runs[2 * run + 1]; ++i) {
            keys[num_keys++] = from + i * stride;
            if (num_keys == TILE) {
                fetch(TILE);
                attend(on, queries, num_queries, keys, num_keys, first_key, first_query);
                first_key += TILE;
                num_keys = 0;
            }
        }
    }
    if (num_keys) attend(on, queries, num_queries, keys, num_keys, first_key, first_query);
    for (int64_t q = 0; q < num_queries; ++q) {
        int64_t place = begin + q / group, head = kv_head * group + q % group;
        const float* sums = queries.sums + q * head_dim;
        if (piece[4] < 0) {  // the piece is all that the place sees
            uint16_t* to = on.out + (on.plan.rows[place] * on.num_heads + head) * head_dim;
            __m512 share = _mm512_set1_ps(1.0f / queries.totals[q]);
            for (int64_t d = 0; d < head_dim; d += LANES)
                _mm256_storeu_si256((__m256i*)(to + d),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(sums + d), share)));
        } else {
            int64_t at = (piece[4] + place - piece[0]) * on.num_heads + head;
            std::memcpy(on.plan.partial_out + at * head_dim, sums, head_dim * sizeof(float));
            on.plan.partial_sums[2 * at] = queries.largest[q] * 0.69314718055994531f;
            on.plan.partial_sums[2 * at + 1] = queries.totals[q];
        }
    }
}

}  // namespace

void attention_bf16(const void* q, const void* cache, void* out, const AttentionPlan* plan, int64_t q_stride,
                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t window, double scale,
                    double softcap) {
    Attention on{(const uint16_t*)q, (const uint16_t*)cache, (uint16_t*)out, *plan,  q_stride,      num_heads,
                 num_kv_heads,       head_dim,               window,         (float)scale, (float)softcap};
    int64_t max_places = std::max<int64_t>(1, MAX_QUERIES / (num_heads / num_kv_heads));
    // A key's heads lie together: whoever computes all of them reads memory in order.
    int64_t heads = plan->num_pieces >= 4 * omp_get_max_threads() ? num_kv_heads : 1;
    int64_t num_items = plan->num_pieces * (num_kv_heads / heads);
#pragma omp parallel
    {
        char* memory = (char*)std::malloc(Queries::num_bytes(head_dim));
        Queries queries(memory, head_dim);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < num_items; ++item) {
            const int64_t* piece = plan->pieces + item / (num_kv_heads / heads) * PIECE;
            int64_t first_head = item % (num_kv_heads / heads) * heads;
            for (int64_t begin = piece[0]; begin < piece[1]; begin += max_places)
                for (int64_t head = 0; head < heads; ++head)
                    piece_of_head(on, queries, piece, begin, std::min(max_places, piece[1] - begin), first_head + head,
                                  begin == piece[0] && head == 0 ? heads : 0);
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < plan->num_rows * num_heads; ++item) {
            int64_t place = item / num_heads, head = item % num_heads;
            const int64_t *begin = plan->parts + plan->part_begins[place], *end = plan->parts + plan->part_begins[place + 1];
            if (begin < end)
                add_up(begin, end, head, num_heads, head_dim, plan->partial_out, plan->partial_sums, queries.sums,
                       (BFloat16*)on.out + (plan->rows[place] * num_heads + head) * head_dim);
        }
        std::free(memory);
    }
}

}  // namespace minirksc
