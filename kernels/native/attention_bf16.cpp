// Attention of bfloat16 queries over keys and values where they lie in a cache of tiles, for processors with
// AVX512-BF16. Decode rows and prompts alike: a piece is some keys at consecutive positions, and the neighbouring places
// whose queries see all of them, or, in a prompt, each those up to itself.
//
// A tile is KV_TILE slots of the cache, in the order in which products read them (kernels/kv/layer_cache.py). Each piece and
// KV head is computed by itself, a few tiles at a time: keys multiplied by all queries of the head's group and of all
// places, softmax with a running maximum (FlashAttention's online softmax), and the weights, rounded to bfloat16, by the
// values. What branches share is so read once.
#include "ops.h"
#include "threads.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "parts.h"
#include "tile_bf16.h"

namespace minirksc {
namespace {

constexpr int MAX_TILES = 4;  // at a time
constexpr int TILE = MAX_TILES * KV_TILE;
constexpr int MAX_QUERIES = 96;
constexpr float LOG_2 = 0.69314718055994531f;
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

// Memory of a thread, as much as was asked for at most.
struct Memory {
    char* bytes = nullptr;
    int64_t size = 0;

    char* at_least(int64_t wanted) {
        if (size < wanted) {
            std::free(bytes);
            bytes = (char*)std::malloc(wanted);
            size = wanted;
        }
        return bytes;
    }
    ~Memory() { std::free(bytes); }
};
thread_local Memory kept;

// Queries of one KV head, with what they have gathered so far. All in memory of the thread, one at a time.
struct Queries {
    uint16_t* numbers;   // [MAX_QUERIES, head_dim]
    uint16_t* values;    // [2, KV_TILE, head_dim], of tiles that are visible in part
    uint16_t* weights;   // [MAX_QUERIES, TILE]
    float* scores;       // [MAX_QUERIES, TILE]
    float* sums;         // [MAX_QUERIES, head_dim], of values by weights
    float* largest;      // [MAX_QUERIES], score times log2(e)
    float* totals;       // [MAX_QUERIES], of weights
    float* fades;        // [MAX_QUERIES], of the sums so far

