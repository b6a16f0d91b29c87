/* out = W + std * z in one pass over W, with the z of the noise contract (see ../philox.py). Optionally, the row norms of
 * W + s B A, to which std is relative, are computed first. Other functions multiply with the factors of an adapter.
 *
 * A plain shared library, called from Python through ctypes (see ../native.py): it uses no Python.h, no torch headers and
 * no libraries except libc, libm and threads. The kernel is compiled once for each instruction set and selected at run time.
 */
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define ALIGNED __attribute__((aligned(64)))
#define PREFETCH(p, bytes, to_write) \
    for (int64_t line = 0; line < (bytes); line += 64) __builtin_prefetch((p) + line, to_write)
#else
#define ALIGNED
#define PREFETCH(p, bytes, to_write)
#endif
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>
#define EXPORT __attribute__((visibility("default")))
#endif
#if defined(_MSC_VER)
#define restrict __restrict
#endif

enum { LANES = 16, TILE = 64, SPAN = 32, ROUNDS = 10, PANEL = 32, BLOCK = 512, AHEAD = 1024, MAX_THREADS = 256 };
#define MULTIPLIER0 0xD2511F53u
#define MULTIPLIER1 0xCD9E8D57u
#define WEYL0 0x9E3779B9u
#define WEYL1 0xBB67AE85u

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
static const int64_t SIZE[] = {4, 8, 2, 2};

typedef struct {
    uint32_t key[2], layer, sample;
} stream;

typedef struct {
    char *out;            /* (m, n) */
    const char *weight;   /* (m, n) */
    int64_t o0, o1;       /* strides of out, in bytes */
    int64_t w0, w1;       /* strides of W, in bytes */
    int o_type, w_type;
    void *norms;          /* (m,) double if W is double, else float */
    double relative;      /* std_i = relative norm_i */
    const int64_t *index; /* (m,) rows of the whole weight, or NULL: first_row, first_row + 1, ... */
    int64_t first_row, first_column, m, n; /* W is a part of the whole weight, from there on */
    stream s;
    const float *b, *a;   /* (m, r) and (r, n): write the row norms of W + s B A to norms. NULL: read norms */
    float scaling;        /* s */
    int64_t r;
    int kernel;
} job;

typedef struct {
    char *out;            /* (t, n) with contiguous rows */
    int64_t o0;           /* row stride of out, in bytes */
    int o_type;
    const float *left;    /* (t, r) */
    const float *right;   /* (r, n) */
    int64_t n, r;
    int kernel;
} product_job;

typedef struct {
    char *x;              /* (t, n) of 16-bit numbers with contiguous rows */
    int64_t x0;           /* row stride of x, in bytes */
    int x_type;
    const uint8_t *mask;  /* (t, n): which elements of x dropout keeps, or NULL */
    float keep;           /* factor of those */
    const float *left;    /* (t, r), to add */
    const float *factor;  /* (r, n), or (t, r) to gather */
    float *out;           /* (t, r), or (r, n) to gather */
    int64_t t, n, r;
} factor_job;

