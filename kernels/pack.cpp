// Rows of bytes from latents, and latents from rows: packing.pack and packing.unpack, a token at a time.

// One plane of a segment: ``bits`` bits of ``columns`` quantised columns from ``first`` on, those above ``shift``, at ``offset``
// of the row. Byte j has columns j, j + n, j + 2 n .. of them from its lowest bits on, n bytes.
struct Field { int64_t first, columns, shift, bits, offset; };

// What a format and a codec say. ``exact`` columns come first, as numbers of ``kind``, and ``quantised`` ones behind them, whose steps at
// scale 1 and 2^(bits - 1) are ``step`` and ``half``; ``offsets`` [choices, columns]; ``spread`` [columns] (or null); ``scale``
// and ``index``: where in a row of ``width`` bytes they are (-1: nowhere).
struct Codec {
  int64_t exact, kind, quantised, choices, width, scale, index;
  const Field* fields; int64_t n;
  const float *step, *half, *offsets, *spread, *clips; int64_t candidates;
  float least, snap;
};

static inline V down(V v) {
#if defined(__AVX512F__)
  return (V)_mm512_floor_ps((__m512)v);
#elif defined(__AVX2__)
  return (V)_mm256_floor_ps((__m256)v);
#else
  for (int i = 0; i < LANES; i++) v[i] = std::floor(v[i]);
  return v;
#endif
}

// Levels 0 .. 2 half - 1.
static inline V level(V value, V step, V half) {
  V q = down(value / step);
  q = q < -half ? -half : q;
  q = q > half - 1 ? half - 1 : q;
  return q + half;
}

// The scale of a token's quantised ``values`` (padded with zeros, as ``spread`` is) of least squared error, in fp16.
static uint16_t best_scale(const Codec& c, const float* values, const float* spread) {
  V most = {};
  bool known = true;
  for (int64_t j = 0; j < c.quantised; j += LANES) {
    const V v = load(values + j), size = (v < 0 ? -v : v) / (load(c.step + j) * load(c.half + j));
    most = size > most ? size : most;
  }
  for (int64_t j = 0; j < c.quantised; j++) known &= values[j] == values[j];
  if (!known) return 0x7e00;                       // what is no number is read as none
  float largest = 0, least = INFINITY;
  for (int i = 0; i < LANES; i++) largest = std::max(largest, most[i]);
  auto limited = [&](float s) { return float_to_half(std::min(std::max(s, c.least), 65504.0f)); };
  uint16_t best = limited(largest);
  for (int64_t i = 0; i < c.candidates; i++) {
    const uint16_t candidate = limited(largest * c.clips[i]);
    const float scale = half_to_float(candidate);
    V sum = {};
    for (int64_t j = 0; j < c.quantised; j += LANES) {
      const V v = load(values + j), half = load(c.half + j), step = scale * load(c.step + j);
      const V off = ((level(v, step, half) - (half - 0.5f)) * step - v) * load(spread + j);
      sum += off * off;
    }
    const float error = total(sum);
    if (error < least) { least = error; best = candidate; }
  }
  return best;
}

static void pack_field(const Field& f, const int32_t* levels, uint8_t* row) {
  const int64_t each = 8 / f.bits, count = (f.columns + each - 1) / each;
  const int mask = (1 << f.bits) - 1;
  const int32_t* from = levels + f.first;
  uint8_t* to = row + f.offset;
  for (int64_t j = 0; j < count; j++) to[j] = uint8_t((from[j] >> f.shift) & mask);
  for (int64_t i = 1; i < each; i++) {
    const int64_t rest = std::min(count, f.columns - i * count), by = i * f.bits;
    for (int64_t j = 0; j < rest; j++) to[j] = uint8_t(to[j] | ((from[i * count + j] >> f.shift) & mask) << by);
  }
}

// Takes the nearest mean off ``values`` and says which it is.
static int64_t less_mean(const Codec& c, const float* near, float* values) {
  int64_t index = 0;
  float most = 0;
  for (int64_t i = 1; i < c.choices; i++) if (near[i - 1] > most || (near[i - 1] != near[i - 1] && most == most)) {
    most = near[i - 1];
    index = i;
  }
  const int64_t columns = c.exact + c.quantised;
  const float* gap = c.offsets + index * columns;
  float away = 0, size = 0;
  for (int64_t j = 0; j < columns; j++) {
    const float unit = c.spread ? c.spread[j] : 1.0f;
    values[j] -= gap[j];
    away += values[j] * unit * values[j] * unit;
    size += gap[j] * unit * gap[j] * unit;
  }
  if (std::sqrt(away) <= c.snap * std::sqrt(size)) std::fill(values, values + columns, 0.0f);
  return index;
}

