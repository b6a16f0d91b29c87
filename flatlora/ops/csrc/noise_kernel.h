/* The kernel for one instruction set. noise.c includes this file once for each set and defines
 *   NAME(x)   x with a suffix for the set,
 *   TARGET    the function attribute that enables the set,
 *   AT_ONCE   number of rows whose norms are computed together,
 * and, if the compiler does not generate the best code itself,
 *   VECTOR    size of a vector of 64-bit lanes in bytes,
 *   MULTIPLY  product of the low 32 bits of each lane with a constant,
 *   TOGETHER  number of pairs of vectors that are processed together, to hide latency,
 *   INTERLEAVE  low 32 bits of the lanes of two vectors, alternating,
 *   BOX_MULLER  the two normals of two words, for sixteen pairs,
 *   HALF_TO_FLOAT, FLOAT_TO_HALF    conversion of sixteen numbers from one pointer to another,
 *   FLOAT_TO_BFLOAT                 conversion of 64 numbers; 0 if the generic code must convert them.
 * The loops over lanes are written so that the compiler vectorizes them: fixed lengths, no branches, no calls.
 */

/* words[k][lane] of the column blocks first, first + 1, ..., of as many as are needed, SPAN at most. */
#ifdef VECTOR
#ifndef INTERLEAVE
#define INTERLEAVE(a, b) (((a) & 0xFFFFFFFFu) | ((b) << 32))
#endif
typedef uint64_t NAME(lanes) __attribute__((vector_size(VECTOR), may_alias));

static inline __attribute__((always_inline)) TARGET void NAME(philox_of)(
    uint32_t words[4][SPAN], uint32_t first, uint32_t row, const stream *s, const int blocks, const int together) {
    enum { WIDTH = VECTOR / 8 };
    NAME(lanes) step = {0};
    for (int i = 0; i < WIDTH; i++) step[i] = 2 * i;
    for (int start = 0; start < blocks; start += 2 * WIDTH * together) {
        /* A counter word is the low half of a 64-bit lane. The multiplication does not read the high half, which may hold
         * any bits until the end: the low half of a product needs no mask. Vectors 2p and 2p + 1 hold the even and the
         * odd blocks of a pair. */
        NAME(lanes) c0[2 * TOGETHER], c1[2 * TOGETHER], c2[2 * TOGETHER], c3[2 * TOGETHER];
        for (int v = 0; v < 2 * together; v++) {
            c0[v] = step + (first + start + v / 2 * 2 * WIDTH + v % 2);
            c1[v] = row - (NAME(lanes)){0};
            c2[v] = s->layer - (NAME(lanes)){0};
            c3[v] = s->sample - (NAME(lanes)){0};
        }
#pragma GCC unroll 10
        for (int round = 0; round < ROUNDS; round++) {
            uint64_t k0 = s->key[0] + round * WEYL0, k1 = s->key[1] + round * WEYL1;
            k0 &= 0xFFFFFFFFu, k1 &= 0xFFFFFFFFu;
            for (int v = 0; v < 2 * together; v++) {
                NAME(lanes) p0 = MULTIPLY(c0[v], MULTIPLIER0), p1 = MULTIPLY(c2[v], MULTIPLIER1);
                c0[v] = (p1 >> 32) ^ c1[v] ^ k0;
                c1[v] = p1;
                c2[v] = (p0 >> 32) ^ c3[v] ^ k1;
                c3[v] = p0;
            }
        }
        for (int v = 0; v < 2 * together; v += 2) {
            int at = start + WIDTH * v;
            *(NAME(lanes) *)&words[0][at] = INTERLEAVE(c0[v], c0[v + 1]);
            *(NAME(lanes) *)&words[1][at] = INTERLEAVE(c1[v], c1[v + 1]);
            *(NAME(lanes) *)&words[2][at] = INTERLEAVE(c2[v], c2[v + 1]);
            *(NAME(lanes) *)&words[3][at] = INTERLEAVE(c3[v], c3[v + 1]);
        }
    }
}

