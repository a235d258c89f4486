// Attention of decode rows over keys and values where they lie in the paged cache.
//
// A piece is some keys that neighbouring places all see: runs of consecutive slots. Each piece and KV head is computed
// by itself, with a running maximum over tiles of keys (FlashAttention's online softmax), for all queries of the head's
// group and of all places at once, so that what branches share is read once. Then each place adds up its pieces.
#include "numbers.h"
#include "ops.h"
#include "threads.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parts.h"

namespace minirksc {
namespace {

constexpr int TILE = 48;  // keys whose scores are held at a time
constexpr int QUERIES = 4;
constexpr int KEYS = 3;

// scores[q][k] of Q queries and K keys.
template <int Q, int K, typename T>
void dot(const float* queries, const T* keys, int64_t key_stride, float* scores, int64_t head_dim) {
    Floats sums[Q][K] = {};
    for (int64_t d = 0; d < head_dim; d += WIDTH) {
        Floats query[Q];
        for (int q = 0; q < Q; ++q) query[q] = load(queries + q * head_dim + d);
        for (int k = 0; k < K; ++k) {
            Floats key = load(keys + k * key_stride + d);
            for (int q = 0; q < Q; ++q) sums[q][k] += query[q] * key;
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int k = 0; k < K; ++k) scores[q * TILE + k] = sum_of(sums[q][k]);
}

template <int Q, typename T>
void score(const float* queries, const T* keys, int64_t key_stride, int num_keys, float* scores, int64_t head_dim) {
    int k = 0;
    for (; k + KEYS <= num_keys; k += KEYS)
        dot<Q, KEYS>(queries, keys + k * key_stride, key_stride, scores + k, head_dim);
    for (; k < num_keys; ++k) dot<Q, 1>(queries, keys + k * key_stride, key_stride, scores + k, head_dim);
}

// sums[q] += weights[q][k] values[k], for 8 V numbers of a head.
template <int Q, int V, typename T>
void mix(const float* weights, const T* values, int64_t value_stride, int num_keys, float* sums, int64_t head_dim) {
    Floats mixed[Q][V];
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) mixed[q][v] = load(sums + q * head_dim + v * WIDTH);
    for (int k = 0; k < num_keys; ++k) {
        Floats value[V];
        for (int v = 0; v < V; ++v) value[v] = load(values + k * value_stride + v * WIDTH);
        for (int q = 0; q < Q; ++q) {
            Floats weight = weights[q * TILE + k] - Floats{};
            for (int v = 0; v < V; ++v) mixed[q][v] += weight * value[v];
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) store(sums + q * head_dim + v * WIDTH, mixed[q][v]);
}

template <int Q, typename T>
void mix_all(const float* weights, const T* values, int64_t value_stride, int num_keys, float* sums,
             int64_t head_dim) {
    int64_t d = 0;
    for (; d + 2 * WIDTH <= head_dim; d += 2 * WIDTH)
        mix<Q, 2>(weights, values + d, value_stride, num_keys, sums + d, head_dim);
    for (; d < head_dim; d += WIDTH) mix<Q, 1>(weights, values + d, value_stride, num_keys, sums + d, head_dim);
}

// f<Q>(begin) for all queries, up to QUERIES at a time.
template <typename F>
void by_queries(int64_t num_queries, F f) {
    int64_t begin = 0;
    for (; begin + QUERIES <= num_queries; begin += QUERIES) f(std::integral_constant<int, QUERIES>(), begin);
    switch (num_queries - begin) {
        case 1: f(std::integral_constant<int, 1>(), begin); break;
        case 2: f(std::integral_constant<int, 2>(), begin); break;
        case 3: f(std::integral_constant<int, 3>(), begin); break;
    }
}

struct Queries {
    std::vector<float> numbers;  // [queries, head_dim], times the scale
    std::vector<float> sums;     // [queries, head_dim], of values by weights
    std::vector<float> scores;   // [queries, TILE]
    std::vector<float> largest;  // [queries]
    std::vector<float> totals;   // [queries], of weights
};

// Takes one tile of keys and their values in.
template <typename T>
void attend(Queries& queries, const T* keys, const T* values, int64_t stride, int num_keys, int64_t head_dim,
            float softcap) {
    int64_t num_queries = queries.largest.size();
    by_queries(num_queries, [&](auto count, int64_t begin) {
        score<count>(&queries.numbers[begin * head_dim], keys, stride, num_keys, &queries.scores[begin * TILE],
                     head_dim);
    });
    for (int64_t q = 0; q < num_queries; ++q) {
        float* scores = &queries.scores[q * TILE];
        if (softcap != 0)
            for (int k = 0; k < num_keys; ++k) scores[k] = softcap * tanh_of(scores[k] / softcap);
        float largest = queries.largest[q], total = 0;
#pragma omp simd reduction(max : largest)
        for (int k = 0; k < num_keys; ++k) largest = scores[k] > largest ? scores[k] : largest;
        float shift = largest == -INFINITY ? 0 : largest;  // -inf - -inf is NaN
#pragma omp simd reduction(+ : total)
        for (int k = 0; k < num_keys; ++k) {
            scores[k] = exponential(scores[k] - shift);
            total += scores[k];
        }
        float fade = exponential(queries.largest[q] - shift);
        queries.largest[q] = largest;
        queries.totals[q] = queries.totals[q] * fade + total;
        if (fade != 1) {
            float* sums = &queries.sums[q * head_dim];
            for (int64_t d = 0; d < head_dim; ++d) sums[d] *= fade;
        }
    }
    by_queries(num_queries, [&](auto count, int64_t begin) {
        mix_all<count>(&queries.scores[begin * TILE], values, stride, num_keys, &queries.sums[begin * head_dim],
                       head_dim);
    });
}

template <typename T>
void typed(const void* q_, const void* cache_, void* out_, const AttentionPlan& plan, int64_t q_stride,
           int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float scale, float softcap) {
    const T *q = (const T*)q_, *cache = (const T*)cache_;
    const int64_t *rows = plan.rows, *runs = plan.runs;
    T* out = (T*)out_;
    int64_t group = num_heads / num_kv_heads, stride = 2 * num_kv_heads * head_dim;
    for_ranges(plan.num_pieces * num_kv_heads, 8, [&](int64_t item_begin, int64_t item_end) {
        Queries queries;
        for (int64_t item = item_begin; item < item_end; ++item) {
            const int64_t* piece = plan.pieces + item / num_kv_heads * PIECE;
            int64_t place_begin = piece[0], num_places = piece[1] - piece[0], kv_head = item % num_kv_heads;
            int64_t num_queries = num_places * group;
            queries.numbers.resize(num_queries * head_dim);
            queries.scores.resize(num_queries * TILE);
            queries.sums.assign(num_queries * head_dim, 0.0f);
            queries.largest.assign(num_queries, -INFINITY);
            queries.totals.assign(num_queries, 0.0f);
            for (int64_t i = 0; i < num_places; ++i) {
                const T* from = q + rows[place_begin + i] * q_stride + kv_head * group * head_dim;
                float* to = &queries.numbers[i * group * head_dim];
                for (int64_t d = 0; d < group * head_dim; ++d) to[d] = to_float(from[d]) * scale;
            }
            for (int64_t run = piece[2]; run < piece[3]; ++run) {
                const T* keys = cache + runs[2 * run] * stride + kv_head * head_dim;
                for (int64_t begin = 0; begin < runs[2 * run + 1]; begin += TILE) {
                    int num_keys = (int)std::min<int64_t>(TILE, runs[2 * run + 1] - begin);
                    const T* tile = keys + begin * stride;
                    attend(queries, tile, tile + num_kv_heads * head_dim, stride, num_keys, head_dim, softcap);
                }
            }
            for (int64_t i = 0; i < num_queries; ++i) {
                int64_t place = place_begin + i / group, head = kv_head * group + i % group;
                const float* sums = &queries.sums[i * head_dim];
                if (piece[4] < 0) {  // the piece is all that the place sees
                    T* to = out + (rows[place] * num_heads + head) * head_dim;
                    for (int64_t d = 0; d < head_dim; ++d) to[d] = from_float<T>(sums[d] / queries.totals[i]);
                    continue;
                }
                int64_t at = (piece[4] + i / group) * num_heads + head;
                std::memcpy(plan.partial_out + at * head_dim, sums, head_dim * sizeof(float));
                plan.partial_sums[2 * at] = queries.largest[i];
                plan.partial_sums[2 * at + 1] = queries.totals[i];
            }
        }
    });
    if (plan.part_begins[plan.num_rows] == 0) return;
    for_ranges(plan.num_rows * num_heads, 1, [&](int64_t item_begin, int64_t item_end) {
        std::vector<float> sums(head_dim);
        for (int64_t item = item_begin; item < item_end; ++item) {
            int64_t place = item / num_heads, head = item % num_heads;
            const int64_t *begin = plan.parts + plan.part_begins[place], *end = plan.parts + plan.part_begins[place + 1];
            if (begin < end)
                add_up(begin, end, head, num_heads, head_dim, plan.partial_out, plan.partial_sums, sums.data(),
                       out + (rows[place] * num_heads + head) * head_dim);
        }
    });
}

}  // namespace

void decode_attention(const void* q, const void* cache, void* out, const AttentionPlan* plan, int64_t q_stride,
                      int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t is_bfloat16, double scale,
                      double softcap) {
    auto run = is_bfloat16 ? typed<BFloat16> : typed<float>;
    run(q, cache, out, *plan, q_stride, num_heads, num_kv_heads, head_dim, (float)scale, (float)softcap);
}

}  // namespace minirksc
