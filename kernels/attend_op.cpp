// ``lorc::attend`` of tensors on a CPU (compiled behind attend.cpp): a step calls it once for each layer, between products
// whose weights push all else out of the caches, where each line of Python in front of it would cost more than what it reads.
//
// What of a reader's calls is the same each time comes from Python (fused.py), by the digest of the reader; so does how many
// tokens are read at a time. A call of which this is not known goes by Python, which tells it on the way.

// Of keys or of values: which tensors a codec has here. ``turned``: rows hold heads times the orthonormal matrix that is its
// last tensor.
struct Side { int64_t decodes, mean, turned; };

// ``normed``: keys' codec has weights of a norm before its table of angles. ``dim`` of a result's head. ``extras``, of which
// those in ``flags`` (a bit each) are taken as flags; behind them the sink where ``sink``.
struct Plan { Call call; Side key, value; int64_t normed, dim, extras, flags, sink; };

// Tokens at a time, for caches whose sizes have these exponents (tuned.py).
struct Choice { int64_t tokens, batch, heads, queries, threads, chunk; };

struct Known { const Plan* plan = nullptr; std::vector<Choice> choices; };

struct Registry {
  std::shared_mutex mutex;
  std::unordered_map<std::string, Known> known;
};

static Registry& registry() { static auto* const found = new Registry; return *found; }

static int64_t bucket(int64_t size) {
  int64_t bits = 0;
  for (int64_t left = size - 1; left > 0; left >>= 1) bits++;
  return bits;
}

static int64_t kind_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return 0;
    case at::kBFloat16: return 1;
    case at::kHalf: return 2;
    default: return -1;
  }
}

// The tensor where C++ can read it, its last dimension without gaps; else a copy in fp32.
static at::Tensor readable(const at::Tensor& t) {
  return kind_of(t) >= 0 && t.stride(-1) == 1 ? t : t.to(at::kFloat).contiguous();
}

// Where rows and the codec's matrix and mean are. ``held``: what a call points to.
static void given(Rows& rows, Matrix& matrix, const Side& side, const at::Tensor& stored, at::TensorList codec, bool turns,
                  std::vector<at::Tensor>& held) {
  rows.rows = (const uint8_t*)stored.const_data_ptr();
  rows.tokens = stored.size(0);
  rows.stride_t = stored.stride(0) * stored.element_size();
  rows.stride_b = stored.stride(1) * stored.element_size();
  size_t at = 0;
  if (side.decodes) {
    const at::Tensor& decode = held.emplace_back(readable(codec[at++]));
    matrix.data = decode.const_data_ptr();
    matrix.kind = kind_of(decode);
    matrix.row = decode.stride(0);
  }
  if (side.mean) {
    const at::Tensor& mean = held.emplace_back(readable(codec[at++]));
    matrix.mean = mean.const_data_ptr();
    matrix.mean_kind = kind_of(mean);
  }
  if (side.turned && turns) {
    const at::Tensor& turn = held.emplace_back(readable(codec.back()));
    matrix.data = turn.const_data_ptr();
    matrix.kind = kind_of(turn);
    matrix.row = turn.stride(0);
    matrix.rows = matrix.dim;
    matrix.apart = 0;
    matrix.across = 1;
  }
}

static void angles(Turn& turn, const at::Tensor& stored, at::TensorList codec, bool normed) {
  const at::Tensor& table = codec.back();
  TORCH_CHECK(table.dim() == 3 && table.size(0) == 2 * turn.pairs && table.size(2) == stored.size(0) &&
                  (table.size(1) == 1 || table.size(1) == stored.size(1)) && table.stride(2) == 1 && kind_of(table) >= 0,
              "a table ", table.sizes(), " of ", table.scalar_type(), " for ", stored.size(0), " tokens of ", stored.size(1),
              " rows");
  turn.table = table.const_data_ptr();
  turn.table_kind = kind_of(table);
  turn.row = table.stride(0);
  turn.batch = table.size(1) > 1 ? table.stride(1) : 0;
  if (!normed) return;
  const at::Tensor& weight = codec[codec.size() - 2];
  TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.is_contiguous(), "weights of a norm in ", weight.scalar_type());
  turn.weight = weight.const_data_ptr<float>();
}

static Lines lines_of(const at::Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), kind_of(t), t.size(0), t.size(1), t.size(2), t.stride(0), t.stride(1),
          t.stride(2)};
}

// ``t`` [.., T] as it is broadcast to ``sizes`` [B, H, S, T].
static Extra extra_of(const at::Tensor& t, at::IntArrayRef sizes) {
  int64_t steps[4] = {};
  bool fits = t.dim() <= 4;
  for (int64_t i = 0; fits && i < t.dim(); i++) {
    const int64_t n = t.size(i), at = 4 - t.dim() + i;
    fits = n == 1 || n == sizes[at];
    steps[at] = n == 1 ? 0 : t.stride(i);
  }
  TORCH_CHECK(fits, t.sizes(), " is not broadcast to ", sizes);   // it would be read where it is not
  return {t.const_data_ptr(), t.scalar_type() == at::kBool, steps[0], steps[1], steps[2], steps[3]};
}

