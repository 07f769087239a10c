/* The next byte of a batch of rows, as Decoder computes it in evaluation with fp32 weights: megabyte.py's eqs. 1 to 6
   at one position, from the caches of what came before. native.py compiles it, packs weights, and says what it covers.

   Legend: b rows · n bytes so far · d features · v vocabulary · h heads · c features of a head · f feed-forward
           j position of a stage inside the coarser stage's position · k features that a product sums over

   A matrix (out, k) is packed in panels of 64 outputs, (out / 64, k, 64), the last one filled up with zeros. A panel's
   product with a few rows stays in registers, so that for one row the weights are read once from end to end, at the
   speed of the cache that they lie in, and for many rows multiplications are the limit. */

#include <string.h>

#include "vectors.h"

#define PANEL 64
#define EPS 1e-5f

/* A product holds TILE rows of VECTORS sums in registers, of which there are 32 or 16. Vectors wider than the machine's
   would go through memory: 20 times slower. */
#define VECTORS 4
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE 6
#else
#define TILE 3
#endif
#define STRIP (VECTORS * LANES)

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

typedef struct {
    const float *attn_gain, *attn_bias, *ffn_gain, *ffn_bias; /* null where there are none */
    const float *qkv, *qkv_bias, *out, *out_bias, *up, *up_bias, *down, *down_bias;
    float *keys, *values;         /* (b, h, room, c) */
    float *attn_last, *ffn_last;  /* (b, d), for token shift */
} Layer;

typedef struct {
    int64_t coarsest, patch_size, slots, layers, d, d_byte, heads, f, room, window; /* slots 0: no end; window 0: all */
    int64_t slice; /* features that one position gets of the coarser stage's output; 0: nothing */
    const float *embed, *pad, *positions, *project, *cos, *sin, *final_gain, *final_bias;
    float *output; /* (b, d) of the present position */
    Layer *layer;
    float query_multiplier, branch_multiplier;
} Stage;

typedef struct {
    int64_t rows, stages, seq_len, vocab, rms, qk_norm, token_shift, activation, final_norm;
    const float *unembedding;
    int64_t *ids;       /* (b, seq_len) */
    float *scratch;     /* b rows of everything wide that is needed for a moment */
    Stage *stage;
    float logit_multiplier;
} Model;

enum { RELU, RELU2, GELU, SILU, SWIGLU };

/* Of out (rows, 64) = x (rows, k) panel (k, 64) + bias the first `width` columns; or out += multiplier (..). */
static inline __attribute__((always_inline)) void panel_product(
    const int rows, float *out, int64_t out_stride, const float *x, int64_t x_stride, const float *panel, int64_t k,
    const float *bias, int add, float multiplier, int64_t width)
{
    for (int64_t from = 0; from < width; from += STRIP) {
        vector sum[TILE][VECTORS];
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < VECTORS; i++) sum[r][i] = (vector){0};
        for (int64_t at = 0; at < k; at++) {
            const vector *weights = (const vector *)(panel + at * PANEL + from);
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < VECTORS; i++) sum[r][i] += x[r * x_stride + at] * weights[i];
        }
        int64_t count = width - from < STRIP ? width - from : STRIP;
        for (int r = 0; r < rows; r++) {
            float done[STRIP], *to = out + r * out_stride + from;
            memcpy(done, sum[r], sizeof done);
            if (bias)
                for (int64_t i = 0; i < count; i++) done[i] += bias[from + i];
            if (add)
                for (int64_t i = 0; i < count; i++) to[i] += multiplier * done[i];
            else
                memcpy(to, done, count * sizeof(float));
        }
    }
}

/* out (b, n) = x (b, k) weight^T + bias, or out += multiplier (..); weight packed. */
static void linear(float *out, int64_t n, const float *x, int64_t x_stride, int64_t k, const float *weight,
                   const float *bias, int64_t rows, int add, float multiplier)
{
    int64_t tiles = (rows + TILE - 1) / TILE;
    for (int64_t first = 0; first < n; first += PANEL, weight += k * PANEL) {
        int64_t width = n - first < PANEL ? n - first : PANEL;
        for (int64_t t = 0; t < tiles; t++) { /* tiles of almost the same height */
            int64_t row = t * rows / tiles, height = (t + 1) * rows / tiles - row;
#define PRODUCT(HEIGHT)                                                                                        \
    case HEIGHT:                                                                                               \
        panel_product(HEIGHT, out + row * n + first, n, x + row * x_stride, x_stride, weight, k,               \
                      bias ? bias + first : 0, add, multiplier, width);                                        \
        break;
            switch (height) {
                PRODUCT(1) PRODUCT(2) PRODUCT(3)
#if TILE > 3
                PRODUCT(4) PRODUCT(5) PRODUCT(6)
#endif
            }
        }
    }
}

