/* Functions of the AVX-512 kernels with instructions that the compiler does not generate from noise_kernel.h: leading-zero
 * count, table lookup in registers, bit operations with three operands, and (AVX512_BF16) conversion to bfloat16. */

#define AVX512_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma")))
#define AVX512 static inline AVX512_TARGET
#define AVX512_BF16 static inline __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx512bf16,avx2,fma")))

/* Sixteen centers of intervals in [2^31, 2^32), the last one at its end: 2^31 times 1 + (2 k + 1) / 32, and 2. */
static const ALIGNED uint32_t CENTER[16] = {
    0x84000000u, 0x8c000000u, 0x94000000u, 0x9c000000u, 0xa4000000u, 0xac000000u, 0xb4000000u, 0xbc000000u,
    0xc4000000u, 0xcc000000u, 0xd4000000u, 0xdc000000u, 0xe4000000u, 0xec000000u, 0xf4000000u, 0};
static const ALIGNED float INVERSE[16] = { /* 1 / center */
#define INVERSE_OF(k) (float)(0x1p-31 / (1 + (2 * (k) + 1) / 32.0))
    INVERSE_OF(0), INVERSE_OF(1), INVERSE_OF(2), INVERSE_OF(3), INVERSE_OF(4), INVERSE_OF(5), INVERSE_OF(6), INVERSE_OF(7),
    INVERSE_OF(8), INVERSE_OF(9), INVERSE_OF(10), INVERSE_OF(11), INVERSE_OF(12), INVERSE_OF(13), INVERSE_OF(14), 0x1p-32f};
static const ALIGNED float LOGARITHM[16] = { /* -2 ln(center 2^-32) */
    1.32475104f, 1.20707004f, 1.09593034f, 0.990642874f, 0.890622033f, 0.795365935f, 0.704441187f, 0.617470963f,
    0.53412557f, 0.454114901f, 0.37718234f, 0.303099796f, 0.231663631f, 0.162691279f, 0.0960184384f, 0};

/* z of sixteen pairs of words: sqrt(-2 ln u) times cosine and sine of t. */
AVX512 void box_muller_16(float *cosines, float *sines, const uint32_t *radius_words, const uint32_t *angle_words) {
    /* u 2^32 = (word >> 8 + 1/2) 2^8 = m 2^-zeros, exactly, with m in [2^31, 2^32). The four bits after the leading bit of m
     * select a center c. With m = c (1 + f), |f| < 1/32: -2 ln u = -2 ln(c 2^-32) + 2 ln 2 zeros - 2 ln(1 + f). If u is close
     * to 1, c is 2^32, m - c is exact, and the first two terms are zero. */
    __m512i bits = _mm512_loadu_si512(radius_words);
    bits = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(0xFF), _mm512_set1_epi32(0x80), 0xBA); /* a & ~b | c */
    __m512i zeros = _mm512_lzcnt_epi32(bits), m = _mm512_sllv_epi32(bits, zeros), k = _mm512_srli_epi32(m, 27);
    __m512 f = _mm512_cvtepi32_ps(_mm512_sub_epi32(m, _mm512_permutexvar_epi32(k, _mm512_load_si512(CENTER))));
    f = _mm512_mul_ps(f, _mm512_permutexvar_ps(k, _mm512_load_ps(INVERSE)));
    __m512 rest = _mm512_permutexvar_ps(k, _mm512_load_ps(LOGARITHM));
    rest = _mm512_fmadd_ps(_mm512_cvtepi32_ps(zeros), _mm512_set1_ps(1.3862943611198906f), rest);
    /* -2 ln(1 + f) by its series, with the next term folded into the middle coefficient; error 7e-8 */
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(-0.6666666667f), f, _mm512_set1_ps(1.0003803614f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-2));
    __m512 radius = _mm512_sqrt_ps(_mm512_fmadd_ps(p, f, rest));

    /* t = pi/2 (quarter + x), x in [-1/2, 1/2): after half a quarter is added, the two highest bits of the word are the
     * quarter, and the next 22 bits are the mantissa of 3/2 + x. */
    __m512i turn = _mm512_add_epi32(_mm512_loadu_si512(angle_words), _mm512_set1_epi32(1 << 29));
    __m512i mantissa = _mm512_ternarylogic_epi32(
        _mm512_srli_epi32(turn, 7), _mm512_set1_epi32(0x7FFFFE), _mm512_set1_epi32(0x3F800000), 0xEA); /* a & b | c */
    __m512 x = _mm512_sub_ps(_mm512_castsi512_ps(mantissa), _mm512_set1_ps(1.5f)), y = _mm512_mul_ps(x, x);
    __m512 sine = _mm512_fmadd_ps(_mm512_set1_ps(-0.00459228907497909f), y, _mm512_set1_ps(0.079675902969729f));
    sine = _mm512_fmadd_ps(sine, y, _mm512_set1_ps(-0.6459629381673019f));
    sine = _mm512_mul_ps(_mm512_fmadd_ps(sine, y, _mm512_set1_ps(1.5707963050854583f)), x);
    __m512 cosine = _mm512_fmadd_ps(_mm512_set1_ps(-0.02040835253925319f), y, _mm512_set1_ps(0.253598644111163f));
    cosine = _mm512_fmadd_ps(cosine, y, _mm512_set1_ps(-1.23369701424789f));
    cosine = _mm512_fmadd_ps(cosine, y, _mm512_set1_ps(0.9999999724233218f));
    /* an odd quarter swaps them; the sign of the cosine is the highest bit of the next quarter */
    __mmask16 odd = _mm512_test_epi32_mask(turn, _mm512_set1_epi32(1 << 30));
    __m512i a = _mm512_castps_si512(_mm512_mask_blend_ps(odd, cosine, sine));
    __m512i b = _mm512_castps_si512(_mm512_mask_blend_ps(odd, sine, cosine));
    __m512i next = _mm512_add_epi32(turn, _mm512_set1_epi32(1 << 30)), sign = _mm512_set1_epi32(INT32_MIN);
    a = _mm512_ternarylogic_epi32(a, next, sign, 0x78); /* a ^ b & c */
    b = _mm512_ternarylogic_epi32(b, turn, sign, 0x78);
    _mm512_storeu_ps(cosines, _mm512_mul_ps(radius, _mm512_castsi512_ps(a)));
    _mm512_storeu_ps(sines, _mm512_mul_ps(radius, _mm512_castsi512_ps(b)));
}

/* Interleave the low halves of the 64-bit lanes of two vectors: a0 b0 a1 b1 ... */
AVX512 __m512i interleave(__m512i a, __m512i b) {
    const __m512i order = _mm512_set_epi32(30, 14, 28, 12, 26, 10, 24, 8, 22, 6, 20, 4, 18, 2, 16, 0);
    return _mm512_permutex2var_epi32(a, order, b);
}

/* Round 64 numbers to bfloat16. 0 if one of them is subnormal, which the instruction would flush to zero. */
AVX512_BF16 int to_bfloat16(uint16_t *out, const float *x) {
    unsigned subnormal = 0;
    for (int j = 0; j < TILE; j += 32) {
        __m512 low = _mm512_loadu_ps(x + j), high = _mm512_loadu_ps(x + j + 16);
        subnormal |= _mm512_fpclass_ps_mask(low, 0x20) | _mm512_fpclass_ps_mask(high, 0x20);
        _mm512_storeu_si512(out + j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    return !subnormal;
}