// Where latents are made of what the model projects: P^T, each group of features into its own columns alone, and rows for
// further means, of all features (fp32); ``places`` [groups, own columns] in a row; ``shift`` [columns + choices - 1] or null.
// Where groups are ``apart`` 0 the matrix is one for all of them, and its columns are in a row group by group.
struct Projection { Matrix matrix; const int64_t* places; const float* shift; };

static void project(const Projection& p, const uint8_t* y, int64_t kind, int64_t columns, int64_t all, float* own, float* to) {
  const Matrix& a = p.matrix;
  const Lines lines = {(void*)y, kind, 1, a.heads, 1, 0, a.dim, 0};
  if (!a.apart) {
    Matrix one = a;
    one.heads = 1;
    asked(one, lines, {0, 0, a.heads, a.heads, a.heads}, to, a.rows, nullptr);
    for (int64_t j = 0; p.shift && j < all; j++) to[j] += p.shift[j];
    return;
  }
  const int64_t each = columns / a.heads;
  for (int64_t j = 0; j < all; j++) to[j] = p.shift ? p.shift[j] : 0;
  for (int64_t h = 0; h < a.heads; h++) {
    asked(a, lines, {h, 0, 1, 1, a.heads}, own, a.rows, nullptr);
    for (int64_t i = 0; i < each; i++) to[p.places[h * each + i]] += own[h * a.rows + i];
    for (int64_t i = each; i < a.rows; i++) to[columns + i - each] += own[h * a.rows + i];
  }
}

// latent [tokens, columns + choices - 1] of numbers of ``kind`` (or, where it ``projects``, y [tokens, features]), ``stride``
// bytes apart -> rows [tokens, width]. The codec's ``step`` and ``half`` have zeros' worth of ones behind them up to whole vectors.
// ``few``: of more tokens latents are not made of y here, nor where columns are not ``divided`` into groups.
struct Item {
  const uint8_t* latent; uint8_t* rows; int64_t kind, tokens, stride, projects, few, divided;
  Codec codec; Projection projection;
};

constexpr int64_t FEW_COLUMNS = 32768;   // of all rows, that one thread packs or unpacks: more are worth waking the others

static void pack(const Item* items, int64_t n, int64_t threads) {
  int64_t most = 0, widest = 0, owned = 0, all_tokens = 0;
  for (int64_t i = 0; i < n; i++) {
    const Codec& c = items[i].codec;
    most = std::max(most, c.exact + c.quantised + c.choices - 1);
    widest = std::max(widest, c.quantised);
    if (items[i].projects) owned = std::max(owned, items[i].projection.matrix.heads * items[i].projection.matrix.rows);
    all_tokens += items[i].tokens;
  }
#pragma omp parallel num_threads(std::max<int64_t>(1, std::min(threads, all_tokens)))
  {
    std::vector<float> held(most + 2 * LANES), spread(widest + 2 * LANES), quantised(widest + 2 * LANES), own(owned);
    std::vector<int32_t> levels(widest + 2 * LANES);
    int64_t last = -1;
#pragma omp for
    for (int64_t k = 0; k < all_tokens; k++) {
      int64_t t = k, i = 0;
      while (t >= items[i].tokens) t -= items[i++].tokens;
      const Item& a = items[i];
      const Codec& c = a.codec;
      const int64_t columns = c.exact + c.quantised, all = columns + c.choices - 1;
      if (i != last) {
        last = i;
        std::fill(spread.begin(), spread.end(), 0.0f);
        std::fill(quantised.begin(), quantised.end(), 0.0f);
        for (int64_t j = 0; j < c.quantised; j++) spread[j] = c.spread ? c.spread[c.exact + j] : 1.0f;
      }
      const uint8_t* from = a.latent + t * a.stride;
      uint8_t* row = a.rows + t * c.width;
      float* const values = held.data();
      if (a.projects) project(a.projection, from, a.kind, columns, all, own.data(), values);
      else widened(from, a.kind, 0, all, values);
      const int64_t index = c.choices > 1 ? less_mean(c, values + columns, values) : 0;
      std::fill(row, row + c.width, uint8_t(0));
      if (c.kind == 0) {
        std::memcpy(row, values, 4 * c.exact);
      } else {
        for (int64_t j = 0; j < c.exact; j++) {
          const uint16_t two = c.kind == 1 ? float_to_bfloat(values[j]) : float_to_half(values[j]);
          std::memcpy(row + 2 * j, &two, 2);
        }
      }
      if (c.scale >= 0) {
        std::memcpy(quantised.data(), values + c.exact, 4 * c.quantised);
        const uint16_t best = best_scale(c, quantised.data(), spread.data());
        const float scale = half_to_float(best);
        for (int64_t j = 0; j < c.quantised; j += LANES) {
          const V q = level(load(quantised.data() + j), scale * load(c.step + j), load(c.half + j));
          *(I*)&levels[j] = __builtin_convertvector(q, I);
        }
        const uint16_t written = best | (c.choices == 2 && index == 1 ? 0x8000 : 0);
        std::memcpy(row + c.scale, &written, 2);
        for (int64_t i = 0; i < c.n; i++) pack_field(c.fields[i], levels.data(), row);
      }
      if (c.index >= 0) row[c.index] = uint8_t(index + 1);
    }
  }
}

