// act(gate) up in bfloat16, 16 numbers at a time; see kernels/gated_act.py.
#include "ops.h"
#include "threads.h"

#include "tile_bf16.h"

namespace minirksc {
namespace {

constexpr float LOG2_E = 1.44269504088896341f;

// x / (1 + 2^-y)
__m512 gated(__m512 x, __m512 y) {
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp2_of(_mm512_sub_ps(_mm512_setzero_ps(), y))));
}

struct Silu {
    __m512 operator()(__m512 x) const { return gated(x, _mm512_mul_ps(x, _mm512_set1_ps(LOG2_E))); }
};
struct GeluTanh {
    __m512 operator()(__m512 x) const {
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
        return gated(x, _mm512_mul_ps(inner, _mm512_set1_ps(LOG2_E * 1.5957691216057308f)));  // 2 sqrt(2 / pi)
    }
};

template <typename Activation>
void rows_of(const uint16_t* gate_up, uint16_t* out, int64_t rows, int64_t size, int64_t stride, Activation activation) {
    for_all(rows, size, [&](int64_t row) {
        for (int64_t i = 0; i < size; i += LANES) {
            __mmask16 mask = first_lanes(size - i);
            const uint16_t* gate = gate_up + row * stride + i;
            __m512 y = _mm512_mul_ps(activation(load_some(gate, mask)), load_some(gate + size, mask));
            store_some(out + row * size + i, mask, y);
        }
    });
}

}  // namespace

void silu_bf16(const void* gate_up, void* out, int64_t rows, int64_t intermediate, int64_t stride) {
    rows_of((const uint16_t*)gate_up, (uint16_t*)out, rows, intermediate, stride, Silu());
}

void gelu_tanh_bf16(const void* gate_up, void* out, int64_t rows, int64_t intermediate, int64_t stride) {
    rows_of((const uint16_t*)gate_up, (uint16_t*)out, rows, intermediate, stride, GeluTanh());
}

}  // namespace minirksc
