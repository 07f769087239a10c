/* What a block does between its matrix products, forward and backward, of bf16 on a CPU: one pass over memory in place
   of torch's many, all sums in fp32. cpu_kernels.py compiles it and puts it into torch's graph.

   Legend: n rows · d features · b sequences · t positions · h heads · c features of a head · v classes

   A bf16 is the upper half of a float. d and c are multiples of 16. Work is shared by OpenMP's threads (torch's own), by
   rows or by sequences; what is summed over rows is summed by each thread for itself and then by cpu_kernels.py. */

#include <omp.h>
#include <string.h>

#include "vectors.h"

#define EPS 1e-5f
#define INLINE static inline __attribute__((always_inline))


typedef uint16_t bf16;
typedef float vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t whole __attribute__((vector_size(LANES * 4), may_alias));
typedef uint32_t bits __attribute__((vector_size(LANES * 4), may_alias));
typedef bf16 narrow __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE vector at(const float *x) { return *(const vector *)x; }

INLINE void put(float *to, vector x) { *(vector *)to = x; }

INLINE vector all(float x) { return (vector){0} + x; }

INLINE vector up(const bf16 *x) { return (vector)(__builtin_convertvector(*(const narrow *)x, bits) << 16); }

/* To the nearest, ties to even; not a number stays none. */
INLINE void down(bf16 *to, vector x)
{
    bits raw = (bits)x, rounded = (raw + 0x7fff + (raw >> 16 & 1)) >> 16, number = (bits)(x == x);
    *(narrow *)to = __builtin_convertvector((rounded & number) | (0x7fc0 & ~number), narrow);
}

INLINE vector larger(vector a, vector b) { return (vector)(((whole)a & (a > b)) | ((whole)b & ~(a > b))); }

/* Sum, or the largest, of a vector's lanes; compilers would add them one after the other. */
#define ACROSS(NAME, EXPRESSION)                                                       \
    INLINE float NAME(vector a)                                                        \
    {                                                                                  \
        whole lane;                                                                    \
        for (int i = 0; i < LANES; i++) lane[i] = i;                                   \
        for (int step = LANES / 2; step; step /= 2) {                                  \
            vector b = __builtin_shuffle(a, lane ^ step);                              \
            a = EXPRESSION;                                                            \
        }                                                                              \
        return a[0];                                                                   \
    }
ACROSS(total, a + b)
ACROSS(largest, larger(a, b))

INLINE float dot(int64_t n, const float *a, const float *b)
{
    vector sum = {0};
    for (int64_t i = 0; i < n; i += LANES) sum += at(a + i) * at(b + i);
    return total(sum);
}

/* Mean and 1 / std of x (n,), which is `from` as floats; rms: the mean is taken to be 0. */
typedef struct { float mean, scale; } Moments;

INLINE Moments moments(int64_t n, float *x, const bf16 *from, int rms)
{
    vector sum = {0}, squares = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        vector wide = up(from + i);
        sum += wide;
        put(x + i, wide);
    }
    float mean = rms ? 0 : total(sum) / n;
    for (int64_t i = 0; i < n; i += LANES) squares += (at(x + i) - mean) * (at(x + i) - mean);
    return (Moments){mean, 1.0f / sqrtf(total(squares) / n + EPS)};
}

/* y (n, d) = norm(x) gain + bias; gain and bias may be null. */
void norm(int64_t n, int64_t d, const bf16 *x, const bf16 *gain, const bf16 *bias, int64_t rms, bf16 *y, int64_t threads)
{
#pragma omp parallel num_threads(threads)
    {
        float wide[d], gains[d], biases[d];
        for (int64_t i = 0; i < d; i += LANES) {
            put(gains + i, gain ? up(gain + i) : all(1));
            put(biases + i, bias ? up(bias + i) : all(0));
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n; row++) {
            Moments m = moments(d, wide, x + row * d, rms);
            for (int64_t i = 0; i < d; i += LANES)
                down(y + row * d + i, (at(wide + i) - m.mean) * m.scale * at(gains + i) + at(biases + i));
        }
    }
}