// The op's result [B, H, S, D_v] in the query's dtype, ``chunk`` tokens at a time. ``turns``: queries come as the model has
// them, else as rows are turned, and so do results.
static at::Tensor by_plan(const Plan& plan, const at::Tensor& query, const at::Tensor& keys, at::TensorList key_codec,
                          const at::Tensor& values, at::TensorList value_codec, at::TensorList extras, int64_t chunk,
                          bool turns) {
  TORCH_CHECK(query.dim() == 4 && keys.dim() == 3 && values.dim() == 3 && keys.size(0) == values.size(0) &&
                  keys.size(1) == query.size(0) && values.size(1) == query.size(0),
              "keys ", keys.sizes(), ", values ", values.sizes(), " and queries ", query.sizes(), " of other sizes");
  TORCH_CHECK(keys.stride(2) == 1 && values.stride(2) == 1, "rows whose bytes are apart");
  TORCH_CHECK(int64_t(extras.size()) == plan.extras + plan.sink, extras.size(), " extras for ", plan.extras, " and a sink");
  Call call = plan.call;
  std::vector<at::Tensor> held;
  held.reserve(8 + extras.size());
  given(call.keys, call.key, plan.key, keys, key_codec, turns, held);
  given(call.values, call.value, plan.value, values, value_codec, turns, held);
  if (call.turns) angles(call.turn, keys, key_codec, plan.normed);
  const at::Tensor q = readable(query);
  const at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2), plan.dim}, q.options());
  call.query = lines_of(q);
  call.out = lines_of(out);
  std::vector<Extra> met;
  for (size_t i = 0; i < extras.size(); i++) {
    const bool flag = int64_t(i) < plan.extras && plan.flags >> i & 1;
    held.push_back(extras[i].to(flag ? at::kBool : at::kFloat));
    met.push_back(extra_of(held.back(), {q.size(0), q.size(1), q.size(2), keys.size(0)}));
  }
  call.extras = met.data();
  call.sink = plan.sink ? &met.back() : nullptr;
  call.chunk = chunk;
  call.threads = at::get_num_threads();
  attend(call);
  return out.to(query.scalar_type());
}

using OptionalTensor = std::optional<at::Tensor>;

static at::Tensor attend_op(const at::Tensor& query, const at::Tensor& keys, const OptionalTensor& key_side,
                            at::TensorList key_codec, const at::Tensor& values, const OptionalTensor& value_side,
                            at::TensorList value_codec, at::TensorList extras, c10::string_view about) {
  const Plan* plan = nullptr;
  int64_t chunk = 0;
  if (query.dim() == 4 && keys.dim() == 3 && values.dim() == 3 && keys.stride(2) == 1 && values.stride(2) == 1) {
    Registry& all = registry();
    const int64_t tokens = bucket(keys.size(0)), batch = bucket(query.size(0)), threads = at::get_num_threads();
    std::shared_lock lock(all.mutex);
    const auto found = all.known.find(std::string(about));
    if (found != all.known.end()) for (const Choice& c : found->second.choices)
      if (c.tokens == tokens && c.batch == batch && c.heads == query.size(1) && c.queries == query.size(2) &&
          c.threads == threads) {
        plan = found->second.plan;
        chunk = c.chunk;
      }
  }
  if (plan) return by_plan(*plan, query, keys, key_codec, values, value_codec, extras, chunk, true);
  static const auto general = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow("lorc::_attend_by_python", "")
                                  .typed<decltype(attend_op)>();
  return general.call(query, keys, key_side, key_codec, values, value_side, value_codec, extras, about);
}

static at::Tensor attend_by_plan(const at::Tensor& query, const at::Tensor& keys, at::TensorList key_codec,
                                 const at::Tensor& values, at::TensorList value_codec, at::TensorList extras, int64_t plan,
                                 int64_t chunk, bool turns) {
  return by_plan(*(const Plan*)plan, query, keys, key_codec, values, value_codec, extras, chunk, turns);
}

// The plan of a digest, until it is forgotten.
extern "C" void lorc_know(const char* about, const Plan* plan) {
  std::unique_lock lock(registry().mutex);
  Known& known = registry().known[about];
  if (known.plan != plan) known = {plan, {}};
}

extern "C" void lorc_forget(const char* about, const Plan* plan) {
  std::unique_lock lock(registry().mutex);
  const auto found = registry().known.find(about);
  if (found != registry().known.end() && found->second.plan == plan) registry().known.erase(found);
}

// From now on calls like this one read ``choice.chunk`` tokens at a time, and do not ask Python.
extern "C" void lorc_choose(const char* about, const Plan* plan, const Choice* choice) {
  std::unique_lock lock(registry().mutex);
  const auto found = registry().known.find(about);
  if (found == registry().known.end() || found->second.plan != plan) return;
  for (const Choice& c : found->second.choices)
    if (!std::memcmp(&c, choice, sizeof(Choice) - sizeof(c.chunk))) return;
  found->second.choices.push_back(*choice);
}

// All choices are asked for again.
extern "C" void lorc_ask_again() {
  std::unique_lock lock(registry().mutex);
  for (auto& [about, known] : registry().known) known.choices.clear();
}