/* Half of a span, for the end of a row; not inline, which would take registers from the loop over whole spans. */
static __attribute__((noinline)) TARGET void NAME(half_philox)(
    uint32_t words[4][SPAN], uint32_t first, uint32_t row, const stream *s) {
    NAME(philox_of)(words, first, row, s, SPAN / 2, 1);
}

static inline TARGET void NAME(philox)(
    uint32_t words[4][SPAN], uint32_t first, uint32_t row, const stream *s, int needed) {
    if (needed > SPAN / 2) NAME(philox_of)(words, first, row, s, SPAN, TOGETHER);
    else NAME(half_philox)(words, first, row, s);
}
#else
static inline TARGET void NAME(philox)(
    uint32_t words[4][SPAN], uint32_t first, uint32_t row, const stream *s, int needed) {
    (void)needed;
    uint32_t *c0 = words[0], *c1 = words[1], *c2 = words[2], *c3 = words[3];
    for (int i = 0; i < SPAN; i++) c0[i] = first + i, c1[i] = row, c2[i] = s->layer, c3[i] = s->sample;
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t k0 = s->key[0] + round * WEYL0, k1 = s->key[1] + round * WEYL1;
        for (int i = 0; i < SPAN; i++) {
            uint64_t p0 = (uint64_t)c0[i] * MULTIPLIER0, p1 = (uint64_t)c2[i] * MULTIPLIER1;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = (uint32_t)p1;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = (uint32_t)p0;
        }
    }
}
#endif