/* dx (n, d), and what each thread summed of the gain's and the bias's gradients, sums (threads, 2, d). */
void norm_back(int64_t n, int64_t d, const bf16 *x, const bf16 *gain, int64_t rms, const bf16 *dy, bf16 *dx,
               float *sums, int64_t threads)
{
#pragma omp parallel num_threads(threads)
    {
        float y[d], g[d], gains[d], *dgain = sums + omp_get_thread_num() * 2 * d, *dbias = dgain + d;
        for (int64_t i = 0; i < d; i += LANES) put(gains + i, gain ? up(gain + i) : all(1));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n; row++) {
            Moments m = moments(d, y, x + row * d, rms);
            vector sum = {0}, along = {0};
            for (int64_t i = 0; i < d; i += LANES) {
                vector own = (at(y + i) - m.mean) * m.scale, grad = up(dy + row * d + i);
                put(dgain + i, at(dgain + i) + grad * own);
                put(dbias + i, at(dbias + i) + grad);
                grad *= at(gains + i);
                sum += grad;
                along += grad * own;
                put(y + i, own);
                put(g + i, grad);
            }
            float mean = rms ? 0 : total(sum) / d, share = total(along) / d;
            for (int64_t i = 0; i < d; i += LANES)
                down(dx + row * d + i, m.scale * (at(g + i) - mean - at(y + i) * share));
        }
    }
}

/* y = max(x, 0)^2; n is a multiple of 16 */
void relu2(int64_t n, const bf16 *x, bf16 *y, int64_t threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        vector wide = up(x + i);
        down(y + i, (vector)((whole)(wide * wide) & ~(wide < 0))); /* not a number stays none */
    }
}

void relu2_back(int64_t n, const bf16 *x, const bf16 *dy, bf16 *dx, int64_t threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        vector wide = up(x + i);
        down(dx + i, 2 * (vector)((whole)wide & ~(wide < 0)) * up(dy + i));
    }
}

INLINE float one(bf16 x)
{
    union { uint32_t bits; float value; } wide = {(uint32_t)x << 16};
    return wide.value;
}

/* nats (n,) = log(sum(exp(logits))) - logits[id] of logits (n, v), not a number where there is no such id, and the
   logarithms, which the way back needs. */
void nats(int64_t n, int64_t v, const bf16 *logits, const int64_t *ids, float *nats, float *logs, int64_t threads)
{
    int64_t room = (v + LANES - 1) / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++) {
        float wide[room];
        for (int64_t i = 0; i < v; i++) wide[i] = one(logits[row * v + i]);
        for (int64_t i = v; i < room; i++) wide[i] = -INFINITY;
        vector best = at(wide), sum = {0};
        for (int64_t i = LANES; i < room; i += LANES) best = larger(at(wide + i), best);
        float most = largest(best), id = ids[row] < 0 || ids[row] >= v ? NAN : wide[ids[row]];
        for (int64_t i = 0; i < room; i++) wide[i] = exponential(wide[i] - most);
        for (int64_t i = 0; i < room; i += LANES) sum += at(wide + i);
        logs[row] = most + logf(total(sum));
        nats[row] = logs[row] - id;
    }
}

void nats_back(int64_t n, int64_t v, const bf16 *logits, const int64_t *ids, const float *logs, const float *dnats,
               bf16 *dlogits, int64_t threads)
{
    int64_t room = (v + LANES - 1) / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++) {
        float wide[room];
        bf16 narrow[room];
        for (int64_t i = 0; i < v; i++) wide[i] = dnats[row] * exponential(one(logits[row * v + i]) - logs[row]);
        for (int64_t i = v; i < room; i++) wide[i] = 0;
        if (ids[row] >= 0 && ids[row] < v) wide[ids[row]] -= dnats[row];
        for (int64_t i = 0; i < room; i += LANES) down(narrow + i, at(wide + i));
        memcpy(dlogits + row * v, narrow, v * sizeof(bf16));
    }
}

