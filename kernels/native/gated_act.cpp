#include "numbers.h"
#include "ops.h"
#include "threads.h"

#include <cmath>

namespace minirksc {
namespace {

struct Silu {
    Floats operator()(Floats x) const { return x / (1.0f + exponential(-x)); }
};
struct GeluTanh {
    Floats operator()(Floats x) const {
        return x / (1.0f + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));  // 2 sqrt(2 / pi)
    }
};
struct Gelu {
    Floats operator()(Floats x) const {
        for (int i = 0; i < WIDTH; ++i) x[i] *= 0.5f * (1.0f + std::erf(x[i] * 0.7071067811865476f));
        return x;
    }
};

template <typename T, typename Activation>
void rows_of(const void* gate_up, void* out, int64_t rows, int64_t size, int64_t stride) {
    Activation activation;
    int64_t whole = size / WIDTH * WIDTH;
    for_all(rows, size, [&](int64_t row) {
        const T *gate = (const T*)gate_up + row * stride, *up = gate + size;
        T* y = (T*)out + row * size;
        for (int64_t i = 0; i < whole; i += WIDTH) store(y + i, activation(load(gate + i)) * load(up + i));
        for (int64_t i = whole; i < size; ++i)
            y[i] = from_float<T>(activation(to_float(gate[i]) - Floats{})[0] * to_float(up[i]));
    });
}

}  // namespace

void gated_act(const void* gate_up, void* out, int64_t rows, int64_t intermediate, int64_t stride,
               int64_t activation, int64_t is_bfloat16) {
    using Run = void (*)(const void*, void*, int64_t, int64_t, int64_t);
    static constexpr Run RUNS[3][3] = {
        {rows_of<float, Silu>, rows_of<float, GeluTanh>, rows_of<float, Gelu>},
        {rows_of<BFloat16, Silu>, rows_of<BFloat16, GeluTanh>, rows_of<BFloat16, Gelu>},
        {silu_bf16, gelu_tanh_bf16, rows_of<BFloat16, Gelu>},
    };
    RUNS[is_bfloat16 ? 1 + has_bf16_products() : 0][activation](gate_up, out, rows, intermediate, stride);
}

}  // namespace minirksc
