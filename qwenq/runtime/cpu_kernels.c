/* Matmuls on x86 CPUs straight from packed codes, and from 16-bit weights, for few activation rows.

   Shapes: M rows of activations, I inputs, O outputs in blocks of 16, G groups of K columns (a multiple of 16, at most
   256). Activations are rounded to 16-bit integers with one scale a group and row: finer than bfloat16, and products
   with codes of 8 bits stay within 32 bits (256 * 128 * 32767 < 2**31). Sums of a group are exact; groups are added in
   float32 in a fixed order, so the same input gives the same bits whatever the number of threads.

   Codes of a block, less 8 or 128:
   - 4 bits: [I / 8][16 outputs] words of 32 bits; of an output's eight columns, column 2 s is nibble s and column
     2 s + 1 nibble 4 + s, so that a shift by 4 s and a mask leave two columns in two 16-bit halves;
   - 8 bits: [I / 2][16 outputs][2 columns] signed bytes.
   Scales (float16 or float32) and offsets (float32, or none) of a block: [G][16]. w = scale * code - offset. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 16 /* outputs */
#define PAGE 4096 /* bytes; how far ahead codes are asked for, since hardware reads ahead within a page only */
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512BW__) && defined(__AVX512VL__)
typedef __m512i words;
typedef __m512 floats;
#define VECTORS 1 /* of a block's outputs */
#define MOST 8    /* rows of activations at a time: what registers hold */
#define LANES 16
#define load_words(p) _mm512_loadu_si512((const void *)(p))
#define load_bytes(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define load_halves(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define load_brain(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define load_floats(p) _mm512_loadu_ps(p)
#define store_floats(p, v) _mm512_storeu_ps(p, v)
#define masked(v) _mm512_and_si512(v, _mm512_set1_epi32(0x000f000f))
#define shifted(v, n) _mm512_srli_epi32(v, n)
#define all_words(x) _mm512_set1_epi32(x)
#define all_floats(x) _mm512_set1_ps(x)
#define sum_words(a, b) _mm512_add_epi32(a, b)
#define less_words(a, b) _mm512_sub_epi32(a, b)
#define half_words(v) _mm512_srai_epi32(v, 1)
#define to_floats(v) _mm512_cvtepi32_ps(v)
#define to_words(v) _mm512_cvtps_epi32(v) /* to nearest, ties to even */
#define store_shorts(p, v) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtsepi32_epi16(v))
#define exponents(v) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(127)), 23)) /* 2^v */
#define smaller(a, b) _mm512_min_ps(a, b) /* b where it is not a number */
#define larger(a, b) _mm512_max_ps(a, b)
#define times(a, b) _mm512_mul_ps(a, b)
#define times_plus(a, b, c) _mm512_fmadd_ps(a, b, c)
#define total(v) _mm512_reduce_add_ps(v)
#ifdef __AVX512VNNI__
#define dot(sum, w, x) _mm512_dpwssd_epi32(sum, w, x)
#else
#define dot(sum, w, x) _mm512_add_epi32(sum, _mm512_madd_epi16(w, x))
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
typedef __m256i words;
typedef __m256 floats;
#define VECTORS 2
#define MOST 4
#define LANES 8
#define load_words(p) _mm256_loadu_si256((const __m256i *)(p))
#define load_bytes(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define load_halves(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define load_brain(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define load_floats(p) _mm256_loadu_ps(p)
#define store_floats(p, v) _mm256_storeu_ps(p, v)
#define masked(v) _mm256_and_si256(v, _mm256_set1_epi32(0x000f000f))
#define shifted(v, n) _mm256_srli_epi32(v, n)
#define all_words(x) _mm256_set1_epi32(x)
#define all_floats(x) _mm256_set1_ps(x)
#define sum_words(a, b) _mm256_add_epi32(a, b)
#define less_words(a, b) _mm256_sub_epi32(a, b)
#define half_words(v) _mm256_srai_epi32(v, 1)
#define to_floats(v) _mm256_cvtepi32_ps(v)
#define to_words(v) _mm256_cvtps_epi32(v)
#define store_shorts(p, v) \
    _mm_storeu_si128((__m128i *)(p), _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)))
