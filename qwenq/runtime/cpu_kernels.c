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

#define BLOCK 16 /* outputs */
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
#define to_floats(v) _mm512_cvtepi32_ps(v)
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
#define MOST 2
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
#define to_floats(v) _mm256_cvtepi32_ps(v)
#define times(a, b) _mm256_mul_ps(a, b)
#define times_plus(a, b, c) _mm256_fmadd_ps(a, b, c)
#define dot(sum, w, x) _mm256_add_epi32(sum, _mm256_madd_epi16(w, x))
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

/* Rows of activations in 16-bit integers, two columns a word: [I / 2][rows]; their scales and sums: [G][rows]. */
typedef struct {
    int32_t *pairs;
    float *scales;
    int32_t *sums;
} rounded;

static void round_rows(const uint16_t *x, int64_t rows, int64_t taken, int64_t inputs, int64_t group, rounded r) {
    for (int64_t m = 0; m < rows; m++) {
        for (int64_t g = 0; g < inputs / group; g++) {
            const uint16_t *from = x + m * inputs + g * group;
            float values[256], largest = 0;
            int32_t sum = 0, bad = 0;
            for (int64_t k = 0; k < group; k++) {
                values[k] = m < taken ? from_brain(from[k]) : 0;
                float size = fabsf(values[k]);
                largest = size > largest ? size : largest;
                bad |= !(size <= 3.4e38f); /* infinite, or not a number: so are the outputs */
            }
            float back = !bad && largest > 0 ? 32767.0f / largest : 0;
            int32_t *to = r.pairs + g * group / 2 * rows + m;
            int16_t whole[256];
            for (int64_t k = 0; k < group; k++) {
                int32_t near = _mm_cvtss_si32(_mm_set_ss(values[k] * back));
                whole[k] = (int16_t)(near > 32767 ? 32767 : near < -32767 ? -32767 : near);
                sum += whole[k];
            }
            for (int64_t k = 0; k < group / 2; k++)
                to[k * rows] = (int32_t)((uint32_t)(uint16_t)whole[2 * k] | (uint32_t)(uint16_t)whole[2 * k + 1] << 16);
            r.scales[g * rows + m] = bad ? NAN : largest / 32767.0f;
            r.sums[g * rows + m] = sum;
        }
    }
}

/* A block's outputs for `rows` rows: [rows][16]. With one row, four sums are under way at a time. */
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
#define CASES(B, H) CASE(B, H, 1); CASE(B, H, 2)
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

/* Bytes that `multiply` wants for the rounded activations of so many rows. */
int64_t scratch_bytes(int64_t rows, int64_t inputs, int64_t group) {
    return (rows + MOST) * (2 * inputs + 8 * (inputs / group));
}

/* out [M, O] = x w' + bias. x bfloat16; out float32 if `wide`, else bfloat16. The caller takes 64 rows at most, so that
   rounded activations stay in a core's cache. */
void multiply(const uint16_t *x, int64_t rows, int64_t inputs, int64_t outputs, const uint8_t *codes,
              const char *scales, const float *offsets, const uint16_t *bias, int64_t bits, int64_t halves,
              int64_t group, char *scratch, void *out, int64_t wide) {
    rounded tiles[65];
    int64_t sizes[65], count = 0, groups = inputs / group;
    for (int64_t m = 0; m < rows; count++) {
        int64_t left = rows - m, size = left == 1 ? 1 : left == 2 || MOST == 2 ? 2 : left <= 4 ? 4 : MOST;
        rounded r = {(int32_t *)scratch, (float *)(scratch + 2 * inputs * size), 0};
        r.sums = (int32_t *)(r.scales + groups * size);
        scratch = (char *)(r.sums + groups * size);
        round_rows(x + m * inputs, size, left < size ? left : size, inputs, group, r);
        tiles[count] = r;
        sizes[count] = size;
        m += size;
    }
    int64_t blocks = (outputs + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        float part[MOST * BLOCK];
        int64_t m = 0, first = b * BLOCK, several = outputs - first < BLOCK ? outputs - first : BLOCK;
        for (int64_t t = 0; t < count; m += sizes[t++]) {
            product(codes + b * inputs * BLOCK * bits / 8, scales + b * groups * BLOCK * (halves ? 2 : 4),
                    offsets ? offsets + b * groups * BLOCK : 0, tiles[t], inputs, group, bits, halves, sizes[t], part);
            for (int64_t i = 0; i < sizes[t] && m + i < rows; i++)
                for (int64_t o = 0; o < several; o++)
                    put(out, (m + i) * outputs + first + o, part[i * BLOCK + o], bias, first + o, wide);
        }
    }
}