static void norm(float *out, const float *x, int64_t d, const float *gain, const float *bias, int rms)
{
    float mean = 0, square = 0;
    if (!rms) {
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < d; i++) mean += x[i];
        mean /= d;
    }
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < d; i++) square += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf(square / d + EPS);
    for (int64_t i = 0; i < d; i++) out[i] = (x[i] - mean) * scale;
    if (gain)
        for (int64_t i = 0; i < d; i++) out[i] *= gain[i];
    if (bias)
        for (int64_t i = 0; i < d; i++) out[i] += bias[i];
}

/* Token shift: the second half of x (d) becomes that of the position before; `last` (d) keeps x. */
static void shift(float *x, float *last, int64_t d, int64_t j)
{
    for (int64_t i = 0; i < d; i++) {
        float before = j ? last[i] : 0.0f;
        last[i] = x[i];
        if (i >= d / 2) x[i] = before;
    }
}

static void rotate(float *x, int64_t c, const float *cos, const float *sin)
{
    for (int64_t i = 0; i < c / 2; i++) {
        float a = x[i], b = x[i + c / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + c / 2] = a * sin[i] + b * cos[i];
    }
}

/* One head's mixture of values (n, c) by softmax(keys (n, c) . q); scores holds n. */
static void attend(float *mixed, const float *q, const float *keys, const float *values, int64_t n, int64_t c,
                   float *scores)
{
    float scale = 1.0f / sqrtf(c), most = -INFINITY, sum = 0;
    for (int64_t t = 0; t < n; t++) {
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (int64_t i = 0; i < c; i++) score += q[i] * keys[t * c + i];
        scores[t] = score * scale;
        most = scores[t] > most ? scores[t] : most;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < n; t++) {
        scores[t] = exponential(scores[t] - most);
        sum += scores[t];
    }
    memset(mixed, 0, c * sizeof(float));
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < c; i++) mixed[i] += scores[t] * values[t * c + i];
    for (int64_t i = 0; i < c; i++) mixed[i] /= sum;
}

/* x (2 f or f) -> the first f of it; f is the width after it. */
static void activate(float *x, int64_t f, int64_t kind)
{
    switch (kind) {
    case RELU:
        for (int64_t i = 0; i < f; i++) x[i] = x[i] > 0 ? x[i] : 0;
        break;
    case RELU2:
        for (int64_t i = 0; i < f; i++) x[i] = x[i] > 0 ? x[i] * x[i] : 0;
        break;
    case GELU:
        for (int64_t i = 0; i < f; i++) x[i] *= 0.5f * (1.0f + erff(x[i] * 0.70710678f));
        break;
    default: /* swiglu: the first half gates the second */
        for (int64_t i = 0; i < f; i++) x[i] /= 1.0f + exponential(-x[i]);
        if (kind == SWIGLU)
            for (int64_t i = 0; i < f; i++) x[i] *= x[f + i];
    }
}

/* x (b, d) through one block at position j. */
static void block(const Model *m, const Stage *s, const Layer *l, float *x, int64_t j, float *scratch)
{
    const int64_t b = m->rows, d = s->d, c = d / s->heads, up = (m->activation == SWIGLU ? 2 : 1) * s->f;
    const int64_t first = s->window && j + 1 > s->window ? j + 1 - s->window : 0;
    float *normed = scratch, *wide = normed + b * d, *scores = wide + b * (up > 3 * d ? up : 3 * d);

    for (int64_t r = 0; r < b; r++) {
        norm(normed + r * d, x + r * d, d, l->attn_gain, l->attn_bias, m->rms);
        if (m->token_shift) shift(normed + r * d, l->attn_last + r * d, d, j);
    }
    linear(wide, 3 * d, normed, d, d, l->qkv, l->qkv_bias, b, 0, 1);
    for (int64_t r = 0; r < b; r++)
        for (int64_t h = 0; h < s->heads; h++) {
            float *q = wide + r * 3 * d + h * c, *k = q + d;
            float *keys = l->keys + (r * s->heads + h) * s->room * c;
            float *values = l->values + (r * s->heads + h) * s->room * c;
            if (m->qk_norm) {
                norm(q, q, c, 0, 0, 0);
                norm(k, k, c, 0, 0, 0);
            }
            if (s->cos) {
                rotate(q, c, s->cos + j * (c / 2), s->sin + j * (c / 2));
                rotate(k, c, s->cos + j * (c / 2), s->sin + j * (c / 2));
            }
            for (int64_t i = 0; i < c; i++) q[i] *= s->query_multiplier;
            memcpy(keys + j * c, k, c * sizeof(float));
            memcpy(values + j * c, q + 2 * d, c * sizeof(float));
            attend(normed + r * d + h * c, q, keys + first * c, values + first * c, j + 1 - first, c, scores);
        }
    linear(x, d, normed, d, d, l->out, l->out_bias, b, 1, s->branch_multiplier);
    for (int64_t r = 0; r < b; r++) {
        norm(normed + r * d, x + r * d, d, l->ffn_gain, l->ffn_bias, m->rms);
        if (m->token_shift) shift(normed + r * d, l->ffn_last + r * d, d, j);
    }
    linear(wide, up, normed, d, d, l->up, l->up_bias, b, 0, 1);
    for (int64_t r = 0; r < b; r++) activate(wide + r * up, s->f, m->activation);
    linear(x, d, wide, up, s->f, l->down, l->down_bias, b, 1, s->branch_multiplier);
}