#define exponents(v) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(v, _mm256_set1_epi32(127)), 23))
#define smaller(a, b) _mm256_min_ps(a, b)
#define larger(a, b) _mm256_max_ps(a, b)
#define times(a, b) _mm256_mul_ps(a, b)
#define times_plus(a, b, c) _mm256_fmadd_ps(a, b, c)
#ifdef __AVXVNNI__
#define dot(sum, w, x) _mm256_dpwssd_avx_epi32(sum, w, x)
#else
#define dot(sum, w, x) _mm256_add_epi32(sum, _mm256_madd_epi16(w, x))
#endif
INLINE float total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#else
#error "neither AVX-512 nor AVX2 with FMA and F16C"
#endif

typedef union {
    float f;
    uint32_t u;
} bits32;

INLINE float from_brain(uint16_t b) {
    bits32 v = {.u = (uint32_t)b << 16};
    return v.f;
}

INLINE uint16_t to_brain(float f) { /* to nearest, ties to even */
    bits32 v = {.f = f};
    if ((v.u & 0x7fffffff) > 0x7f800000) return (uint16_t)(v.u >> 16 | 64);
    return (uint16_t)((v.u + 0x7fff + (v.u >> 16 & 1)) >> 16);
}

/* A linear: packed codes with their scales and offsets, or (16 bits) weights [O, I] in bfloat16 or, if `halves`,
   float16. `order`: which column of the input each of its columns takes, or none. */
typedef struct {
    const void *weight, *scales;
    const float *offsets;
    const uint16_t *bias;
    const int64_t *order;
    int64_t inputs, outputs, group, bits, halves;
} linear;

/* Rows of activations in 16-bit integers, two columns a word: [I / 2][rows]; their scales and sums: [G][rows]. */
typedef struct {
    int32_t *pairs;
    float *scales;
    int32_t *sums;
} rounded;

static rounded in_scratch(char *scratch, const linear *w, int64_t rows) {
    rounded r = {(int32_t *)scratch, (float *)(scratch + 2 * w->inputs * rows), 0};
    r.sums = (int32_t *)(r.scales + w->inputs / w->group * rows);
    return r;
}

/* A group's values as multiples of its scale, and their sum. */
static int32_t round_group(const float *values, int64_t group, float back, int16_t *whole) {
    int32_t sum = 0;
    for (int64_t k = 0; k < group; k += LANES)
        store_shorts(whole + k, to_words(times(load_floats(values + k), all_floats(back))));
    for (int64_t k = 0; k < group; k++) sum += whole[k];
    return sum;
}

static void round_rows(const uint16_t *x, int64_t rows, int64_t taken, const linear *w, rounded r) {
    int64_t group = w->group;
    for (int64_t m = 0; m < rows; m++) {
        for (int64_t g = 0; g < w->inputs / group; g++) {
            uint16_t from[256] = {0}, most = 0;
            float values[256];
            int16_t whole[256];
            for (int64_t k = 0, at = m * w->inputs, first = g * group; m < taken && k < group; k++)
                from[k] = x[at + (w->order ? w->order[first + k] : first + k)];
            for (int64_t k = 0; k < group; k++) {
                uint16_t size = from[k] & 0x7fff;
                most = size > most ? size : most;
                values[k] = from_brain(from[k]);
            }
            int bad = most >= 0x7f80; /* infinite, or not a number: so are the outputs */
            float largest = from_brain(most);
            r.sums[g * rows + m] = round_group(values, group, !bad && most ? 32767.0f / largest : 0, whole);
            r.scales[g * rows + m] = bad ? NAN : largest / 32767.0f;
            for (int64_t k = 0; k < group / 2; k++)
                memcpy(r.pairs + (g * group / 2 + k) * rows + m, whole + 2 * k, sizeof(int32_t));
        }
    }
}

/* A block's outputs for `rows` rows: [rows][16]. With one row, four sums are under way at a time, and memory is the
   limit. */
