#include "numbers.h"
#include "ops.h"
#include "threads.h"

#include <cmath>

namespace minirksc {
namespace {

// 1 / sqrt(mean(x^2) + eps)
template <typename T>
float scale_of(const T* x, int64_t size, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; ++i) squares += to_float(x[i]) * to_float(x[i]);
    return 1.0f / std::sqrt(squares / size + eps);
}

template <typename T, typename W>
void rows_of(T* hidden, const T* update, const W* update_norm, const W* weight, T* out, int64_t rows, int64_t size,
             int64_t hidden_stride, int64_t update_stride, float eps) {
    for_all(rows, size, [&](int64_t row) {
        T* x = hidden + row * hidden_stride;
        T* y = out + row * size;
        if (update != nullptr) {
            const T* added = update + row * update_stride;
            if (update_norm != nullptr) {
                float scale = scale_of(added, size, eps);
#pragma omp simd
                for (int64_t i = 0; i < size; ++i) {
                    float normed = rounded<W>(to_float(added[i]) * scale) * to_float(update_norm[i]);
                    x[i] = from_float<T>(to_float(x[i]) + rounded<T>(normed));
                }
            } else {
#pragma omp simd
                for (int64_t i = 0; i < size; ++i) x[i] = from_float<T>(to_float(x[i]) + to_float(added[i]));
            }
        }
        float scale = scale_of(x, size, eps);
        if (weight != nullptr) {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i)
                y[i] = from_float<T>(rounded<W>(to_float(x[i]) * scale) * to_float(weight[i]));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) y[i] = from_float<T>(to_float(x[i]) * scale);
        }
    });
}

template <typename T, typename W>
void typed(void* hidden, const void* update, const void* update_norm, const void* weight, void* out, int64_t rows,
           int64_t size, int64_t hidden_stride, int64_t update_stride, double eps) {
    rows_of<T, W>((T*)hidden, (const T*)update, (const W*)update_norm, (const W*)weight, (T*)out, rows, size,
                  hidden_stride, update_stride, (float)eps);
}

}  // namespace

void add_rms_norm(void* hidden, const void* update, const void* update_norm, const void* weight, void* out,
                  int64_t rows, int64_t size, int64_t hidden_stride, int64_t update_stride, int64_t is_bfloat16,
                  int64_t is_weight_float32, double eps) {
    auto run = !is_bfloat16 ? typed<float, float> : is_weight_float32 ? typed<BFloat16, float> : typed<BFloat16, BFloat16>;
    run(hidden, update, update_norm, weight, out, rows, size, hidden_stride, update_stride, eps);
}

}  // namespace minirksc