/* One stage's position j, the patch before which ends at byte n, from the coarser stage's output (b, coarse_d). */
static void advance(const Model *m, const Stage *s, int64_t j, int64_t n, const float *coarse, int64_t coarse_d)
{
    const int64_t d = s->d;
    float *x = s->output;
    for (int64_t r = 0; r < m->rows; r++, x += d) {
        if (j == 0) {
            memcpy(x, s->pad, d * sizeof(float));
        } else {
            memset(x, 0, d * sizeof(float));
            for (int64_t p = 0; p < s->patch_size; p++) {
                int64_t at = n - s->patch_size + p;
                const float *byte = s->embed + m->ids[r * m->seq_len + at] * s->d_byte;
                memcpy(x + p * s->d_byte, byte, s->d_byte * sizeof(float));
                if (s->coarsest && s->positions)
                    for (int64_t i = 0; i < s->d_byte; i++) x[p * s->d_byte + i] += s->positions[at * s->d_byte + i];
            }
        }
        if (!s->coarsest && s->positions)
            for (int64_t i = 0; i < d; i++) x[i] += s->positions[j * d + i];
    }
    if (s->slice) linear(s->output, d, coarse + j * s->slice, coarse_d, s->slice, s->project, 0, m->rows, 1, 1);
    for (int64_t i = 0; i < s->layers; i++) block(m, s, s->layer + i, s->output, j, m->scratch);
    if (m->final_norm)
        for (int64_t r = 0; r < m->rows; r++)
            norm(s->output + r * d, s->output + r * d, d, s->final_gain, s->final_bias, m->rms);
}

/* Bring every stage that moves on at byte n, having been brought to n - 1; logits (b, v) of byte n. */
void next_byte(const Model *m, int64_t n, float *logits)
{
    for (int64_t i = 0; i < m->stages; i++) {
        const Stage *s = m->stage + i;
        int64_t inside = s->slots ? n % (s->slots * s->patch_size) : n;
        if (inside % s->patch_size == 0)
            advance(m, s, inside / s->patch_size, n, i ? s[-1].output : 0, i ? s[-1].d : 0);
    }
    const Stage *last = m->stage + m->stages - 1;
    if (m->logit_multiplier != 1) {
        for (int64_t i = 0; i < m->rows * last->d; i++) m->scratch[i] = last->output[i] * m->logit_multiplier;
    }
    linear(logits, m->vocab, m->logit_multiplier != 1 ? m->scratch : last->output, last->d, last->d, m->unembedding, 0,
           m->rows, 0, 1);
}

/* A row's choice as sample.choose makes it without cuts: the point `uniform` in [0, 1) of the distribution at this
   temperature; 0 takes the likeliest. Of the logits so many are possible; p has room for them. */
static int64_t choose(const float *logits, int64_t possible, float temperature, double uniform, float *p)
{
    int64_t at = 0;
    double total = 0, sum = 0;
    for (int64_t i = 1; i < possible; i++) at = logits[i] > logits[at] ? i : at;
    if (temperature == 0) return at;
    for (int64_t i = 0; i < possible; i++) p[i] = exponential((logits[i] - logits[at]) / temperature);
    for (int64_t i = 0; i < possible; i++) total += p[i];
    for (at = 0; at < possible - 1; at++) /* scaled by the whole sum: rounding lets no point fall behind the last */
        if ((sum += p[at]) > uniform * total) break;
    return at;
}

/* Choose `steps` bytes from byte n on, made (b, steps), by points (b, steps); logits (b, v) are those of byte n,
   and at the end those of byte n + steps, which the row must have room for. */
void run(const Model *m, int64_t n, int64_t steps, int64_t possible, float temperature, const double *points,
         float *logits, int64_t *made)
{
    for (int64_t t = 0; t < steps; t++, n++) {
        for (int64_t r = 0; r < m->rows; r++) {
            double uniform = points[r * steps + t];
            made[r * steps + t] = choose(logits + r * m->vocab, possible, temperature, uniform, m->scratch);
            m->ids[r * m->seq_len + n] = made[r * steps + t];
        }
        next_byte(m, n + 1, logits);
    }
}