INLINE void block_product(const uint8_t *codes, const char *scales, const float *offsets, rounded r, int64_t inputs,
                          int64_t group, const int bits, const int halves, const int rows, float *out) {
    const int chains = rows == 1 ? 4 : rows == 2 ? 2 : 1;
    floats y[MOST][VECTORS];
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < VECTORS; v++) y[m][v] = all_floats(0);
    for (int64_t g = 0; g < inputs / group; g++) {
        words sum[MOST][VECTORS][4];
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < VECTORS; v++)
                for (int c = 0; c < chains; c++)
                    sum[m][v][c] = all_words(bits == 4 && c == 0 ? -8 * r.sums[g * rows + m] : 0);
        const int32_t *x = r.pairs + g * group / 2 * rows;
        for (int64_t k = 0; k < group; k += 8, x += 4 * rows) {
            for (int at = 0; rows == 1 && at < BLOCK * bits; at += 64)
                _mm_prefetch((const char *)codes + k * BLOCK * bits / 8 + at + PAGE, _MM_HINT_T0);
            for (int v = 0; v < VECTORS; v++) {
                if (bits == 4) {
                    words w = load_words(codes + (k * BLOCK / 2) + v * LANES * 4);
                    for (int s = 0; s < 4; s++) {
                        words two = masked(s ? shifted(w, 4 * s) : w);
                        for (int m = 0; m < rows; m++)
                            sum[m][v][s % chains] = dot(sum[m][v][s % chains], two, all_words(x[s * rows + m]));
                    }
                } else {
                    for (int s = 0; s < 4; s++) {
                        words two = load_bytes(codes + (k + 2 * s) * BLOCK + v * LANES * 2);
                        for (int m = 0; m < rows; m++)
                            sum[m][v][s % chains] = dot(sum[m][v][s % chains], two, all_words(x[s * rows + m]));
                    }
                }
            }
        }
        codes += group * BLOCK * bits / 8;
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = g * BLOCK + v * LANES;
            floats scale = halves ? load_halves(scales + 2 * at) : load_floats((const float *)scales + at);
            for (int m = 0; m < rows; m++) {
                words all = sum[m][v][0];
                for (int c = 1; c < chains; c++) all = sum_words(all, sum[m][v][c]);
                floats step = all_floats(r.scales[g * rows + m]);
                y[m][v] = times_plus(times(to_floats(all), scale), step, y[m][v]);
                if (offsets)
                    y[m][v] = times_plus(load_floats(offsets + at),
                                         all_floats(-r.scales[g * rows + m] * (float)r.sums[g * rows + m]), y[m][v]);
            }
        }
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < VECTORS; v++) store_floats(out + m * BLOCK + v * LANES, y[m][v]);
}

#define CASE(B, H, R) \
    case (B) * 100 + (H) * 10 + (R): block_product(codes, scales, offsets, r, inputs, group, B, H, R, out); break
#if MOST == 8
#define CASES(B, H) CASE(B, H, 1); CASE(B, H, 2); CASE(B, H, 4); CASE(B, H, 8)
#else
#define CASES(B, H) CASE(B, H, 1); CASE(B, H, 2); CASE(B, H, 4)
#endif

static void product(const uint8_t *codes, const char *scales, const float *offsets, rounded r, int64_t inputs,
                    int64_t group, int64_t bits, int64_t halves, int64_t rows, float *out) {
    switch (bits * 100 + halves * 10 + rows) {
        CASES(4, 0);
        CASES(4, 1);
        CASES(8, 0);
        CASES(8, 1);
    }
}

INLINE void put(void *out, int64_t at, float value, const uint16_t *bias, int64_t o, int64_t wide) {
    value += bias ? from_brain(bias[o]) : 0;
    if (wide)
        ((float *)out)[at] = value;
    else
        ((uint16_t *)out)[at] = to_brain(value);
}

/* Rows whose activations are rounded together. */
typedef struct {
    rounded x;
    int64_t rows, taken; /* filled up to `rows` with zeros */
} tile;

/* Below, `omp for` and `omp single` share the work of the threads of the region around them. */

static void packed_product(const linear *w, const tile *tiles, int64_t count, void *out, int64_t wide) {
    int64_t inputs = w->inputs, outputs = w->outputs, per_block = inputs / w->group * BLOCK;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < (outputs + BLOCK - 1) / BLOCK; b++) {
        const uint8_t *codes = (const uint8_t *)w->weight + b * inputs * BLOCK * w->bits / 8;
        const char *scales = (const char *)w->scales + b * per_block * (w->halves ? 2 : 4);
        float part[MOST * BLOCK];
        int64_t m = 0, first = b * BLOCK, several = outputs - first < BLOCK ? outputs - first : BLOCK;
        for (const tile *t = tiles; t < tiles + count; m += t++->taken) {
            product(codes, scales, w->offsets ? w->offsets + b * per_block : 0, t->x, inputs, w->group, w->bits,
                    w->halves, t->rows, part);
            for (int64_t i = 0; i < t->taken; i++)
                for (int64_t o = 0; o < several; o++)
                    put(out, (m + i) * outputs + first + o, part[i * BLOCK + o], w->bias, first + o, wide);
        }
    }
}