static inline float as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline int32_t as_int(float f) {
    int32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static inline uint32_t row_of(const job *j, int64_t i) { return (uint32_t)(j->index ? j->index[i] : j->first_row + i); }

static inline double std_of(const job *j, int64_t i) {
    return j->relative * (j->w_type == FLOAT64 ? ((const double *)j->norms)[i] : ((const float *)j->norms)[i]);
}

/* Sum of squares of the elements c, c + 1, ... of row i of W + s B A. */
static float rest_of_row(const job *j, int64_t i, int64_t c) {
    const char *row = j->weight + i * j->w0;
    float sum = 0;
    for (; c < j->n; c++) {
        float x = j->w_type == FLOAT32 ? ((const float *)row)[c] : as_float((uint32_t)((const uint16_t *)row)[c] << 16);
        for (int64_t k = 0; k < j->r; k++) x += j->scaling * j->b[i * j->r + k] * j->a[k * j->n + c];
        sum += x * x;
    }
    return sum;
}

/* The norm of row i of W + s B A, computed in double. */
static float wide_norm(const job *j, int64_t i) {
    const char *row = j->weight + i * j->w0;
    double sum = 0;
    for (int64_t c = 0; c < j->n; c += TILE) {
        int columns = j->n - c < TILE ? (int)(j->n - c) : TILE;
        double low_rank[TILE] = {0};
        for (int64_t k = 0; k < j->r; k++)
            for (int q = 0; q < columns; q++) low_rank[q] += (double)j->b[i * j->r + k] * j->a[k * j->n + c + q];
        for (int q = 0; q < columns; q++) {
            float w = j->w_type == FLOAT32 ? ((const float *)row)[c + q]
                                           : as_float((uint32_t)((const uint16_t *)row)[c + q] << 16);
            double x = w + j->scaling * low_rank[q];
            sum += x * x;
        }
    }
    return (float)sqrt(sum);
}

/* The norm of row i from its sum of squares. The sum is computed again in double if it is infinite, or so small that
 * squares may have underflowed (below the smallest normal number / 2^-24 for each column). */
static float norm_of(const job *j, int64_t i, float sum) {
    return sum >= (float)j->n * 0x1p-102f && sum <= FLT_MAX ? sqrtf(sum) : wide_norm(j, i);
}

/* Copy a block of elements between two layouts, along the columns if these are contiguous. */
#define COPY(T)                                                                                     \
    for (int a = 0; a < outer; a++) {                                                               \
        char *d = to + a * to_outer;                                                                \
        const char *f = from + a * from_outer;                                                      \
        for (int b = 0; b < inner; b++, d += to_inner, f += from_inner) *(T *)d = *(const T *)f;    \
    }

static void copy(char *to, int64_t to0, int64_t to1, const char *from, int64_t from0, int64_t from1, int rows,
                 int columns, int64_t size) {
    int down = from0 == size || to0 == size;
    int outer = down ? columns : rows, inner = down ? rows : columns;
    int64_t to_outer = down ? to1 : to0, to_inner = down ? to0 : to1;
    int64_t from_outer = down ? from1 : from0, from_inner = down ? from0 : from1;
    if (to_inner == size && from_inner == size)
        for (int a = 0; a < outer; a++) memcpy(to + a * to_outer, from + a * from_outer, inner * size);
    else if (size == 2) COPY(uint16_t)
    else if (size == 4) COPY(uint32_t)
    else COPY(uint64_t)
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(_WIN32) /* gcc does not align wide vectors on Windows stacks */
#define DISPATCH 1
#include <immintrin.h>

#include "avx512.h"

#if defined(__clang__)
#define WIDE
#else
#define WIDE ",prefer-vector-width=512"
#endif
#define NAME(x) x##_avx512
#define AT_ONCE 4
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma" WIDE)))
#define VECTOR 64
#define MULTIPLY(a, b) ((lanes_avx512)_mm512_mul_epu32((__m512i)(a), _mm512_set1_epi64(b)))
#define TOGETHER 2
#define INTERLEAVE(a, b) ((lanes_avx512)interleave((__m512i)(a), (__m512i)(b)))
#define BOX_MULLER box_muller_16
#define HALF_TO_FLOAT(x, h) _mm512_storeu_ps(x, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(h))))
#define FLOAT_TO_HALF(h, x) _mm256_storeu_si256((__m256i *)(h), _mm512_cvtps_ph(_mm512_loadu_ps(x), 0))
#include "noise_kernel.h"
#include "factors_avx512.h"

#define NAME(x) x##_avx512bf16
#define AT_ONCE 4
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx512bf16,avx2,fma" WIDE)))
#define VECTOR 64
#define MULTIPLY(a, b) ((lanes_avx512bf16)_mm512_mul_epu32((__m512i)(a), _mm512_set1_epi64(b)))
#define TOGETHER 2
#define INTERLEAVE(a, b) ((lanes_avx512bf16)interleave((__m512i)(a), (__m512i)(b)))
#define BOX_MULLER box_muller_16
#define HALF_TO_FLOAT(x, h) _mm512_storeu_ps(x, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(h))))
#define FLOAT_TO_HALF(h, x) _mm256_storeu_si256((__m256i *)(h), _mm512_cvtps_ph(_mm512_loadu_ps(x), 0))
#define FLOAT_TO_BFLOAT to_bfloat16
#include "noise_kernel.h"

#define NAME(x) x##_avx2
#define AT_ONCE 2
#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR 32
#define MULTIPLY(a, b) ((lanes_avx2)_mm256_mul_epu32((__m256i)(a), _mm256_set1_epi64x(b)))
#define TOGETHER 1
#include "noise_kernel.h"
#endif

#define NAME(x) x##_baseline
#define AT_ONCE 2
#define TARGET
#include "noise_kernel.h"

static const struct {
    void (*rows)(const job *, int64_t, int64_t);
    void (*words)(uint32_t *, uint32_t, int64_t, int64_t, const stream *);
    void (*normals)(float *, const uint32_t *, int64_t);
    void (*norms)(const job *, int64_t, int64_t);
    void (*add_product)(const product_job *, int64_t, int64_t);
} KERNELS[] = {
    {rows_baseline, words_baseline, normals_baseline, norms_baseline, add_product_baseline},
#ifdef DISPATCH
    {rows_avx2, words_avx2, normals_avx2, norms_avx2, add_product_avx2},
    {rows_avx512, words_avx512, normals_avx512, norms_avx512, add_product_avx512},
    {rows_avx512bf16, words_avx512bf16, normals_avx512bf16, norms_avx512bf16, add_product_avx512bf16},
#endif
};

/* Version of the functions below: increment it when their arguments change, here and in ../native.py. */
EXPORT int flatlora_abi(void) { return 3; }

/* Index of the best of KERNELS that this machine supports. */
EXPORT int flatlora_best(void) {
#ifdef DISPATCH
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
        return 1;
    }
#endif
    return 0;
}

/* Threads: thread t of T computes the rows m t / T ... m (t + 1) / T - 1. A row does not depend on the thread. */
typedef struct {
    void (*work)(const void *, int64_t, int64_t); /* rows begin ... end - 1 of the job */
    const void *job;
    int64_t m;
    int threads, next;
} team;

static void share(team *t, int which) { t->work(t->job, t->m * which / t->threads, t->m * (which + 1) / t->threads); }

static void perturb(const void *arg, int64_t begin, int64_t end) {
    const job *j = arg;
    int64_t step = j->a ? PANEL : end - begin; /* the row is in the cache after its norm */
    for (int64_t i = begin; i < end; i += step) {
        int64_t stop = i + step < end ? i + step : end;
        if (j->a) KERNELS[j->kernel].norms(j, i, stop);
        if (j->out) KERNELS[j->kernel].rows(j, i, stop);
    }
}

static void add_product(const void *arg, int64_t begin, int64_t end) {
    const product_job *j = arg;
    KERNELS[j->kernel].add_product(j, begin, end);
}

#ifdef DISPATCH
static void project(const void *job, int64_t begin, int64_t end) { project_avx512(job, begin, end); }
static void gather(const void *job, int64_t begin, int64_t end) { gather_avx512(job, begin, end); }
static void add_masked(const void *job, int64_t begin, int64_t end) { add_masked_avx512(job, begin, end); }
static void (*const FACTOR_WORK[])(const void *, int64_t, int64_t) = {project, gather, add_masked};
#endif

#if defined(_WIN32)
static void run(team *t) {
    for (int which = 0; which < t->threads; which++) share(t, which);
}
#else
static void member(void *arg) {
    team *t = arg;
    int which;
    while ((which = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < t->threads) share(t, which);
}

static void *helper(void *t) {
    member(t);
    return NULL;
}

typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static gomp_parallel pool;
static pid_t home;

/* The OpenMP thread pool of torch's operators, if it is libgomp (or libomp, which has the same entry point). A second pool
 * would compete with it, since its threads keep spinning for milliseconds after each operator. */
__attribute__((constructor)) static void find_pool(void) {
    home = getpid();
    pool = (gomp_parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
}

static void run(team *t) {
    if (pool && getpid() == home) { /* a forked child does not have the threads of the pool */
        pool(member, t, t->threads, 0);
        return;
    }
    pthread_t helpers[MAX_THREADS];
    int started = 0;
    while (started < t->threads - 1 && pthread_create(&helpers[started], NULL, helper, t) == 0) started++;
    member(t);
    while (started > 0) pthread_join(helpers[--started], NULL);
}
#endif

static void start(team *t, int threads) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > t->m) threads = (int)t->m;
    t->threads = threads > 1 ? threads : 1;
    if (t->threads > 1) run(t);
    else share(t, 0);
}

/* out = W + relative norm z. If A is not NULL, first norm_i = ||W_i + s (B A)_i||; W is then float32 or bfloat16 with
 * contiguous rows. If out is NULL, only the norms. Strides are in elements; key: (2,) seed and sample. */
EXPORT void flatlora_perturb(void *out, int out_type, int64_t o0, int64_t o1, const void *weight, int weight_type,
                             int64_t w0, int64_t w1, void *norms, double relative, const int64_t *key, int64_t layer,
                             const int64_t *index, int64_t first_row, int64_t first_column, int64_t m, int64_t n,
                             const float *b, const float *a, float scaling, int64_t r, int threads, int kernel) {
    static const int64_t none[2];
    int64_t o = SIZE[out_type], w = SIZE[weight_type];
    if (!key) key = none;
    job j = {out, weight, o0 * o, o1 * o, w0 * w, w1 * w, out_type, weight_type, norms, relative, index, first_row,
             first_column, m, n, {{(uint32_t)key[0], (uint32_t)((uint64_t)key[0] >> 32)}, (uint32_t)layer, (uint32_t)key[1]},
             b, a, scaling, r, kernel};
    team t = {perturb, &j, m, 0, 0};
    start(&t, threads);
}

/* out += left right, summed in float32 and rounded once. out: (t, n), left: (t, r), right: (r, n). */
EXPORT void flatlora_add_product(void *out, int out_type, int64_t o0, const float *left, const float *right, int64_t rows,
                                 int64_t n, int64_t r, int threads, int kernel) {
    product_job j = {out, o0 * SIZE[out_type], out_type, left, right, n, r, kernel};
    team t = {add_product, &j, rows, 0, 0};
    start(&t, threads);
}

/* Products with the factors of an adapter; see factors_avx512.h. x: (t, n). `what` is
 *   0  out = dropout(x) factor^T     factor: (r, n), out: (t, r)
 *   1  out = factor^T dropout(x)     factor: (t, r), out: (r, n)
 *   2  x += keep mask (left factor)  left: (t, r), factor: (r, n)
 * Returns 0 without AVX-512. */
EXPORT int flatlora_factor(int what, void *x, int x_type, int64_t x0, const uint8_t *mask, float keep, const float *left,
                           const float *factor, float *out, int64_t t, int64_t n, int64_t r, int threads) {
#ifdef DISPATCH
    factor_job j = {x, x0 * SIZE[x_type], x_type, mask, keep, left, factor, out, t, n, r};
    team all = {FACTOR_WORK[what], &j, what == 1 ? (n + PANEL - 1) / PANEL : t, 0, 0};
    if (flatlora_best() < 2) return 0;
    start(&all, threads);
    return 1;
#else
    return 0;
#endif
}

/* out: (m, blocks, 4) */
EXPORT void flatlora_words(uint32_t *out, const int64_t *rows, int64_t m, int64_t first, int64_t blocks,
                           const int64_t *key, int64_t layer, int kernel) {
    stream s = {{(uint32_t)key[0], (uint32_t)((uint64_t)key[0] >> 32)}, (uint32_t)layer, (uint32_t)key[1]};
    for (int64_t i = 0; i < m; i++) KERNELS[kernel].words(out + 4 * blocks * i, (uint32_t)rows[i], first, blocks, &s);
}

/* out, words: (blocks, 4) */
EXPORT void flatlora_normals(float *out, const uint32_t *words, int64_t blocks, int kernel) {
    KERNELS[kernel].normals(out, words, blocks);
}
