// Vectors of numbers, and numbers of 16 bits: what all that is compiled behind it has in common.

// Lanes of a vector, and how many registers of them there are for the sums of a tile (the rest is for what is read).
#ifdef __AVX512F__
constexpr int LANES = 16, SUMS = 16;
#else
constexpr int LANES = 8, SUMS = 8;
#endif
constexpr int PAD = 16;     // runs of weights are padded to (native.py)
typedef float V __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * LANES), aligned(4)));

// (A memcpy of a vector goes by halves over the stack in GCC 12 for AVX2, and waits for its own stores.)
static inline V load(const void* p) { return *(const V*)p; }
static inline void store(float* p, V v) { *(V*)p = v; }

static inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, mantissa = h & 0x3ff, exponent = (h >> 10) & 31, bits;
  if (exponent == 0) {
    float tiny = float(mantissa) * 5.9604644775390625e-8f;   // subnormal: units of 2^-24
    return sign ? -tiny : tiny;
  }
  bits = sign | (exponent == 31 ? 0x7f800000u | (mantissa << 13) : ((exponent + 112) << 23) | (mantissa << 13));
  float f; std::memcpy(&f, &bits, 4); return f;
}

// ``count`` <= LANES numbers of the model's dtype, zeros behind.
template <int KIND> static inline V numbers(const uint8_t* p, int64_t count) {
  V v = {};
  if (KIND == 0) {
    if (count == LANES) return load(p);
    std::memcpy(&v, p, 4 * count);
    return v;
  }
  uint16_t raw[LANES] = {};
  if (count < LANES) { std::memcpy(raw, p, 2 * count); p = (const uint8_t*)raw; }
#if defined(__AVX512F__)
  const __m256i few = _mm256_loadu_si256((const __m256i*)p);
  return KIND == 1 ? (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(few), 16) : (V)_mm512_cvtph_ps(few);
#elif defined(__AVX2__) && defined(__F16C__)
  const __m128i few = _mm_loadu_si128((const __m128i*)p);
  return KIND == 1 ? (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(few), 16) : (V)_mm256_cvtph_ps(few);
#else
  for (int i = 0; i < LANES; i++) {
    uint16_t half; std::memcpy(&half, p + 2 * i, 2);
    const uint32_t wide = uint32_t(half) << 16;
    float f; std::memcpy(&f, &wide, 4);
    v[i] = KIND == 1 ? f : half_to_float(half);
  }
  return v;
#endif
}

static inline uint16_t float_to_half(float f) {   // to the nearest, ties to even
  uint32_t bits; std::memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;    // from 65520 on
  if (bits < 0x38800000) {                         // subnormal: units of 2^-24
    float size; std::memcpy(&size, &bits, 4);
    return sign | uint16_t(std::nearbyint(size * 16777216.0f));
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | uint16_t((bits - 0x38000000) >> 13);
}

static inline uint16_t float_to_bfloat(float f) {
  uint32_t bits; std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A vector of numbers in ``kind``.
static inline void put(V v, int64_t kind, uint8_t* to) {
  if (kind == 0) {
    store((float*)to, v);
    return;
  }
  I wide = (I)v;
  wide = v != v ? (I{} + 0x7fc0) : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;   // bf16
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, kind == 1 ? _mm512_cvtepi32_epi16((__m512i)wide) : _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m256i low = (__m256i)(wide & 0xffff);
  const __m128i two = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storeu_si128((__m128i*)to, kind == 1 ? two : _mm256_cvtps_ph((__m256)v, 0));
#else
  uint16_t two[LANES];
  for (int i = 0; i < LANES; i++) two[i] = kind == 1 ? uint16_t(wide[i]) : float_to_half(v[i]);
  std::memcpy(to, two, sizeof(two));
#endif
}

// ``count`` <= LANES bytes as integers; CENTRED: less 128, so that sums of levels are small numbers and rounded as such.
// (GCC 12 widens bytes by __builtin_convertvector one by one.)
template <bool CENTRED> static inline I bytes(const uint8_t* p, int64_t count) {
  uint8_t few[LANES] = {};
  if (count < LANES) { std::memcpy(few, p, count); p = few; }
#ifdef __AVX512F__
  const __m128i raw = _mm_loadu_si128((const __m128i*)p);
  if (CENTRED) return (I)_mm512_cvtepi8_epi32(_mm_xor_si128(raw, _mm_set1_epi8(-128)));
  return (I)_mm512_cvtepu8_epi32(raw);
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadl_epi64((const __m128i*)p);
  if (CENTRED) return (I)_mm256_cvtepi8_epi32(_mm_xor_si128(raw, _mm_set1_epi8(-128)));
  return (I)_mm256_cvtepu8_epi32(raw);
#else
  int32_t wide[LANES];
  for (int i = 0; i < LANES; i++) wide[i] = int32_t(p[i]) - (CENTRED ? 128 : 0);
  I v; std::memcpy(&v, wide, sizeof(I));
  return v;
#endif
}

template <int BITS> static inline V field(I wide, int64_t f) {   // BITS below 1 are never called
  constexpr int bits = BITS > 0 ? BITS : 8;
  return __builtin_convertvector(bits == 8 ? wide : (wide >> int(f * bits)) & ((1 << bits) - 1), V);
}

typedef float Q __attribute__((vector_size(16), aligned(4)));

// A vector's quarters, or halves, added up.
static inline Q folded(V v) {
  constexpr int parts = LANES / 4;
  Q q[parts]; std::memcpy(q, &v, sizeof(V));
  for (int n = parts / 2; n; n /= 2) for (int i = 0; i < n; i++) q[i] += q[i + n];
  return q[0];
}

static inline float total(V v) {
  const Q q = folded(v);
  return (q[0] + q[1]) + (q[2] + q[3]);
}

// Numbers AT of those of a and, behind them, b. (GCC before 12 knows the first spelling alone, Clang the second.)
template <int... AT, typename T> static inline T mixed(T a, T b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, AT...);
#else
  typedef int32_t K __attribute__((vector_size(sizeof(T))));
  return __builtin_shuffle(a, b, K{AT...});
#endif
}

// The totals of four vectors.
static inline Q totals(V a, V b, V c, V d) {
#if defined(__AVX512F__)
  const auto halved = [](V one, V two) {     // per quarter: one, two, one, two
    return mixed<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(one, two) +
           mixed<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(one, two);
  };
  const V ab = halved(a, b), cd = halved(c, d);
  return folded(mixed<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(ab, cd) +
                mixed<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(ab, cd));   // per quarter: a, b, c, d
#else
  const auto halved = [](Q one, Q two) { return mixed<0, 4, 1, 5>(one, two) + mixed<2, 6, 3, 7>(one, two); };
  const Q ab = halved(folded(a), folded(b)), cd = halved(folded(c), folded(d));
  return mixed<0, 1, 4, 5>(ab, cd) + mixed<2, 3, 6, 7>(ab, cd);
#endif
}

static inline int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

static inline V constant(float x) { return x - V{}; }   // a loop over lanes becomes LANES masked broadcasts in GCC 12