/* out [O] = w x + bias for one row and weights [O, I] in bfloat16 or, if `halves`, float16; sums in float32. */
void multiply_stored(const uint16_t *x, int64_t inputs, int64_t outputs, const uint16_t *weight, const uint16_t *bias,
                     int64_t halves, float *scratch, void *out, int64_t wide) {
    for (int64_t k = 0; k < inputs; k++) scratch[k] = from_brain(x[k]);
#pragma omp parallel for schedule(static)
    for (int64_t o = 0; o < outputs; o++) {
        const uint16_t *w = weight + o * inputs;
        floats sums[4];
        for (int s = 0; s < 4; s++) sums[s] = all_floats(0);
        int64_t k = 0;
        for (; k + 4 * LANES <= inputs; k += 4 * LANES)
            for (int s = 0; s < 4; s++) {
                const uint16_t *at = w + k + s * LANES;
                sums[s] = times_plus(halves ? load_halves(at) : load_brain(at), load_floats(scratch + k + s * LANES),
                                     sums[s]);
            }
        float y = (total(sums[0]) + total(sums[1])) + (total(sums[2]) + total(sums[3]));
        for (; k < inputs; k++) y += scratch[k] * (halves ? _cvtsh_ss(w[k]) : from_brain(w[k]));
        put(out, o, y, bias, o, wide);
    }
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

/* out = silu(gate) up. */
void gate(const uint16_t *gate, const uint16_t *up, int64_t count, uint16_t *out) {
    for (int64_t i = 0; i < count; i++) {
        float g = from_brain(gate[i]);
        out[i] = to_brain(from_brain(to_brain(g / (1 + expf(-g)))) * from_brain(up[i]));
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

/* out [H, D] = attention of one token over the first `length` of the cache's tokens; D a multiple of 16, 1024 at most.
   scores: float32 [H, length]. */
void attend_one(const uint16_t *q, const uint16_t *keys, const uint16_t *values, int64_t heads, int64_t shared,
                int64_t width, int64_t capacity, int64_t length, float scaling, float *scores, uint16_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t h = 0; h < heads; h++) {
        float wanted[1024], sums[1024], *p = scores + h * length, most = -INFINITY, all = 0;
        const uint16_t *k = keys + h / (heads / shared) * capacity * width;
        const uint16_t *v = values + h / (heads / shared) * capacity * width;
        for (int64_t i = 0; i < width; i++) wanted[i] = from_brain(q[h * width + i]) * scaling, sums[i] = 0;
        for (int64_t s = 0; s < length; s++) {
            floats sum = all_floats(0);
            for (int64_t i = 0; i < width; i += LANES)
                sum = times_plus(load_brain(k + s * width + i), load_floats(wanted + i), sum);
            p[s] = total(sum);
            most = p[s] > most || p[s] != p[s] ? p[s] : most;
        }
        for (int64_t s = 0; s < length; s++) all += p[s] = expf(p[s] - most);
        for (int64_t s = 0; s < length; s++)
            for (int64_t i = 0; i < width; i += LANES)
                store_floats(sums + i,
                             times_plus(all_floats(p[s]), load_brain(v + s * width + i), load_floats(sums + i)));
        for (int64_t i = 0; i < width; i++) out[h * width + i] = to_brain(sums[i] / all);
    }
}
