/* The kernel over random shapes, strides and row lists, every operand in memory of exactly its size: compiled together
 * with noise.c under the sanitizers, which end the process at the first byte that is read or written outside. Elements
 * between those of a strided result must stay as they are.
 *
 *     sanitized CASES          runs that many random cases with each kernel of this machine
 *     sanitized CASES short    the same with one operand (the CASES-th) one element too short: the process must die
 */
#include "noise.c"

#include <stdio.h>
#include <stdlib.h>

static uint64_t state = 1;

static int64_t below(int64_t n) { /* xorshift */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (int64_t)(state % (uint64_t)n);
}

enum { W, OUT, NORMS, KEY, INDEX, B, A, OPERANDS };
static int too_short = -1;

/* `bytes` bytes on the heap, and no more. The numbers in them are small, and finite in every type. */
static void *memory(int operand, int64_t bytes, int64_t element) {
    if (operand == too_short) bytes -= element;
    unsigned char *p = malloc(bytes);
    for (int64_t i = 0; i < bytes; i++) p[i] = (unsigned char)(i % 2 ? 0x30 + below(4) : below(256));
    return p;
}

/* A layout of a matrix: contiguous, transposed, a slice of a wider one, both strides > 1, broadcast (if it is read). */
static int64_t layout(int64_t m, int64_t n, int kind, int64_t *down, int64_t *right) {
    int64_t gap = 1 + below(3);
    if (kind == 0) *down = n, *right = 1;
    else if (kind == 1) *down = 1, *right = m;
    else if (kind == 2) *down = n + gap, *right = 1;
    else if (kind == 3) *down = n * (1 + gap) + below(3), *right = 1 + gap;
    else *down = below(2), *right = 0;
    return m && n ? 1 + (m - 1) * *down + (n - 1) * *right : 0;
}

static void noise(int kernel) {
    int64_t m = below(below(4) ? 40 : 3), n = below(below(4) ? 300 : 70), r = below(5), w0, w1, o0, o1;
    int w_type = (int)below(4), o_type = (int)below(4), factors = w_type % 2 == 0 && below(2), indexed = (int)below(2);
    if (too_short >= 0) m = 3, n = 70, r = 2, indexed = 1, factors = too_short == B || too_short == A, w_type = FLOAT32;
    int64_t w_count = layout(m, n, factors ? 2 * (int)below(2) : (int)below(5), &w0, &w1);
    int64_t o_count = layout(m, n, (int)below(4), &o0, &o1), wide = w_type == FLOAT64 ? 8 : 4, size = SIZE[o_type];
    char *w = memory(W, w_count * SIZE[w_type], SIZE[w_type]), *o = memory(OUT, o_count * size, size);
    void *norms = memory(NORMS, m * wide, wide);
    int64_t *key = memory(KEY, 16, 8), *index = indexed ? memory(INDEX, 8 * m, 8) : NULL;
    float *b = factors ? memory(B, 4 * m * r, 4) : NULL, *a = factors ? memory(A, 4 * r * n, 4) : NULL;
    memset(o, 0xAB, o_count * size - (too_short == OUT ? size : 0));
    flatlora_perturb(below(8) || !factors ? o : NULL, o_type, o0, o1, w, w_type, w0, w1, norms, 0.1, key, below(1 << 30),
                     index, below((int64_t)1 << 32), below(2) * below(500), m, n, b, a, 0.5f, r, 1 + (int)below(4), kernel);

    char *touched = calloc(o_count ? o_count : 1, 1);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) touched[i * o0 + j * o1] = 1;
    for (int64_t e = 0; e < o_count; e++)
        for (int64_t byte = 0; byte < size; byte++)
            if (!touched[e] && (unsigned char)o[e * size + byte] != 0xAB) printf("written between\n"), exit(2);
    free(touched), free(w), free(o), free(norms), free(key), free(index), free(b), free(a);
}

static void product(int kernel) {
    static const int TYPES[] = {FLOAT32, BFLOAT16, FLOAT16};
    int type = TYPES[below(3)];
    int64_t t = below(20), n = below(300), r = below(5), gap = below(3), size = SIZE[type];
    char *out = memory(-2, (t ? (t - 1) * (n + gap) + n : 0) * size, 0);
    float *left = memory(-2, 4 * t * r, 0), *right = memory(-2, 4 * r * n, 0);
    flatlora_add_product(out, type, n + gap, left, right, t, n, r, 1 + (int)below(4), kernel);
    free(out), free(left), free(right);
}

static void factor(void) {
    static const int TYPES[] = {BFLOAT16, FLOAT16};
    int type = TYPES[below(2)], what = (int)below(3);
    int64_t t = below(20) + 1, n = below(1100) + 1, r = below(20) + 1, gap = below(3);
    void *x = memory(-2, ((t - 1) * (n + gap) + n) * 2, 0);
    uint8_t *mask = what == 2 || below(2) ? memory(-2, t * n, 0) : NULL;
    float *left = what == 2 ? memory(-2, 4 * t * r, 0) : NULL, *factor = memory(-2, 4 * r * (what == 1 ? t : n), 0);
    float *out = what == 2 ? NULL : memory(-2, 4 * r * (what == 1 ? n : t), 0);
    flatlora_factor(what, x, type, n + gap, mask, 1.5f, left, factor, out, t, n, r, 1 + (int)below(4));
    free(x), free(mask), free(left), free(factor), free(out);
}

static void for_tests(int kernel) {
    int64_t m = below(5), blocks = below(100), *rows = memory(-2, 8 * m, 0), *key = memory(-2, 16, 0);
    uint32_t *words = memory(-2, 16 * m * blocks, 0);
    float *normals = memory(-2, 16 * m * blocks, 0);
    flatlora_words(words, rows, m, below((int64_t)1 << 31), blocks, key, below(100), kernel);
    flatlora_normals(normals, words, m * blocks, kernel);
    free(rows), free(key), free(words), free(normals);
}

int main(int count, char **arguments) {
    int cases = atoi(arguments[1]);
    if (count > 2) {
        too_short = cases, cases = 1;
        for (int k = 0; k < 20; k++) noise(k % (flatlora_best() + 1));
        return 0;
    }
    for (int k = 0; k < cases; k++)
        for (int kernel = 0; kernel <= flatlora_best(); kernel++) noise(kernel), product(kernel), factor(), for_tests(kernel);
    printf("%d cases, %d kernels\n", cases, flatlora_best() + 1);
    return 0;
}
