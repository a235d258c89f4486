// Numbers as they lie in memory, float32 or bfloat16, and eight of them at a time in GCC's vector extension.
#pragma once

#include <cstdint>
#include <cstring>

namespace minirksc {

constexpr int WIDTH = 8;

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &word, 4);
    return out;
}

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
// To the nearest, ties to even; NaN stays NaN.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return {uint16_t(x == x ? rounded : 0x7fc0)};
}

// x as T holds it.
template <typename T>
float rounded(float x) {
    return to_float(from_float<T>(x));
}

inline Floats load(const float* from) {
    Floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
inline Floats load(const BFloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}
inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline float sum_of(Floats x) {
    Floats halves = x + __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    Floats pairs = halves + __builtin_shufflevector(halves, halves, 2, 3, 0, 1, 6, 7, 4, 5);
    return pairs[0] + pairs[1];
}

inline void store(BFloat16* to, Floats x) {
    Words words = (Words)x;
    Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
    Halves halves = __builtin_convertvector((Words)(x == x ? (Ints)rounded : Ints{} + 0x7fc0), Halves);
    std::memcpy(to, &halves, sizeof halves);
}

// e^x to about 1e-7 of it, for x that is NaN too; 0 below -87, infinite above 88.
// Cephes' expf: x = n log 2 + r, a polynomial of r, and n added to the exponent.
inline Floats exponential(Floats x) {
    const Floats zero = {}, least = zero - 87.0f, most = zero + 88.0f;
    Floats clamped = x < least ? least : (x > most ? most : x);
    Floats n = clamped * 1.44269504088896341f;
    n = (n + 12582912.0f) - 12582912.0f;  // to the nearest integer: 1.5 * 2^23 leaves no room for a fraction
    Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Floats power = (Floats)((__builtin_convertvector(n == n ? n : zero, Ints) + 127) << 23);
    return x < least ? zero : (x > most ? zero + __builtin_inff() : p * power);
}
inline float exponential(float x) { return exponential(x - Floats{})[0]; }

// tanh to about 1e-6 of it: near 0 by its series, since what the exponential gives would cancel.
inline float tanh_of(float x) {
    float square = x * x;
    if (square < 0.01f) return x * (1 - square * (1 / 3.0f - square * (2 / 15.0f)));
    return 1 - 2 / (1 + exponential(2 * x));
}

}  // namespace minirksc