    explicit Queries(int64_t head_dim) {
        char* memory = kept.at_least(2 * head_dim * (MAX_QUERIES + 2 * KV_TILE) + 6 * MAX_QUERIES * TILE +
                                     4 * MAX_QUERIES * (head_dim + 3));
        auto take = [&](auto*& pointer, int64_t count) {
            pointer = (std::remove_reference_t<decltype(pointer)>)memory;
            memory += count * sizeof *pointer;
        };
        take(numbers, MAX_QUERIES * head_dim);
        take(values, 2 * KV_TILE * head_dim);
        take(weights, MAX_QUERIES * TILE);
        take(scores, MAX_QUERIES * TILE);
        take(sums, MAX_QUERIES * head_dim);
        take(largest, MAX_QUERIES);
        take(totals, MAX_QUERIES);
        take(fades, MAX_QUERIES);
    }
};

// Some tiles of one head.
struct Tiles {
    int count = 0;
    const uint16_t* keys[MAX_TILES];    // [head_dim / 2, KV_TILE, 2] each: a number's pair of all keys side by side
    const uint16_t* values[MAX_TILES];  // [KV_TILE / 2, head_dim, 2] each: a number of two consecutive keys side by side
    int64_t begin = 0, end = 0;         // of their keys, those that are read
};

// Values of keys [begin, end) of a tile, and 0 for the others, where anything may lie.
const uint16_t* visible_values(const uint16_t* values, int64_t begin, int64_t end, int64_t head_dim, uint16_t* to) {
    for (int64_t key = 0; key < KV_TILE; key += 2) {
        uint32_t low = begin <= key && key < end ? 0xffff : 0, high = begin <= key + 1 && key + 1 < end ? 0xffff0000 : 0;
        __m512i mask = _mm512_set1_epi32((int)(low | high));
        for (int64_t d = 0; d < head_dim; d += LANES) {
            int64_t at = key * head_dim + 2 * d;
            _mm512_storeu_si512(to + at, _mm512_and_si512(mask, _mm512_loadu_si512(values + at)));
        }
    }
    return to;
}

template <int C>
void score(const Queries& queries, int64_t num_queries, int64_t head_dim, const Tiles& tiles) {
    by_rows<ROWS>(num_queries, [&](auto count, int64_t begin) {
        const uint16_t* keys[C];
        for (int c = 0; c < C; ++c) keys[c] = tiles.keys[c];
        __m512 sums[count][C] = {};
        multiply<count, C>(queries.numbers + begin * head_dim, head_dim, keys, 2 * LANES, head_dim / 2, sums);
        for (int r = 0; r < count; ++r)
            for (int c = 0; c < C; ++c) _mm512_storeu_ps(queries.scores + (begin + r) * TILE + c * LANES, sums[r][c]);
    });
}

template <int C>
void mix(const Queries& queries, int64_t num_queries, int64_t head_dim, const Tiles& tiles, int64_t d) {
    by_rows<ROWS>(num_queries, [&](auto count, int64_t begin) {
        __m512 sums[count][C];
        for (int r = 0; r < count; ++r)
            for (int c = 0; c < C; ++c)
                sums[r][c] = _mm512_mul_ps(_mm512_loadu_ps(queries.sums + (begin + r) * head_dim + d + c * LANES),
                                           _mm512_set1_ps(queries.fades[begin + r]));
        for (int tile = 0; tile < tiles.count; ++tile) {
            const uint16_t* values[C];
            for (int c = 0; c < C; ++c) values[c] = tiles.values[tile] + 2 * (d + c * LANES);
            multiply<count, C>(queries.weights + begin * TILE + tile * KV_TILE, TILE, values, 2 * head_dim,
                               KV_TILE / 2, sums);
        }
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

// Scores of one query become weights; keys [begin, end) of the tiles are visible. `tile_sums` as in ops.h.
template <int C>
void weigh(const Queries& queries, int64_t q, int64_t begin, int64_t end, float scale, float softcap,
           float* tile_sums) {
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
        if (tile_sums != nullptr) tile_sums[2 * c] = _mm512_reduce_add_ps(weight), tile_sums[2 * c + 1] = now * LOG_2;
        _mm256_storeu_si256((__m256i*)(queries.weights + q * TILE + c * LANES), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    float fade = sees_any ? _mm512_cvtss_f32(exp2_of(_mm512_set1_ps(before - now))) : 1.0f;
    queries.fades[q] = fade;
    queries.largest[q] = now;
    queries.totals[q] = queries.totals[q] * fade + _mm512_reduce_add_ps(total);
}

// Takes some keys in. `first_key` is the position of the tiles' first, `first_query` that of the first place's query, or
// negative where all keys are visible to all. `tile_sums(q)` is where those of a query go.
template <typename F>
void attend(const Attention& on, const Queries& queries, int64_t num_queries, Tiles& tiles, int64_t first_key,
            int64_t first_query, F tile_sums) {
    int64_t head_dim = on.head_dim, group = on.num_heads / on.num_kv_heads;
    auto weights_of = [&](auto count) {
        score<count>(queries, num_queries, head_dim, tiles);
        for (int64_t q = 0; q < num_queries; ++q) {
            int64_t begin = tiles.begin, end = tiles.end;
            if (first_query >= 0) {
                int64_t seen = first_query + q / group + 1 - first_key;  // keys of the tiles up to the query's own
                end = std::clamp(seen, begin, end);
                if (on.window) begin = std::clamp(seen - on.window, begin, end);
            }
            weigh<count>(queries, q, begin, end, on.scale, on.softcap, tile_sums(q));
        }
    };
    switch (tiles.count) {
        case 1: weights_of(std::integral_constant<int, 1>()); break;
        case 2: weights_of(std::integral_constant<int, 2>()); break;
        case 3: weights_of(std::integral_constant<int, 3>()); break;
        default: weights_of(std::integral_constant<int, MAX_TILES>());
    }
    const uint16_t*& first = tiles.values[0];
    const uint16_t*& last = tiles.values[tiles.count - 1];
    int64_t last_end = tiles.end - (tiles.count - 1) * KV_TILE;
    if (tiles.begin) first = visible_values(first, tiles.begin, KV_TILE, head_dim, queries.values);
    if (last_end < KV_TILE) last = visible_values(last, 0, last_end, head_dim, queries.values + KV_TILE * head_dim);
    int64_t d = 0;
    for (; d + REGISTERS * LANES <= head_dim; d += REGISTERS * LANES)
        mix<REGISTERS>(queries, num_queries, head_dim, tiles, d);
    for (; d < head_dim; d += 2 * LANES) mix<2>(queries, num_queries, head_dim, tiles, d);
}

// The tiles of a piece, one after the other. Only the first begins, and only the last ends, amid its keys.
struct Walk {
    const int64_t *run, *end;  // (first slot, keys) each
    int64_t tile;              // of the cache

    Walk(const AttentionPlan& plan, const int64_t* piece)
        : run(plan.runs + 2 * piece[2]), end(plan.runs + 2 * piece[3]), tile(run[0] / KV_TILE) {}
    bool is_over() const { return run == end; }
    // Of the tile's keys, where those of the run end.
    int64_t keys_end() const { return std::min<int64_t>(KV_TILE, run[0] + run[1] - tile * KV_TILE); }
    void next() {
        if (++tile * KV_TILE < run[0] + run[1]) return;
        if ((run += 2) != end) tile = run[0] / KV_TILE;
    }
};

// Places [begin, begin + num_places) of a piece and one KV head. Keys and values of heads [fetch_begin, fetch_end) are
// brought near, some tiles ahead.
void piece_of_head(const Attention& on, const Queries& queries, const int64_t* piece, int64_t begin,
                   int64_t num_places, int64_t kv_head, int64_t fetch_begin, int64_t fetch_end) {
    int64_t head_dim = on.head_dim, group = on.num_heads / on.num_kv_heads, num_queries = num_places * group;
    int64_t head_numbers = KV_TILE * head_dim, half = on.num_kv_heads * head_numbers;  // of a tile
    int64_t first_query = piece[6] < 0 ? -1 : piece[6] + begin - piece[0];
    for (int64_t i = 0; i < num_places; ++i)
        std::memcpy(queries.numbers + i * group * head_dim,
                    on.q + on.plan.rows[begin + i] * on.q_stride + kv_head * group * head_dim, 2 * group * head_dim);
    std::fill_n(queries.sums, num_queries * head_dim, 0.0f);
    std::fill_n(queries.largest, num_queries, -INFINITY);
    std::fill_n(queries.totals, num_queries, 0.0f);
    Walk here(on.plan, piece), ahead = here;
    auto fetch = [&] {
        for (int i = 0; fetch_begin < fetch_end && i < MAX_TILES && !ahead.is_over(); ++i, ahead.next()) {
            const uint16_t* keys = on.cache + 2 * half * ahead.tile;
            for (int64_t at = fetch_begin * head_numbers; at < fetch_end * head_numbers; at += 2 * LANES) {
                _mm_prefetch(keys + at, _MM_HINT_T1);
                _mm_prefetch(keys + half + at, _MM_HINT_T1);
            }
        }
    };
    fetch();
    // Of the partial results and heads.
    int64_t first_part = piece[4] < 0 ? -1 - piece[4] : piece[4];
    auto part = [&](int64_t q) {
        return (first_part + begin + q / group - piece[0]) * on.num_heads + kv_head * group + q % group;
    };
    Tiles tiles;
    int64_t num_tiles = 0;  // before these
    tiles.begin = here.run[0] % KV_TILE;
    int64_t first_key = piece[5] - tiles.begin;
    while (!here.is_over()) {
        const uint16_t* keys = on.cache + 2 * half * here.tile + kv_head * head_numbers;
        tiles.keys[tiles.count] = keys;
        tiles.values[tiles.count] = keys + half;
        tiles.end = tiles.count * KV_TILE + here.keys_end();
        ++tiles.count;
        here.next();
        if (tiles.count < MAX_TILES && !here.is_over()) continue;
        fetch();
        attend(on, queries, num_queries, tiles, first_key, first_query, [&](int64_t q) {
            float* sums = on.plan.tile_sums;
            return sums == nullptr ? sums : sums + 2 * (part(q) * PIECE_TILES + num_tiles);
        });
        first_key += TILE;
        num_tiles += tiles.count;
        tiles.count = tiles.begin = 0;
    }
    for (int64_t q = 0; q < num_queries; ++q) {
        int64_t place = begin + q / group, head = kv_head * group + q % group;
        const float* sums = queries.sums + q * head_dim;
        if (piece[4] >= 0 || on.plan.tile_sums != nullptr) {
            on.plan.partial_sums[2 * part(q)] = queries.largest[q] * LOG_2;
            on.plan.partial_sums[2 * part(q) + 1] = queries.totals[q];
        }
        if (piece[4] < 0) {  // the piece is all that the place sees
            uint16_t* to = on.out + (on.plan.rows[place] * on.num_heads + head) * head_dim;
            __m512 share = _mm512_set1_ps(1.0f / queries.totals[q]);
            for (int64_t d = 0; d < head_dim; d += LANES)
                _mm256_storeu_si256((__m256i*)(to + d),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(sums + d), share)));
        } else {
            std::memcpy(on.plan.partial_out + part(q) * head_dim, sums, head_dim * sizeof(float));
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
    // A key's heads lie together: a thread that computes all of them reads memory in order.
    int64_t heads = plan->num_pieces >= 4 * num_threads() ? num_kv_heads : 1;
    int64_t num_items = plan->num_pieces * (num_kv_heads / heads);
    for_ranges(num_items, 8, [&](int64_t item_begin, int64_t item_end) {
        Queries queries(head_dim);
        for (int64_t item = item_begin; item < item_end; ++item) {
            const int64_t* piece = plan->pieces + item / (num_kv_heads / heads) * PIECE;
            int64_t first_head = item % (num_kv_heads / heads) * heads, end_head = first_head + heads;
            for (int64_t begin = piece[0]; begin < piece[1]; begin += max_places)
                for (int64_t head = first_head; head < end_head; ++head) {
                    // The first head brings itself near, each the next one, so that memory has work all along.
                    int64_t fetch_end = begin == piece[0] ? std::min(head + 2, end_head) : 0;
                    piece_of_head(on, queries, piece, begin, std::min(max_places, piece[1] - begin), head,
                                  head == first_head ? head : head + 1, fetch_end);
                }
        }
    });
    if (plan->part_begins[plan->num_rows] == 0) return;
    for_ranges(plan->num_rows * num_heads, 1, [&](int64_t item_begin, int64_t item_end) {
        float* sums = (float*)kept.at_least(head_dim * sizeof(float));
        for (int64_t item = item_begin; item < item_end; ++item) {
            int64_t place = item / num_heads, head = item % num_heads;
            const int64_t *begin = plan->parts + plan->part_begins[place], *end = plan->parts + plan->part_begins[place + 1];
            if (begin < end)
                add_up(begin, end, head, num_heads, head_dim, plan->partial_out, plan->partial_sums, sums,
                       (BFloat16*)on.out + (plan->rows[place] * num_heads + head) * head_dim);
        }
    });
}

}  // namespace minirksc