/* One row in float32 by 16-bit weights; sums in float32. */
static void stored_product(const linear *w, const float *x, void *out, int64_t wide) {
    int64_t inputs = w->inputs;
#pragma omp for schedule(static)
    for (int64_t o = 0; o < w->outputs; o++) {
        const uint16_t *row = (const uint16_t *)w->weight + o * inputs;
        floats sums[4];
        for (int s = 0; s < 4; s++) sums[s] = all_floats(0);
        int64_t k = 0;
        for (; k + 4 * LANES <= inputs; k += 4 * LANES)
            for (int s = 0; s < 4; s++) {
                const uint16_t *at = row + k + s * LANES;
                sums[s] =
                    times_plus(w->halves ? load_halves(at) : load_brain(at), load_floats(x + k + s * LANES), sums[s]);
            }
        float y = (total(sums[0]) + total(sums[1])) + (total(sums[2]) + total(sums[3]));
        for (; k < inputs; k++) y += x[k] * (w->halves ? _cvtsh_ss(row[k]) : from_brain(row[k]));
        put(out, o, y, w->bias, o, wide);
    }
}

/* Whether two linears make the same of a row that both take. */
INLINE int alike(const linear *a, const linear *b) {
    return (a->bits == 16) == (b->bits == 16) && a->group == b->group && a->order == b->order;
}

/* out = one row x by each of `count` linears + their biases, one behind the other. */
static void multiply_row(const linear *w, int64_t count, const uint16_t *x, char *scratch, void *out, int64_t wide) {
    for (int64_t i = 0; i < count; i++, w++) {
        tile one = {in_scratch(scratch, w, 1), 1, 1};
        if (i == 0 || !alike(w - 1, w)) {
#pragma omp single
            if (w->bits == 16)
                for (int64_t k = 0; k < w->inputs; k++) ((float *)scratch)[k] = from_brain(x[k]);
            else
                round_rows(x, 1, 1, w, one.x);
        }
        if (w->bits == 16)
            stored_product(w, (const float *)scratch, out, wide);
        else
            packed_product(w, &one, 1, out, wide);
        out = (char *)out + w->outputs * (wide ? 4 : 2);
    }
}

/* out [M, O] = x w' + bias. x bfloat16; out float32 if `wide`, else bfloat16. 16-bit weights take one row; the caller
   takes 64 at most, so that rounded activations stay in a core's cache. scratch: (M + 8) (2 I + 8 G) bytes. */
void multiply(const linear *w, const uint16_t *x, int64_t rows, char *scratch, void *out, int64_t wide) {
    tile tiles[65];
    int64_t count = 0;
    if (rows == 1) {
#pragma omp parallel
        multiply_row(w, 1, x, scratch, out, wide);
        return;
    }
    for (int64_t m = 0; m < rows; count++) {
        int64_t left = rows - m, size = left == 1 ? 1 : left == 2 ? 2 : left <= 4 ? 4 : MOST;
        tile t = {in_scratch(scratch, w, size), size, left < size ? left : size};
        round_rows(x + m * w->inputs, size, t.taken, w, t.x);
        scratch = (char *)(t.x.sums + w->inputs / w->group * size);
        tiles[count] = t;
        m += size;
    }
#pragma omp parallel
    packed_product(w, tiles, count, out, wide);
}

/* ---- one token: norms, rotary positions, attention. All in bfloat16, rounded where transformers' modules round. */

/* sum = h + added (none: h), out = its RMS norm times weight. */
void add_norm(const uint16_t *h, const uint16_t *added, const uint16_t *weight, int64_t width, float eps,
              uint16_t *sum, uint16_t *out) {
    float squares = 0;
    for (int64_t i = 0; i < width; i++) {
        sum[i] = added ? to_brain(from_brain(h[i]) + from_brain(added[i])) : h[i];
        squares += from_brain(sum[i]) * from_brain(sum[i]);
    }
    float factor = 1 / sqrtf(squares / (float)width + eps);
    for (int64_t i = 0; i < width; i++)
        out[i] = to_brain(from_brain(to_brain(from_brain(sum[i]) * factor)) * from_brain(weight[i]));
}