/* sums (v, d), zeros before: the gradient of a table whose rows ids (n,) gave dy (n, d). */
void embedding_back(int64_t n, int64_t d, const int64_t *ids, const bf16 *dy, float *sums, int64_t threads)
{
    int64_t parts = d / 16 < threads ? d / 16 : threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = d / 16 * part / parts * 16, end = d / 16 * (part + 1) / parts * 16;
        for (int64_t row = 0; row < n; row++)
            for (int64_t i = first; i < end; i += LANES) {
                float *to = sums + ids[row] * d + i;
                put(to, at(to) + up(dy + row * d + i));
            }
    }
}

/* What is done to queries and keys (c,) at one position before they meet. */
typedef struct {
    int64_t b, t, h, c;
    const float *cos, *sin; /* (t, c / 2), or null */
    int64_t qk_norm;
    float query_multiplier, scale; /* scale: of scores */
    int64_t threads;
} Heads;

/* x (c,) of `from` at a position: normed, turned, multiplied. normed is what was turned; 1 / std comes back. */
INLINE float prepare(const Heads *of, int64_t c, int64_t position, float *x, float *normed, const bf16 *from,
                     float multiplier)
{
    int64_t half = c / 2;
    Moments m = {0, 1};
    if (of->qk_norm)
        m = moments(c, normed, from, 0);
    else
        for (int64_t i = 0; i < c; i += LANES) put(normed + i, up(from + i));
    for (int64_t i = 0; i < c; i += LANES) put(normed + i, (at(normed + i) - m.mean) * m.scale);
    if (of->cos) {
        const float *cos = of->cos + position * half, *sin = of->sin + position * half;
#pragma omp simd
        for (int64_t i = 0; i < half; i++) {
            float a = normed[i], b = normed[half + i];
            x[i] = (a * cos[i] - b * sin[i]) * multiplier;
            x[half + i] = (a * sin[i] + b * cos[i]) * multiplier;
        }
    } else
        for (int64_t i = 0; i < c; i += LANES) put(x + i, at(normed + i) * multiplier);
    return m.scale;
}

/* The gradient of what `prepare` made, dx, becomes that of what it was given, which goes to `to`. */
INLINE void prepare_back(const Heads *of, int64_t c, int64_t position, float *dx, const float *normed, float scale,
                         float multiplier, bf16 *to)
{
    int64_t half = c / 2;
    if (of->cos) {
        const float *cos = of->cos + position * half, *sin = of->sin + position * half;
#pragma omp simd
        for (int64_t i = 0; i < half; i++) {
            float a = dx[i], b = dx[half + i];
            dx[i] = a * cos[i] + b * sin[i];
            dx[half + i] = b * cos[i] - a * sin[i];
        }
    }
    vector sum = {0}, along = {0};
    float mean = 0, share = 0, factor = multiplier * scale;
    if (of->qk_norm) {
        for (int64_t i = 0; i < c; i += LANES) {
            sum += at(dx + i);
            along += at(dx + i) * at(normed + i);
        }
        mean = total(sum) / c, share = total(along) / c;
    }
    for (int64_t i = 0; i < c; i += LANES) down(to + i, factor * (at(dx + i) - mean - at(normed + i) * share));
}

/* q, k, v (b, h, t, c) of one position of qkv (b, t, 3, h, c): queries and keys normed, multiplied and turned. */
INLINE void turn_of(const Heads *of, int64_t c, int64_t row, const bf16 *qkv, bf16 *q, bf16 *k, bf16 *v)
{
    int64_t b = row / of->t, position = row % of->t, d = of->h * c;
    for (int64_t head = 0; head < of->h; head++) {
        const bf16 *from = qkv + row * 3 * d + head * c;
        int64_t to = ((b * of->h + head) * of->t + position) * c;
        float x[c], normed[c];
        prepare(of, c, position, x, normed, from, of->query_multiplier);
        for (int64_t i = 0; i < c; i += LANES) down(q + to + i, at(x + i));
        prepare(of, c, position, x, normed, from + d, 1);
        for (int64_t i = 0; i < c; i += LANES) down(k + to + i, at(x + i));
        memcpy(v + to, from + 2 * d, c * sizeof(bf16));
    }
}