/* z[TILE] of one tile: sqrt(-2 ln u) times cosine and sine of t. */
static inline TARGET void NAME(box_muller)(float *restrict z, uint32_t words[4][SPAN], int at) {
#ifdef BOX_MULLER
    for (int pair = 0; pair < 2; pair++)
        BOX_MULLER(z + 32 * pair, z + 32 * pair + 16, words[2 * pair] + at, words[2 * pair + 1] + at);
#else
    for (int pair = 0; pair < 2; pair++)
        for (int i = 0; i < LANES; i++) {
            /* u = (k + 1/2) / 2^24 = m 2^e with m in [sqrt(1/2), sqrt(2)), f = m - 1, -2 ln u = -2 ln(2) e - 2 ln(1 + f) */
            int32_t k = words[2 * pair][at + i] >> 8;
            int32_t bits = as_int((float)k + 0.5f) - 0x3F3504F3; /* minus the bits of sqrt(1/2) */
            int32_t e = (bits >> 23) - 24;
            float f = as_float((bits & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
            /* k + 1/2 has 25 bits if u > 1/2. If e = 0, f = u - 1 is computed from 2^24 - k, without rounding. */
            float exact = (float)(k - (1 << 24)) * 0x1p-24f + 0x1p-25f;
            f = e == 0 ? exact : f;
            /* -2 ln(1 + f) / f, minimax polynomial, relative error 1.7e-7 */
            float p = 0.2075742684974607f;
            p = p * f - 0.32676289599598524f;
            p = p * f + 0.34424853034065217f;
            p = p * f - 0.39768471150106893f;
            p = p * f + 0.49943120490794946f;
            p = p * f - 0.6667121579742487f;
            p = p * f + 1.0000068856300852f;
            p = p * f - 1.9999998357126516f;
            float radius = sqrtf(p * f - 1.3862943611198906f * (float)e);

            /* t = pi/2 quarter + pi/4 x with x in [-1, 1) */
            int32_t turn = words[2 * pair + 1][at + i] >> 8;
            int32_t quarter = (turn + (1 << 21)) >> 22;
            float x = (float)(turn - (quarter << 22)) * 0x1p-21f;
            float y = x * x;
            /* sin(pi/4 x) and cos(pi/4 x), minimax polynomials, errors 1e-9 and 3e-8 */
            float sine = -3.587725839827414e-05f;
            sine = sine * y + 0.002489871967804031f;
            sine = sine * y - 0.08074536727091274f;
            sine = sine * y + 0.7853981525427292f;
            sine = sine * x;
            float cosine = -0.00031888050842583107f;
            cosine = cosine * y + 0.015849915256947688f;
            cosine = cosine * y - 0.3084242535619725f;
            cosine = cosine * y + 0.9999999724233218f;
            /* an odd quarter swaps them; the second bit of the quarter is the sign of the sine */
            float a = quarter & 1 ? sine : cosine, b = quarter & 1 ? cosine : sine;
            z[32 * pair + i] = radius * as_float(as_int(a) ^ (uint32_t)((quarter + 1) & 2) << 30);
            z[32 * pair + 16 + i] = radius * as_float(as_int(b) ^ (uint32_t)(quarter & 2) << 30);
        }
#endif
}

static inline TARGET void NAME(load)(float *restrict x, const void *weight, int type) {
    if (type == FLOAT32) {
        const float *w = weight;
        for (int j = 0; j < TILE; j++) x[j] = w[j];
    } else if (type == BFLOAT16) {
        const uint16_t *w = weight;
        for (int j = 0; j < TILE; j++) x[j] = as_float((uint32_t)w[j] << 16);
    } else {
        const uint16_t *w = weight;
#ifdef HALF_TO_FLOAT
        for (int j = 0; j < TILE; j += 16) HALF_TO_FLOAT(x + j, w + j);
#else
        for (int j = 0; j < TILE; j++) {
            /* The product adds 112 to the exponent, and normalizes subnormal numbers. */
            uint32_t sign = (uint32_t)(w[j] & 0x8000) << 16, magnitude = (uint32_t)(w[j] & 0x7FFF) << 13;
            float finite = as_float(magnitude) * 0x1p112f;
            x[j] = as_float(sign | (magnitude >= 0x0F800000 ? magnitude | 0x7F800000 : (uint32_t)as_int(finite)));
        }
#endif
    }
}

static inline TARGET void NAME(store)(void *out, const float *restrict x, int type) {
    if (type == FLOAT32) {
        float *o = out;
        for (int j = 0; j < TILE; j++) o[j] = x[j];
    } else if (type == FLOAT64) {
        double *o = out;
        for (int j = 0; j < TILE; j++) o[j] = x[j];
    } else if (type == BFLOAT16) {
        uint16_t *o = out;
#ifdef FLOAT_TO_BFLOAT
        if (FLOAT_TO_BFLOAT(o, x)) return;
#endif
        for (int j = 0; j < TILE; j++) { /* round to nearest, ties to even */
            uint32_t bits = as_int(x[j]);
            o[j] = x[j] == x[j] ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0;
        }
    } else {
        uint16_t *o = out;
#ifdef FLOAT_TO_HALF
        for (int j = 0; j < TILE; j += 16) FLOAT_TO_HALF(o + j, x + j);
#else
        for (int j = 0; j < TILE; j++) {
            uint32_t bits = as_int(x[j]), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
            uint32_t normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
            /* the addition of 0.5 rounds to the spacing of a half's subnormal numbers */
            uint32_t subnormal = as_int(as_float(magnitude) + 0.5f) - 0x3F000000;
            uint32_t h = magnitude < 0x38800000 ? subnormal : normal;
            h = magnitude >= 0x477FF000 ? 0x7C00 : h; /* from 65520 on: infinity */
            o[j] = sign | (magnitude > 0x7F800000 ? 0x7E00 : h);
        }
#endif
    }
}

static inline TARGET void NAME(add)(
    void *out, int out_type, const void *weight, int weight_type, double std, const float *restrict z) {
    ALIGNED float x[TILE];
    if (weight_type == FLOAT64) {
        const double *w = weight;
        if (out_type == FLOAT64) {
            double *o = out;
            for (int j = 0; j < TILE; j++) o[j] = w[j] + std * z[j];
            return;
        }
        for (int j = 0; j < TILE; j++) x[j] = (float)(w[j] + std * z[j]);
    } else {
        float s = (float)std;
        NAME(load)(x, weight, weight_type);
        for (int j = 0; j < TILE; j++) x[j] = x[j] + s * z[j];
    }
    NAME(store)(out, x, out_type);
}

/* Rows begin ... end - 1 of the job, in blocks of rows x COLUMNS. If the rows are contiguous, a block is a part of one row,
 * read and written in place. Otherwise a block has PANEL rows and is copied through buffers, so that each cache line of a
 * column is fetched once; blocks proceed along the columns, so that each page is fetched once. Blocks begin at tiles of the
 * whole weight: if W begins inside a tile, the first block has some columns before those of W, which are not accessed. */
static TARGET void NAME(rows)(const job *j, int64_t begin, int64_t end) {
    enum { COLUMNS = SPAN / LANES * TILE };
    ALIGNED char weight_buffer[PANEL * COLUMNS * 8], out_buffer[PANEL * COLUMNS * 8];
    int64_t w_size = SIZE[j->w_type], o_size = SIZE[j->o_type];
    int w_apart = j->w1 != w_size, o_apart = j->o1 != o_size;
    int down = (w_apart && j->w1 != 0) || o_apart, height = down ? PANEL : 1;
    int64_t before = j->first_column % TILE; /* columns of the first tile before those of W */
    int64_t high = (end - begin + height - 1) / height, wide = (before + j->n + COLUMNS - 1) / COLUMNS;
    for (int64_t outer = 0; outer < (down ? wide : high); outer++) {
        for (int64_t inner = 0; inner < (down ? high : wide); inner++) {
            int64_t i0 = begin + (down ? inner : outer) * height, j0 = (down ? outer : inner) * COLUMNS - before;
            int rows = end - i0 < height ? (int)(end - i0) : height;
            int skip = j0 < 0 ? (int)-j0 : 0, columns = j->n - j0 < COLUMNS ? (int)(j->n - j0) : COLUMNS;
            const char *w = j->weight + i0 * j->w0 + (j0 + skip) * j->w1;
            char *o = j->out + i0 * j->o0 + (j0 + skip) * j->o1;
            int partial = skip || columns % TILE, w_copy = w_apart || partial, o_copy = o_apart || partial;
            if (w_copy)
                copy(weight_buffer + skip * w_size, COLUMNS * w_size, w_size, w, j->w0, j->w1, rows, columns - skip, w_size);
            for (int i = 0; i < rows; i++) {
                const char *from = w_copy ? weight_buffer + i * COLUMNS * w_size : w + i * j->w0;
                char *to = o_copy ? out_buffer + i * COLUMNS * o_size : o + i * j->o0;
                ALIGNED uint32_t words[4][SPAN];
                ALIGNED float z[TILE];
                double std = std_of(j, i0 + i);
                uint32_t first = (uint32_t)((j->first_column + j0) / TILE * LANES);
                /* The processor's own prefetch starts again in each page, too late for rows of a page or less. */
                if (!w_copy) PREFETCH(from + AHEAD, COLUMNS * w_size, 0);
                if (!o_copy) PREFETCH(to + AHEAD, COLUMNS * o_size, 1);
                NAME(philox)(words, first, row_of(j, i0 + i), &j->s, (columns + TILE - 1) / TILE * LANES);
                for (int t = 0; t * TILE < columns; t++) {
                    NAME(box_muller)(z, words, t * LANES);
                    NAME(add)(to + t * TILE * o_size, j->o_type, from + t * TILE * w_size, j->w_type, std, z);
                }
            }
            if (o_copy)
                copy(o, j->o0, j->o1, out_buffer + skip * o_size, COLUMNS * o_size, o_size, rows, columns - skip, o_size);
        }
    }
}

/* norm_i = || W_i + s sum_k B_ik A_k || of the rows begin ... end - 1, with the merged row in registers only: AT_ONCE rows
 * and two vectors of columns at a time, which are enough independent sums to hide the latency of one. */
#if defined(__GNUC__)
typedef float NAME(floats) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t NAME(ints) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* Add the squares of AT_ONCE rows to the sums, from column c on in steps of `vectors` vectors; returns the next column. */
static inline __attribute__((always_inline)) TARGET int64_t NAME(squares)(
    const job *j, const int64_t *i, int64_t c, const int vectors, const int type, NAME(floats) sum[AT_ONCE]) {
    const float *b[AT_ONCE];
    for (int p = 0; p < AT_ONCE; p++) b[p] = j->b + i[p] * j->r;
    for (; c + vectors * LANES <= j->n; c += vectors * LANES) {
        NAME(floats) low_rank[AT_ONCE][2] = {{{0}}};
        const float *a = j->a + c;
        for (int64_t k = 0; k < j->r; k++, a += j->n)
            for (int p = 0; p < AT_ONCE; p++)
                for (int v = 0; v < vectors; v++) low_rank[p][v] += b[p][k] * *(const NAME(floats) *)(a + v * LANES);
        for (int p = 0; p < AT_ONCE; p++)
            for (int v = 0; v < vectors; v++) {
                const char *w = j->weight + i[p] * j->w0 + (c + v * LANES) * SIZE[type];
                PREFETCH(w + AT_ONCE * j->w0, 1, 0); /* the next rows */
                NAME(floats) merged = j->scaling * low_rank[p][v];
                if (type == FLOAT32) merged += *(const NAME(floats) *)w;
                else merged += (NAME(floats))(__builtin_convertvector(*(const NAME(halves) *)w, NAME(ints)) << 16);
                sum[p] += merged * merged;
            }
    }
    return c;
}

static inline __attribute__((always_inline)) TARGET void NAME(norms_of)(
    const job *j, int64_t begin, int64_t end, const int type) {
    for (int64_t first = begin; first < end; first += AT_ONCE) {
        NAME(floats) sum[AT_ONCE] = {{0}};
        int64_t i[AT_ONCE]; /* the last row is repeated if there are fewer rows */
        for (int p = 0; p < AT_ONCE; p++) i[p] = first + p < end ? first + p : end - 1;
        int64_t c = NAME(squares)(j, i, 0, 2, type, sum);
        c = NAME(squares)(j, i, c, 1, type, sum);
        for (int p = 0; p < AT_ONCE; p++) {
            ALIGNED float lanes[LANES];
            *(NAME(floats) *)lanes = sum[p];
            for (int half = LANES / 2; half > 0; half /= 2)
                for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
            ((float *)j->norms)[i[p]] = norm_of(j, i[p], lanes[0] + (c < j->n ? rest_of_row(j, i[p], c) : 0));
        }
    }
}

static TARGET void NAME(norms)(const job *j, int64_t begin, int64_t end) {
    if (j->w_type == FLOAT32) NAME(norms_of)(j, begin, end, FLOAT32);
    else NAME(norms_of)(j, begin, end, BFLOAT16);
}
#else
static void NAME(norms)(const job *j, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) ((float *)j->norms)[i] = norm_of(j, i, rest_of_row(j, i, 0));
}
#endif

/* out + left right, a few rows of a tile; enabled if there are enough registers. */
#if VECTOR == 64
static inline __attribute__((always_inline)) TARGET void NAME(add_tile)(
    const product_job *j, int64_t i, int64_t c) {
    enum { rows = AT_ONCE };
    ALIGNED float x[rows][TILE];
    NAME(floats) sum[rows][TILE / LANES];
    char *row[rows];
    for (int p = 0; p < rows; p++) {
        row[p] = j->out + (i + p) * j->o0 + c * SIZE[j->o_type];
        NAME(load)(x[p], row[p], j->o_type);
        for (int v = 0; v < TILE / LANES; v++) sum[p][v] = *(NAME(floats) *)(x[p] + v * LANES);
    }
    for (int64_t k = 0; k < j->r; k++)
        for (int v = 0; v < TILE / LANES; v++) {
            NAME(floats) right = *(const NAME(floats) *)(j->right + k * j->n + c + v * LANES);
            for (int p = 0; p < rows; p++) sum[p][v] += j->left[(i + p) * j->r + k] * right;
        }
    for (int p = 0; p < rows; p++) {
        for (int v = 0; v < TILE / LANES; v++) *(NAME(floats) *)(x[p] + v * LANES) = sum[p][v];
        NAME(store)(row[p], x[p], j->o_type);
    }
}
#endif

/* out + left right, a tile or less of one row. */
static TARGET void NAME(add_rest)(const product_job *j, int64_t i, int64_t c) {
    ALIGNED float x[TILE];
    ALIGNED char buffer[TILE * 8] = {0};
    int64_t size = SIZE[j->o_type], columns = j->n - c < TILE ? j->n - c : TILE, bytes = columns * size;
    char *row = j->out + i * j->o0 + c * size;
    memcpy(buffer, row, bytes);
    NAME(load)(x, buffer, j->o_type);
    for (int64_t k = 0; k < j->r; k++) {
        float left = j->left[i * j->r + k];
        const float *right = j->right + k * j->n + c;
        if (columns == TILE)
            for (int q = 0; q < TILE; q++) x[q] += left * right[q];
        else
            for (int q = 0; q < columns; q++) x[q] += left * right[q];
    }
    NAME(store)(buffer, x, j->o_type);
    memcpy(row, buffer, bytes);
}

/* Blocks of columns, so that those of `right` stay in the first cache, and a row is read in long pieces. */
static TARGET void NAME(add_product)(const product_job *j, int64_t begin, int64_t end) {
    for (int64_t first = 0; first < j->n; first += BLOCK) {
        int64_t stop = first + BLOCK < j->n ? first + BLOCK : j->n, i = begin;
#if VECTOR == 64
        for (; i + AT_ONCE <= end; i += AT_ONCE) {
            int64_t c = first;
            for (; c + TILE <= stop; c += TILE) NAME(add_tile)(j, i, c);
            for (int p = 0; p < AT_ONCE && c < stop; p++) NAME(add_rest)(j, i + p, c);
        }
#endif
        for (; i < end; i++)
            for (int64_t c = first; c < stop; c += TILE) NAME(add_rest)(j, i, c);
    }
}

/* For tests: the words of column blocks first, first + 1, ... of a row, four for each block; and the normals of given
 * words. */
static TARGET void NAME(words)(uint32_t *out, uint32_t row, int64_t first, int64_t blocks, const stream *s) {
    for (int64_t start = 0; start < blocks; start += SPAN) {
        ALIGNED uint32_t words[4][SPAN];
        NAME(philox)(words, (uint32_t)(first + start), row, s, SPAN);
        for (int64_t b = start; b < start + SPAN && b < blocks; b++)
            for (int k = 0; k < 4; k++) out[4 * b + k] = words[k][b - start];
    }
}

static TARGET void NAME(normals)(float *out, const uint32_t *in, int64_t blocks) {
    for (int64_t first = 0; first < blocks; first += LANES) {
        ALIGNED uint32_t words[4][SPAN] = {{0}};
        ALIGNED float z[TILE];
        for (int64_t b = first; b < first + LANES && b < blocks; b++)
            for (int k = 0; k < 4; k++) words[k][b - first] = in[4 * b + k];
        NAME(box_muller)(z, words, 0);
        for (int64_t b = first; b < first + LANES && b < blocks; b++)
            for (int k = 0; k < 4; k++) out[4 * b + k] = z[LANES * k + b - first];
    }
}

#undef NAME
#undef TARGET
#undef VECTOR
#undef AT_ONCE
#undef MULTIPLY
#undef TOGETHER
#undef INTERLEAVE
#undef BOX_MULLER
#undef HALF_TO_FLOAT
#undef FLOAT_TO_HALF
#undef FLOAT_TO_BFLOAT
