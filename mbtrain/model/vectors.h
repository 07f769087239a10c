#include <math.h>
#include <stdint.h>

/* Floats in the widest vector of the machine. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

/* e^x to 2 units in the last place, 0 below -87; unlike libm's, compilers make vectors of it. */
static inline float exponential(float x)
{
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float value; } power;
    n = n < -126.0f ? -126.0f : n > 127.0f ? 127.0f : n;
    power.bits = ((int32_t)n + 127) << 23;
    return x < -87.0f ? 0.0f : p * power.value;
}
