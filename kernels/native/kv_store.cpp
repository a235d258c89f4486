#include "numbers.h"
#include "ops.h"
#include "threads.h"

#include <cmath>

namespace minirksc {
namespace {

template <typename T>
struct Rope {
    const T* cos;
    const T* sin;
    int64_t half;
};

template <typename T, typename W>
void norm_head(T* x, const W* weight, int64_t head_dim, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < head_dim; ++i) squares += to_float(x[i]) * to_float(x[i]);
    float scale = 1.0f / std::sqrt(squares / head_dim + eps);
    for (int64_t i = 0; i < head_dim; ++i) {
        float normed = to_float(x[i]) * scale;
        x[i] = from_float<T>(weight == nullptr ? normed : rounded<W>(normed) * to_float(weight[i]));
    }
}

// The tables' second half is read, where the sine has its own sign.
template <typename T>
void rotate_head(T* x, Rope<T> rope) {
    const T *cos = rope.cos + rope.half, *sin = rope.sin + rope.half;
    T* y = x + rope.half;
#pragma omp simd
    for (int64_t i = 0; i < rope.half; ++i) {
        float low = to_float(x[i]), high = to_float(y[i]), c = to_float(cos[i]), s = to_float(sin[i]);
        x[i] = from_float<T>(low * c - high * s);
        y[i] = from_float<T>(high * c + low * s);
    }
}

// A token's keys, then its values, into its tile: pairs of a key's numbers, and pairs of two keys' values, lie together.
template <typename T>
void store_in_tile(const T* kv, T* cache, int64_t slot, int64_t num_kv_heads, int64_t head_dim) {
    int64_t key = slot % KV_TILE, head_numbers = KV_TILE * head_dim;
    T* tile = cache + slot / KV_TILE * 2 * num_kv_heads * head_numbers;
    for (int64_t head = 0; head < num_kv_heads; ++head, kv += head_dim, tile += head_numbers)
        for (int64_t d = 0; d < head_dim; d += 2) std::memcpy(tile + d * KV_TILE + 2 * key, kv + d, 2 * sizeof(T));
    for (int64_t head = 0; head < num_kv_heads; ++head, kv += head_dim, tile += head_numbers) {
        T* to = tile + key / 2 * 2 * head_dim + key % 2;
        for (int64_t d = 0; d < head_dim; ++d) to[2 * d] = kv[d];
    }
}

template <typename T, typename W>
void typed(void* qkv_, const void* q_norm_, const void* k_norm_, const void* cos_, const void* sin_,
           const void* growth_, void* cache_, const int64_t* slots, int64_t tokens, int64_t token_stride,
           int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t rotary_dim, bool is_v_normed, bool is_tiled,
           float eps) {
    T *qkv = (T*)qkv_, *cache = (T*)cache_;
    const W *q_norm = (const W*)q_norm_, *k_norm = (const W*)k_norm_;
    const T *cos = (const T*)cos_, *sin = (const T*)sin_, *growth = (const T*)growth_;
    int64_t num_turned = num_heads + num_kv_heads, stored = 2 * num_kv_heads * head_dim;
    for_all(tokens, num_heads * head_dim + stored, [&](int64_t token) {
        T* q = qkv + token * token_stride;
        T* k = q + num_heads * head_dim;
        T* v = k + num_kv_heads * head_dim;
        Rope<T> rope{cos + token * rotary_dim, sin + token * rotary_dim, rotary_dim / 2};
        for (int64_t head = 0; head < num_turned; ++head) {
            T* x = q + head * head_dim;
            const W* norm = head < num_heads ? q_norm : k_norm;
            if (norm != nullptr) norm_head(x, norm, head_dim, eps);
            if (cos != nullptr) rotate_head(x, rope);
        }
        if (growth != nullptr)
            for (int64_t i = 0; i < num_heads * head_dim; ++i)
                q[i] = from_float<T>(to_float(q[i]) * to_float(growth[token]));
        if (is_v_normed)
            for (int64_t head = 0; head < num_kv_heads; ++head)
                norm_head(v + head * head_dim, (const W*)nullptr, head_dim, eps);
        if (cache == nullptr) return;
        if (is_tiled)
            store_in_tile(k, cache, slots[token], num_kv_heads, head_dim);
        else
            std::memcpy(cache + slots[token] * stored, k, stored * sizeof(T));
    });
}

}  // namespace

int64_t kv_store(void* qkv, const void* q_norm, const void* k_norm, const void* cos, const void* sin,
                 const void* growth, void* cache, const int64_t* slots, int64_t num_slots, int64_t tokens,
                 int64_t token_stride, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t rotary_dim,
                 int64_t is_v_normed, int64_t is_tiled, int64_t is_bfloat16, int64_t is_weight_float32, double eps) {
    int64_t bad = slots == nullptr ? -1 : first_outside(slots, tokens, num_slots);
    if (bad >= 0) return bad;
    auto run = !is_bfloat16 ? typed<float, float> : is_weight_float32 ? typed<BFloat16, float> : typed<BFloat16, BFloat16>;
    run(qkv, q_norm, k_norm, cos, sin, growth, cache, slots, tokens, token_stride, num_heads, num_kv_heads, head_dim,
        rotary_dim, is_v_normed != 0, is_tiled != 0, (float)eps);
    return -1;
}

}  // namespace minirksc
