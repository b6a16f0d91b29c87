/* Products of a large 16-bit matrix x with the factors of an adapter, which have few columns:
 *   project      x f^T        x: (t, n), f: (r, n)
 *   gather       l^T x        x: (t, n), l: (t, r)
 *   add_masked   out += keep mask (l f)
 * x is read as it is stored, with dropout applied to it: x_ij keep if mask_ij, else x_ij 0. Sums are in float32; the order
 * of their terms does not depend on the number of threads. noise.c includes this file after the kernel for AVX-512.
 */

enum { RANKS = 8, FACTOR_COLUMNS = 1024, FACTOR_ROWS = 128 };

static inline __attribute__((always_inline)) AVX512_TARGET __m512 dropped(
    const factor_job *j, __m512 x, int64_t i, int64_t c, __mmask16 lanes) {
    __m128i mask = _mm_maskz_loadu_epi8(lanes, j->mask + i * j->n + c);
    return _mm512_mul_ps(x, _mm512_maskz_mov_ps(_mm_test_epi8_mask(mask, mask), _mm512_set1_ps(j->keep)));
}

/* x_ic of sixteen columns, zero where `lanes` has a zero bit. */
static inline __attribute__((always_inline)) AVX512_TARGET __m512 sixteen(
    const factor_job *j, int64_t i, int64_t c, __mmask16 lanes, const int type, const int masked) {
    __m256i bits = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)(j->x + i * j->x0) + c);
    __m512 x = type == BFLOAT16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))
                                : _mm512_cvtph_ps(bits);
    return masked ? dropped(j, x, i, c, lanes) : x;
}

static inline AVX512_TARGET __mmask16 lanes_of(int64_t columns) {
    return columns >= LANES ? 0xFFFF : columns > 0 ? (__mmask16)((1u << columns) - 1) : 0;
}

/* The sums of the lanes of sixteen vectors. */
static inline AVX512_TARGET __m512 sums_of(__m512 v[16]) {
    for (int k = 0; k < 8; k++)
        v[k] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * k], v[2 * k + 1]), _mm512_unpackhi_ps(v[2 * k], v[2 * k + 1]));
    for (int k = 0; k < 4; k++) {
        __m512d a = _mm512_castps_pd(v[2 * k]), b = _mm512_castps_pd(v[2 * k + 1]);
        v[k] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int vectors = 2; vectors > 0; vectors /= 2)
        for (int k = 0; k < vectors; k++)
            v[k] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * k], v[2 * k + 1], _MM_SHUFFLE(2, 0, 2, 0)),
                                 _mm512_shuffle_f32x4(v[2 * k], v[2 * k + 1], _MM_SHUFFLE(3, 1, 3, 1)));
    return v[0];
}

/* Add x_i f_k^T over some columns to out, for the rows i[0] and i[1] of x and eight rows of the factor. */
static inline __attribute__((always_inline)) AVX512_TARGET void project_tile(
    const factor_job *j, const int64_t i[2], int64_t k, int64_t first, int64_t stop, const int type, const int masked) {
    __m512 sum[2 * RANKS];
    const float *f[RANKS]; /* the last row is repeated if there are fewer rows */
    for (int q = 0; q < RANKS; q++) f[q] = j->factor + (k + q < j->r ? k + q : j->r - 1) * j->n;
    for (int q = 0; q < 2 * RANKS; q++) sum[q] = _mm512_setzero_ps();
    for (int64_t c = first; c < stop; c += LANES) {
        __mmask16 lanes = lanes_of(stop - c);
        __m512 x[2];
        for (int p = 0; p < 2; p++) x[p] = sixteen(j, i[p], c, lanes, type, masked);
#pragma GCC unroll 8
        for (int q = 0; q < RANKS; q++) {
            __m512 row = _mm512_maskz_loadu_ps(lanes, f[q] + c);
            for (int p = 0; p < 2; p++) sum[p * RANKS + q] = _mm512_fmadd_ps(x[p], row, sum[p * RANKS + q]);
        }
    }
    __m512 sums = sums_of(sum);
    __mmask8 ranks = (__mmask8)lanes_of(j->r - k < RANKS ? j->r - k : RANKS);
    for (int p = 0; p < 2 && (p == 0 || i[1] != i[0]); p++) {
        float *out = j->out + i[p] * j->r + k;
        __m256 part = p ? _mm512_extractf32x8_ps(sums, 1) : _mm512_castps512_ps256(sums);
        _mm256_mask_storeu_ps(out, ranks, _mm256_add_ps(_mm256_maskz_loadu_ps(ranks, out), part));
    }
}

/* Rows begin ... end - 1 of x. Eight rows of a block of the factor fit into the first cache, a block of x into the second. */
static inline __attribute__((always_inline)) AVX512_TARGET void project_rows(
    const factor_job *j, int64_t begin, int64_t end, const int type, const int masked) {
    memset(j->out + begin * j->r, 0, (end - begin) * j->r * sizeof(float));
    for (int64_t first = 0; first < j->n; first += FACTOR_COLUMNS)
        for (int64_t top = begin; top < end; top += FACTOR_ROWS)
            for (int64_t k = 0; k < j->r; k += RANKS)
                for (int64_t i = top; i < end && i < top + FACTOR_ROWS; i += 2) {
                    int64_t stop = first + FACTOR_COLUMNS < j->n ? first + FACTOR_COLUMNS : j->n;
                    int64_t rows[2] = {i, i + 1 < end ? i + 1 : i};
                    project_tile(j, rows, k, first, stop, type, masked);
                }
}

