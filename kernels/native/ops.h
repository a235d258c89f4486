// What the extension offers. Pointers are of torch tensors; shapes and meanings are those of the Python references.
// "is_bfloat16" says what `T*` below points to; null pointers stand for what is None in Python.
#pragma once

#include <cstdint>

namespace minirksc {

// The processor has AVX512-BF16 and AVX512-VNNI, for which the files named *_bf16 are compiled.
int64_t has_bf16_products();

// norms.cpp: see kernels/rms_norm.py. `update` may be null: then out is the norm of hidden alone. Strides are of rows.
void add_rms_norm(void* hidden, const void* update, const void* update_norm, const void* weight, void* out,
                  int64_t rows, int64_t size, int64_t hidden_stride, int64_t update_stride, int64_t is_bfloat16,
                  int64_t is_weight_float32, double eps);

// gated_act.cpp: see kernels/gated_act.py. Activation: place in ACTIVATIONS.
void gated_act(const void* gate_up, void* out, int64_t rows, int64_t intermediate, int64_t stride,
               int64_t activation, int64_t is_bfloat16);
// gated_act_bf16.cpp: the same where has_bf16_products().
void silu_bf16(const void* gate_up, void* out, int64_t rows, int64_t intermediate, int64_t stride);
void gelu_tanh_bf16(const void* gate_up, void* out, int64_t rows, int64_t intermediate, int64_t stride);

// Slots of a tile of the KV cache, where it has tiles: kernels/kv/layer_cache.py.
constexpr int64_t KV_TILE = 16;

// Of so many numbers, the first that is not in [0, end); -1: all are.
inline int64_t first_outside(const int64_t* numbers, int64_t count, int64_t end) {
    for (int64_t i = 0; i < count; ++i)
        if ((uint64_t)numbers[i] >= (uint64_t)end) return i;
    return -1;
}

// kv_store.cpp: see kernels/kv/kv_store.py; the cache holds T. Returns -1, or the first token whose slot the cache does not
// have: then nothing is done.
int64_t kv_store(void* qkv, const void* q_norm, const void* k_norm, const void* cos, const void* sin, const void* growth,
              void* cache, const int64_t* slots, int64_t num_slots, int64_t tokens, int64_t token_stride,
              int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t rotary_dim, int64_t is_v_normed,
              int64_t is_tiled, int64_t is_bfloat16, int64_t is_weight_float32, double eps);

// confidence.cpp: see kernels/confidence.py. `results` are top-1 probability, entropy, log-sum-exp and mean logit of
// all rows, one after the other.
void confidence(const float* logits, int64_t* argmax, float* results, int64_t rows, int64_t vocab, int64_t stride);

// draw.cpp: see kernels/draw.py. `numbers` are temperature, top_p, min_p and uniform of each row.
void draw(const float* logits, const double* numbers, const int64_t* top_k, int64_t* tokens, int64_t rows,
          int64_t vocab, int64_t stride);

// What a step's attention does, as kernels/attention/paged_attention_native.py makes it. A piece is PIECE numbers: places
// [begin, end), runs [begin, end), its first row of the partial results, or -1 - that row where the piece is all that its
// place sees, position of its first key, position of its first query or -1.
constexpr int64_t PIECE = 7;
struct AttentionPlan {
    const int64_t* rows;
    const int64_t* pieces;
    const int64_t* runs;
    const int64_t* part_begins;
    const int64_t* parts;
    int64_t num_rows;
    int64_t num_pieces;
    float* partial_out;
    float* partial_sums;
    float* tile_sums;
};
// Most tiles that a piece has keys in, where tile_sums are asked for.
constexpr int64_t PIECE_TILES = 17;

// attention.cpp; all keys of a piece are visible to all its places.
void decode_attention(const void* q, const void* cache, void* out, const AttentionPlan* plan, int64_t q_stride,
                      int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t is_bfloat16, double scale,
                      double softcap);

// attention_bf16.cpp: prompts too, on a cache of tiles; only where has_bf16_products(), and head_dim in 32s. A window of 0
// is none. Unless tile_sums is null, it gains for each row of the partial results (those of pieces that are all, too),
// head, and tile of the piece, the sum of exp(score - largest so far) and that largest score.
void attention_bf16(const void* q, const void* cache, void* out, const AttentionPlan* plan, int64_t q_stride,
                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t window, double scale,
                    double softcap);

// linear.cpp: see kernels/weights/native_weight.py. To unpack returns -1, or the place of the first row that there is not: then
// nothing is done.
int64_t pack_weight(const float* weight, uint32_t* packed, int64_t out_features, int64_t in_features);
int64_t unpack_rows(const uint32_t* packed, const int64_t* rows, float* out, int64_t num_rows, int64_t in_features,
                    int64_t out_features);
void linear(const float* x, const uint32_t* packed, const float* bias, float* out, int64_t rows, int64_t in_features,
            int64_t out_features);

// linear_bf16.cpp: see kernels/weights/native_weight.py; only where has_bf16_products().
void pack_weight_bf16(const uint16_t* weight, uint32_t* packed, int64_t out_features, int64_t in_features);
int64_t unpack_rows_bf16(const uint32_t* packed, const int64_t* rows, uint32_t* out, int64_t num_rows,
                         int64_t in_features, int64_t out_features);
void linear_bf16(const uint16_t* x, const uint16_t* packed, const uint16_t* bias, void* out, int64_t rows,
                 int64_t in_features, int64_t out_features, int64_t is_out_float32);

// linear_int8_bf16.cpp: see kernels/weights/int8_weight.py; only where has_bf16_products(). x_numbers and x_scales are room for the
// rounded x: of each group of a row, INT8_GROUP and 8 bytes.
constexpr int INT8_GROUP = 32;
void linear_int8(const uint16_t* x, const uint8_t* packed, const uint16_t* scales, const uint16_t* bias,
                 int8_t* x_numbers, void* x_scales, void* out, int64_t rows, int64_t in_features,
                 int64_t out_features, int64_t is_out_float32);

}  // namespace minirksc