// One plane of a segment into its columns' levels. Runs in order: what a vector writes behind its own columns is zero, and is
// written again where there is more. ``row`` and ``levels`` have a vector's room behind them.
static void unpack_field(const Field& f, const uint8_t* row, int32_t* levels) {
  const int64_t each = 8 / f.bits, count = (f.columns + each - 1) / each;
  const int mask = (1 << f.bits) - 1, shift = int(f.shift);
  I lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  for (int64_t i = 0; i < each; i++) {
    const int64_t rest = std::min(count, f.columns - i * count), by = i * f.bits;
    int32_t* to = levels + f.first + i * count;
    for (int64_t j = 0; j < rest; j += LANES) {
      const I raw = bytes<false>(row + f.offset + j, LANES) & (lane < int(rest - j));
      *(I*)(to + j) = ((raw >> int(by)) & mask) << shift;
    }
  }
}

// rows [tokens, batch, width], strides in bytes -> latent [tokens, batch, columns + choices - 1] of numbers of the codec's kind.
extern "C" void lorc_unpack(const uint8_t* rows, int64_t tokens, int64_t batch, int64_t stride_t, int64_t stride_b,
                            const Codec* codec, uint8_t* latent, int64_t most) {
  const Codec& c = *codec;
  const int64_t element = c.kind == 0 ? 4 : 2, all = c.exact + c.quantised + c.choices - 1;
  const int64_t threads = tokens * batch * all <= FEW_COLUMNS ? 1 : most;
  const uint8_t* end = rows + (tokens - 1) * stride_t + (batch - 1) * stride_b + c.width;
#pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> levels(c.quantised + 2 * LANES), upper(c.quantised + 2 * LANES);   // (a sum of two: no waiting)
    std::vector<uint8_t> held(c.width + 2 * LANES), made(all * element + 4 * LANES);
#pragma omp for
    for (int64_t i = 0; i < tokens * batch; i++) {
      const uint8_t* row = rows + i / batch * stride_t + i % batch * stride_b;
      uint8_t* to = made.data();
      if (row + c.width + LANES > end) row = (uint8_t*)std::memcpy(held.data(), row, c.width);
      std::memcpy(to, row, c.exact * element);
      int64_t index = 0;
      if (c.scale >= 0) {
        uint16_t two; std::memcpy(&two, row + c.scale, 2);
        float scale = half_to_float(two);
        if (c.choices == 2 && scale < 0) { index = 1; scale = -scale; }
        for (int64_t k = 0; k < c.n; k++) unpack_field(c.fields[k], row, (c.fields[k].shift ? upper : levels).data());
        for (int64_t j = 0; j < c.quantised; j += LANES) {
          const V level = __builtin_convertvector(*(const I*)&levels[j] + *(const I*)&upper[j], V);
          put((level - (load(c.half + j) - 0.5f)) * (scale * load(c.step + j)), c.kind, to + (c.exact + j) * element);
        }
      }
      if (c.index >= 0) index = int64_t(row[c.index]) - 1;
      for (int64_t j = 1; j < c.choices; j++) {
        const float one = index == j ? 1.0f : 0.0f;
        const uint16_t two = c.kind == 1 ? float_to_bfloat(one) : float_to_half(one);
        std::memcpy(to + (c.exact + c.quantised + j - 1) * element, c.kind == 0 ? (void*)&one : (void*)&two, element);
      }
      std::memcpy(latent + i * all * element, to, all * element);
    }
  }
}