INLINE void turn_back_of(const Heads *of, int64_t c, int64_t row, const bf16 *qkv, const bf16 *dq, const bf16 *dk,
                         const bf16 *dv, bf16 *dqkv)
{
    int64_t b = row / of->t, position = row % of->t, d = of->h * c;
    for (int64_t head = 0; head < of->h; head++) {
        int64_t to = row * 3 * d + head * c, from = ((b * of->h + head) * of->t + position) * c;
        for (int keys = 0; keys < 2; keys++) {
            float dx[c], x[c], normed[c], multiplier = keys ? 1 : of->query_multiplier;
            float scale = prepare(of, c, position, x, normed, qkv + to + keys * d, multiplier);
            for (int64_t i = 0; i < c; i += LANES) put(dx + i, up((keys ? dk : dq) + from + i));
            prepare_back(of, c, position, dx, normed, scale, multiplier, dqkv + to + keys * d);
        }
        memcpy(dqkv + to + 2 * d, dv + from, c * sizeof(bf16));
    }
}

/* to (c,) = sum over j < n of factors[j * step] x[j]. */
INLINE void combine(int64_t c, int64_t n, float *to, const float *factors, int64_t step, const float *x)
{
    for (int64_t from = 0; from < c; from += LANES) {
        vector sum = {0};
        for (int64_t j = 0; j < n; j++) sum += factors[j * step] * at(x + j * c + from);
        put(to + from, sum);
    }
}

/* All positions of a head: queries, keys and values (t, c), and the weights (t, room) of their looks at themselves and
   those before; 0 elsewhere. Step by step for all of them, so that no sum waits for the one before it. */
INLINE void look(const Heads *of, int64_t t, int64_t c, int64_t room, const bf16 *from, float *q, float *k, float *v,
                 float *normed, float *scales, float *weights)
{
    int64_t d = of->h * c;
    float sums[t];
    for (int64_t i = 0; i < t; i++, from += 3 * d) {
        scales[2 * i] = prepare(of, c, i, q + i * c, normed + 2 * i * c, from, of->query_multiplier);
        scales[2 * i + 1] = prepare(of, c, i, k + i * c, normed + (2 * i + 1) * c, from + d, 1);
        for (int64_t j = 0; j < c; j += LANES) put(v + i * c + j, up(from + 2 * d + j));
    }
    for (int64_t i = 0; i < t * room; i += LANES) put(weights + i, all(-INFINITY));
    for (int64_t i = 0; i < t; i++)
        for (int64_t j = 0; j <= i; j++) weights[i * room + j] = of->scale * dot(c, q + i * c, k + j * c);
    for (int64_t i = 0; i < t; i++) {
        vector best = at(weights + i * room);
        for (int64_t j = LANES; j < room; j += LANES) best = larger(at(weights + i * room + j), best);
        float most = largest(best);
        for (int64_t j = 0; j < room; j += LANES) put(weights + i * room + j, at(weights + i * room + j) - most);
    }
    for (int64_t i = 0; i < t * room; i++) weights[i] = exponential(weights[i]);
    for (int64_t i = 0; i < t; i++) {
        vector sum = {0};
        for (int64_t j = 0; j < room; j += LANES) sum += at(weights + i * room + j);
        sums[i] = total(sum);
    }
    for (int64_t i = 0; i < t; i++) sums[i] = 1 / sums[i];
    for (int64_t i = 0; i < t; i++)
        for (int64_t j = 0; j < room; j += LANES) put(weights + i * room + j, at(weights + i * room + j) * sums[i]);
}

/* out (b, t, h, c) of one sequence: causal attention, of qkv (b, t, 3, h, c). */
INLINE void attention_of(const Heads *of, int64_t t, int64_t c, int64_t b, const bf16 *qkv, bf16 *out)
{
    int64_t h = of->h, d = h * c, room = (t + LANES - 1) / LANES * LANES;
    for (int64_t head = 0; head < h; head++) {
        float q[t * c], k[t * c], v[t * c], normed[2 * t * c], scales[2 * t], weights[t * room], mixed[c];
        look(of, t, c, room, qkv + b * t * 3 * d + head * c, q, k, v, normed, scales, weights);
        for (int64_t i = 0; i < t; i++) {
            combine(c, i + 1, mixed, weights + i * room, 1, v);
            for (int64_t j = 0; j < c; j += LANES) down(out + (b * t + i) * d + head * c + j, at(mixed + j));
        }
    }
}