/* out = exp(x) for `count` values in room for a multiple of 16, to about 1e-7 of each: 2^n exp(r), r by its series. */
static void exponentials(const float *x, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i += LANES) {
        floats v = smaller(all_floats(89), larger(all_floats(-104), load_floats(x + i))), y = all_floats(1.0f / 5040);
        words n = to_words(times(v, all_floats(1.44269504f))), half = half_words(n);
        v = times_plus(to_floats(n), all_floats(-0.693359375f), v); /* log 2 in two parts */
        v = times_plus(to_floats(n), all_floats(2.12194440e-4f), v);
        const float series[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
        for (int k = 0; k < 7; k++) y = times_plus(y, v, all_floats(series[k]));
        store_floats(out + i, times(times(y, exponents(half)), exponents(less_words(n, half)))); /* each in range */
    }
}

/* out = silu(gate) up. */
void gate(const uint16_t *gate, const uint16_t *up, int64_t count, uint16_t *out) {
    float g[256], e[256] = {0};
    for (int64_t start = 0; start < count; start += 256) {
        int64_t several = count - start < 256 ? count - start : 256;
        for (int64_t i = 0; i < several; i++) g[i] = from_brain(gate[start + i]), e[i] = -g[i];
        exponentials(e, several, e);
        for (int64_t i = 0; i < several; i++)
            out[start + i] = to_brain(from_brain(to_brain(g[i] / (1 + e[i]))) * from_brain(up[start + i]));
    }
}

/* One head, normed (none: not) and turned by its position. */
static void turn(const uint16_t *x, const uint16_t *norm, const uint16_t *cosine, const uint16_t *sine, float eps,
                 int64_t width, uint16_t *out) {
    uint16_t normed[1024];
    if (norm) {
        add_norm(x, 0, norm, width, eps, out, normed);
        x = normed;
    }
    for (int64_t i = 0, half = width / 2; i < half; i++) {
        float a = from_brain(x[i]), b = from_brain(x[half + i]), c = from_brain(cosine[i]), s = from_brain(sine[i]);
        out[i] = to_brain(from_brain(to_brain(a * c)) - from_brain(to_brain(b * s)));
        out[half + i] = to_brain(from_brain(to_brain(b * c)) + from_brain(to_brain(a * s)));
    }
}

/* q [H, D] turned into q_out; k [N, D], turned, and v put at `place` of the cache's keys and values [N, capacity, D].
   D is 1024 at most. */
void turn_and_keep(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint16_t *cosine,
                   const uint16_t *sine, const uint16_t *q_norm, const uint16_t *k_norm, float eps, int64_t heads,
                   int64_t shared, int64_t width, int64_t capacity, int64_t place, uint16_t *q_out, uint16_t *keys,
                   uint16_t *values) {
    for (int64_t h = 0; h < heads; h++) turn(q + h * width, q_norm, cosine, sine, eps, width, q_out + h * width);
    for (int64_t n = 0; n < shared; n++) {
        int64_t at = (n * capacity + place) * width;
        turn(k + n * width, k_norm, cosine, sine, eps, width, keys + at);
        for (int64_t i = 0; i < width; i++) values[at + i] = v[n * width + i];
    }
}

/* out = weights p [length] times rows v [length, D], by four vectors of columns at a time, or one. */
INLINE void weighted_sum(const float *p, const uint16_t *v, int64_t length, int64_t width, float *out) {
    for (int64_t i = 0, vectors; i < width; i += vectors * LANES) {
        vectors = width - i >= 4 * LANES ? 4 : 1;
        floats sums[4];
        for (int j = 0; j < 4; j++) sums[j] = all_floats(0);
        if (vectors == 4)
            for (int64_t s = 0; s < length; s++)
                for (int j = 0; j < 4; j++)
                    sums[j] = times_plus(all_floats(p[s]), load_brain(v + s * width + i + j * LANES), sums[j]);
        else
            for (int64_t s = 0; s < length; s++)
                sums[0] = times_plus(all_floats(p[s]), load_brain(v + s * width + i), sums[0]);
        for (int j = 0; j < vectors; j++) store_floats(out + i + j * LANES, sums[j]);
    }
}