/* Add l_k^T x over the rows top ... bottom - 1 to out, for eight columns of l and thirty-two of x. */
static inline __attribute__((always_inline)) AVX512_TARGET void gather_tile(
    const factor_job *j, int64_t k, int64_t c, int64_t top, int64_t bottom, const int full, const int type,
    const int masked) {
    __mmask16 lanes[2] = {lanes_of(j->n - c), lanes_of(j->n - c - LANES)};
    int ranks = full ? RANKS : (int)(j->r - k), column[RANKS]; /* the last one is repeated if there are fewer columns */
    __m512 sum[RANKS][2];
    for (int q = 0; q < RANKS; q++) {
        column[q] = full || q < ranks ? q : ranks - 1;
        for (int v = 0; v < 2; v++)
            sum[q][v] = _mm512_maskz_loadu_ps(lanes[v], j->out + (k + column[q]) * j->n + c + v * LANES);
    }
    for (int64_t i = top; i < bottom; i++) {
        const float *l = j->factor + i * j->r + k;
        __m512 x[2];
        for (int v = 0; v < 2; v++) x[v] = sixteen(j, i, c + v * LANES, lanes[v], type, masked);
#pragma GCC unroll 8
        for (int q = 0; q < RANKS; q++) {
            __m512 left = _mm512_set1_ps(l[column[q]]);
            for (int v = 0; v < 2; v++) sum[q][v] = _mm512_fmadd_ps(left, x[v], sum[q][v]);
        }
    }
    for (int q = 0; q < ranks; q++)
        for (int v = 0; v < 2; v++) _mm512_mask_storeu_ps(j->out + (k + q) * j->n + c + v * LANES, lanes[v], sum[q][v]);
}

/* Tiles begin ... end - 1 of PANEL columns. */
static inline __attribute__((always_inline)) AVX512_TARGET void gather_columns(
    const factor_job *j, int64_t begin, int64_t end, const int type, const int masked) {
    int64_t first = begin * PANEL, stop = end * PANEL < j->n ? end * PANEL : j->n;
    for (int64_t k = 0; k < j->r; k++) memset(j->out + k * j->n + first, 0, (stop - first) * sizeof(float));
    for (int64_t top = 0; top < j->t; top += FACTOR_ROWS)
        for (int64_t c = first; c < stop; c += PANEL)
            for (int64_t k = 0; k < j->r; k += RANKS) {
                int64_t bottom = top + FACTOR_ROWS < j->t ? top + FACTOR_ROWS : j->t;
                if (k + RANKS <= j->r) gather_tile(j, k, c, top, bottom, 1, type, masked);
                else gather_tile(j, k, c, top, bottom, 0, type, masked);
            }
}

static AVX512_TARGET void project_avx512(const factor_job *j, int64_t begin, int64_t end) {
    if (j->mask && j->x_type == BFLOAT16) project_rows(j, begin, end, BFLOAT16, 1);
    else if (j->mask) project_rows(j, begin, end, FLOAT16, 1);
    else if (j->x_type == BFLOAT16) project_rows(j, begin, end, BFLOAT16, 0);
    else project_rows(j, begin, end, FLOAT16, 0);
}

static AVX512_TARGET void gather_avx512(const factor_job *j, int64_t begin, int64_t end) {
    if (j->mask && j->x_type == BFLOAT16) gather_columns(j, begin, end, BFLOAT16, 1);
    else if (j->mask) gather_columns(j, begin, end, FLOAT16, 1);
    else if (j->x_type == BFLOAT16) gather_columns(j, begin, end, BFLOAT16, 0);
    else gather_columns(j, begin, end, FLOAT16, 0);
}

/* x += keep mask (l f), for four rows i[0] ... i[3] and a tile of columns. */
static inline AVX512_TARGET void add_masked_tile(const factor_job *j, const int64_t i[4], int rows, int64_t c) {
    enum { VECTORS = TILE / LANES };
    __m512 sum[4][VECTORS];
    __mmask16 lanes[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        lanes[v] = lanes_of(j->n - c - v * LANES);
        for (int p = 0; p < 4; p++) sum[p][v] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < j->r; k++)
        for (int v = 0; v < VECTORS; v++) {
            __m512 right = _mm512_maskz_loadu_ps(lanes[v], j->factor + k * j->n + c + v * LANES);
            for (int p = 0; p < 4; p++)
                sum[p][v] = _mm512_fmadd_ps(_mm512_set1_ps(j->left[i[p] * j->r + k]), right, sum[p][v]);
        }
    for (int p = 0; p < rows; p++) {
        ALIGNED float wide[TILE];
        ALIGNED uint16_t narrow[TILE];
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = c + v * LANES;
            __m512 x = sixteen(j, i[p], at, lanes[v], BFLOAT16, 0);
            if (j->x_type == FLOAT16) x = sixteen(j, i[p], at, lanes[v], FLOAT16, 0);
            _mm512_store_ps(wide + v * LANES, _mm512_add_ps(x, dropped(j, sum[p][v], i[p], at, lanes[v])));
        }
        if (j->x_type == BFLOAT16) store_avx512(narrow, wide, BFLOAT16);
        else store_avx512(narrow, wide, FLOAT16);
        int64_t columns = j->n - c < TILE ? j->n - c : TILE;
        memcpy((uint16_t *)(j->x + i[p] * j->x0) + c, narrow, columns * sizeof(uint16_t));
    }
}

static AVX512_TARGET void add_masked_avx512(const factor_job *j, int64_t begin, int64_t end) {
    for (int64_t first = 0; first < j->n; first += BLOCK)
        for (int64_t i = begin; i < end; i += 4)
            for (int64_t c = first; c < j->n && c < first + BLOCK; c += TILE) {
                int64_t rows[4];
                for (int p = 0; p < 4; p++) rows[p] = i + p < end ? i + p : end - 1;
                add_masked_tile(j, rows, end - i < 4 ? (int)(end - i) : 4, c);
            }
}