INLINE void attention_back_of(const Heads *of, int64_t t, int64_t c, int64_t b, const bf16 *qkv, const bf16 *dout,
                              bf16 *dqkv)
{
    int64_t h = of->h, d = h * c, room = (t + LANES - 1) / LANES * LANES;
    for (int64_t head = 0; head < h; head++) {
        float q[t * c], k[t * c], v[t * c], normed[2 * t * c], scales[2 * t], weights[t * room];
        float dmixed[t * c], dscores[t * room], dx[c];
        int64_t start = b * t * 3 * d + head * c;
        look(of, t, c, room, qkv + start, q, k, v, normed, scales, weights);
        for (int64_t i = 0; i < t; i++)
            for (int64_t j = 0; j < c; j += LANES)
                put(dmixed + i * c + j, up(dout + (b * t + i) * d + head * c + j));
        for (int64_t i = 0; i < t * room; i += LANES) put(dscores + i, all(0));
        for (int64_t i = 0; i < t; i++)
            for (int64_t j = 0; j <= i; j++) dscores[i * room + j] = dot(c, dmixed + i * c, v + j * c);
        for (int64_t i = 0; i < t; i++) {
            float *to = dscores + i * room, *weight = weights + i * room, along = dot(room, weight, to);
            for (int64_t j = 0; j < room; j += LANES)
                put(to + j, of->scale * at(weight + j) * (at(to + j) - along));
        }
        for (int64_t i = 0; i < t; i++) {
            bf16 *to = dqkv + start + i * 3 * d;
            const float *own = normed + 2 * i * c;
            combine(c, i + 1, dx, dscores + i * room, 1, k);
            prepare_back(of, c, i, dx, own, scales[2 * i], of->query_multiplier, to);
            combine(c, t - i, dx, dscores + i * room + i, room, q + i * c);
            prepare_back(of, c, i, dx, own + c, scales[2 * i + 1], 1, to + d);
            combine(c, t - i, dx, weights + i * room + i, room, dmixed + i * c);
            for (int64_t j = 0; j < c; j += LANES) down(to + 2 * d + j, at(dx + j));
        }
    }
}

/* Usual widths are loops of known length, which compilers unroll. */
#define BY_WIDTH(CALL)                   \
    switch (of->c) {                     \
    case 32: CALL(32); break;            \
    case 64: CALL(64); break;            \
    case 128: CALL(128); break;          \
    default: CALL(of->c);                \
    }
void turn(const Heads *of, const bf16 *qkv, bf16 *q, bf16 *k, bf16 *v)
{
#define TURN(C) turn_of(of, C, row, qkv, q, k, v)
#pragma omp parallel for num_threads(of->threads) schedule(static)
    for (int64_t row = 0; row < of->b * of->t; row++) BY_WIDTH(TURN)
}

void turn_back(const Heads *of, const bf16 *qkv, const bf16 *dq, const bf16 *dk, const bf16 *dv, bf16 *dqkv)
{
#define TURN_BACK(C) turn_back_of(of, C, row, qkv, dq, dk, dv, dqkv)
#pragma omp parallel for num_threads(of->threads) schedule(static)
    for (int64_t row = 0; row < of->b * of->t; row++) BY_WIDTH(TURN_BACK)
}

void attention(const Heads *of, const bf16 *qkv, bf16 *out)
{
#define ATTENTION(C) attention_of(of, of->t, C, b, qkv, out)
#pragma omp parallel for num_threads(of->threads) schedule(static)
    for (int64_t b = 0; b < of->b; b++) BY_WIDTH(ATTENTION)
}

void attention_back(const Heads *of, const bf16 *qkv, const bf16 *dout, bf16 *dqkv)
{
#define ATTENTION_BACK(C) attention_back_of(of, of->t, C, b, qkv, dout, dqkv)
#pragma omp parallel for num_threads(of->threads) schedule(static)
    for (int64_t b = 0; b < of->b; b++) BY_WIDTH(ATTENTION_BACK)
}