/* One head q [D] over the first `length` of the cache's tokens. scores: room for a multiple of 16. */
static void attend_head(const uint16_t *q, const uint16_t *k, const uint16_t *v, int64_t width, int64_t length,
                        float scaling, float *p, uint16_t *out) {
    float wanted[1024], sums[1024], most = -INFINITY, all = 0;
    for (int64_t i = 0; i < width; i++) wanted[i] = from_brain(q[i]) * scaling;
    for (int64_t s = 0; s < length; s++) {
        floats sum = all_floats(0);
        for (int64_t i = 0; i < width; i += LANES)
            sum = times_plus(load_brain(k + s * width + i), load_floats(wanted + i), sum);
        p[s] = total(sum);
        most = p[s] > most || p[s] != p[s] ? p[s] : most;
    }
    for (int64_t s = 0; s < length; s++) p[s] -= most;
    exponentials(p, length, p);
    for (int64_t s = 0; s < length; s++) all += p[s];
    weighted_sum(p, v, length, width, sums);
    for (int64_t i = 0; i < width; i++) out[i] = to_brain(sums[i] / all);
}

static void attend(const uint16_t *q, const uint16_t *keys, const uint16_t *values, int64_t heads, int64_t shared,
                   int64_t width, int64_t capacity, int64_t length, float scaling, float *scores, uint16_t *out) {
#pragma omp for schedule(static)
    for (int64_t h = 0; h < heads; h++) {
        int64_t from = h / (heads / shared) * capacity * width;
        attend_head(q + h * width, keys + from, values + from, width, length, scaling, scores + h * (length + 15),
                    out + h * width);
    }
}

/* out [H, D] = attention of one token over the first `length` of the cache's tokens; D a multiple of 16, 1024 at most.
   scores: float32 [H, length + 15]. */
void attend_one(const uint16_t *q, const uint16_t *keys, const uint16_t *values, int64_t heads, int64_t shared,
                int64_t width, int64_t capacity, int64_t length, float scaling, float *scores, uint16_t *out) {
#pragma omp parallel
    attend(q, keys, values, heads, shared, width, capacity, length, scaling, scores, out);
}

/* ---- one token through all layers and the head */

typedef struct {
    linear q, k, v, o, gate, up, down;
    const uint16_t *before, *after, *q_norm, *k_norm; /* norms before attention and behind it; of heads, or none */
    uint16_t *keys, *values;                          /* the cache's */
} layer;

typedef struct {
    const layer *layers;
    linear head;
    const uint16_t *norm;
    int64_t count, hidden, heads, shared, width, capacity; /* layers, values of h, heads of q, of k and v, of a head */
    float eps, scaling;
    uint16_t *x, *y, *added; /* room for the input and output of linears, and for what is added to h */
    float *scores;
    char *scratch;
} network;

static void pass_layer(const network *n, const layer *l, uint16_t *h, const uint16_t *added, const uint16_t *cosine,
                       const uint16_t *sine, int64_t place) {
    const uint16_t *k = n->y + l->q.outputs, *v = k + l->k.outputs;
#pragma omp single
    add_norm(h, added, l->before, n->hidden, n->eps, h, n->x);
    multiply_row(&l->q, 3, n->x, n->scratch, n->y, 0);
#pragma omp single
    turn_and_keep(n->y, k, v, cosine, sine, l->q_norm, l->k_norm, n->eps, n->heads, n->shared, n->width, n->capacity,
                  place, n->x, l->keys, l->values);
    attend(n->x, l->keys, l->values, n->heads, n->shared, n->width, n->capacity, place + 1, n->scaling, n->scores,
           n->y);
    multiply_row(&l->o, 1, n->y, n->scratch, n->added, 0);
#pragma omp single
    add_norm(h, n->added, l->after, n->hidden, n->eps, h, n->x);
    multiply_row(&l->gate, 2, n->x, n->scratch, n->y, 0);
#pragma omp single
    gate(n->y, n->y + l->gate.outputs, l->gate.outputs, n->x);
    multiply_row(&l->down, 1, n->x, n->scratch, n->added, 0);
}

/* Logits [V] behind the token at `place`, whose embedding h [hidden] is written over; its keys and values are kept. */
void pass_token(const network *n, uint16_t *h, const uint16_t *cosine, const uint16_t *sine, int64_t place,
                float *logits) {
#pragma omp parallel
    {
        for (int64_t l = 0; l < n->count; l++)
            pass_layer(n, n->layers + l, h, l ? n->added : 0, cosine, sine, place);
#pragma omp single
        add_norm(h, n->added, n->norm, n->hidden, n->eps, h, n->x);
        multiply_row(&n->head, 1, n->x, n->scratch, logits, 1);
    }
}
