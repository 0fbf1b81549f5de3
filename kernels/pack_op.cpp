// ``lorc::pack`` of tensors on a CPU (compiled behind pack.cpp and attend_op.cpp): as there, a format comes from Python once
// (pack.py), and calls with it do without.

using Items = std::vector<const Item*>;
using Optionals = c10::List<std::optional<at::Tensor>>;

struct Formats {
  std::shared_mutex mutex;
  std::unordered_map<std::string, Items> known;
};

static Formats& formats() { static auto* const found = new Formats; return *found; }

static int64_t columns_of(const Item& item) { return item.codec.exact + item.codec.quantised; }

// Of y with ``last`` features: whether ``by`` is one matrix for all groups of them, rather than a part for each.
static bool for_all(const at::Tensor& by, int64_t last) { return by.size(1) < last; }

static bool fits_all(const Item& item, const at::Tensor& by, int64_t last) {
  const int64_t groups = item.projection.matrix.heads;
  return item.codec.choices == 1 && by.size(1) * groups == last && by.size(0) * groups == columns_of(item);
}

// Whether pack.cpp takes latents (or y, with a ``project``) as they are.
static bool takes(const Item& item, const at::Tensor& latent, const std::optional<at::Tensor>& offsets,
                  const std::optional<at::Tensor>& project, const std::optional<at::Tensor>& shift) {
  if (kind_of(latent) < 0 || latent.numel() == 0 || (item.codec.choices > 1 && !offsets)) return false;
  const int64_t last = latent.size(-1), all = columns_of(item) + item.codec.choices - 1;
  if (!project) return last == all;
  if (project->scalar_type() != at::kFloat || project->dim() != 2 || latent.numel() > item.few * last) return false;
  if (shift && (shift->scalar_type() != at::kFloat || shift->numel() != all)) return false;
  return for_all(*project, last) ? fits_all(item, *project, last) : project->size(1) == last && item.divided;
}

static std::vector<at::Tensor> packed(const Items& items, at::TensorList latents, const Optionals& offsets,
                                      const Optionals& spread, const Optionals& project, const Optionals& shift) {
  std::vector<at::Tensor> rows, held;
  std::vector<Item> told;
  held.reserve(6 * items.size());
  int64_t work = 0;
  const auto numbers = [&](const std::optional<at::Tensor>& t) -> const float* {
    if (!t) return nullptr;
    held.push_back(t->to(at::kFloat).contiguous());
    return held.back().const_data_ptr<float>();
  };
  for (size_t i = 0; i < items.size(); i++) {
    const at::Tensor& latent = latents[i];
    const auto by = project.get(i), off = offsets.get(i), unit = spread.get(i);
    const int64_t columns = columns_of(*items[i]), choices = items[i]->codec.choices;
    const bool all = by && latent.dim() > 0 && for_all(*by, latent.size(-1)) && fits_all(*items[i], *by, latent.size(-1));
    const int64_t wanted = all ? latent.size(-1) : by ? by->size(1) : columns + choices - 1;
    TORCH_CHECK(latent.dim() > 0 && latent.size(-1) == wanted, "latents ", latent.sizes(), " where rows have ", wanted);
    TORCH_CHECK(!off || off->numel() == choices * columns, "offsets ", off->sizes(), " of ", choices, " x ", columns);
    TORCH_CHECK(!unit || unit->numel() == columns, "a spread ", unit->sizes(), " of ", columns);
    at::Tensor flat = latent.dim() == 2 ? latent : latent.reshape({-1, latent.size(-1)});
    if (flat.stride(1) != 1) flat = flat.contiguous();
    std::vector<int64_t> sizes(latent.sizes().begin(), latent.sizes().end());
    sizes.back() = items[i]->codec.width;
    rows.push_back(at::empty(sizes, latent.options().dtype(at::kByte)));
    Item& item = told.emplace_back(*items[i]);
    item.latent = (const uint8_t*)flat.const_data_ptr();
    item.rows = rows.back().mutable_data_ptr<uint8_t>();
    item.kind = kind_of(flat);
    item.tokens = flat.size(0);
    item.stride = flat.stride(0) * flat.element_size();
    item.codec.offsets = numbers(off);
    item.codec.spread = numbers(unit);
    held.push_back(flat);
    work += flat.numel();
    if (by) {
      Matrix& matrix = item.projection.matrix;
      matrix.rows = by->size(0);
      matrix.row = by->size(1);
      const bool turned = kind_of(*by) == 0 && by->stride(0) == 1 && by->stride(1) == matrix.rows;
      matrix.across = turned && matrix.rows == matrix.row && (all || matrix.heads == 1);
      matrix.data = matrix.across ? by->const_data_ptr() : numbers(by);  // as it lies
      matrix.dim = all ? matrix.row : matrix.row / matrix.heads;
      matrix.apart = all ? 0 : matrix.dim;
      item.projection.shift = numbers(shift.get(i));
      item.projects = 1;
      work += by->numel() * flat.size(0) * (all ? matrix.heads : 1);
    }
  }
  pack(told.data(), told.size(), work <= FEW_COLUMNS ? 1 : at::get_num_threads());
  return rows;
}

static std::vector<at::Tensor> pack_op(at::TensorList latents, const Optionals& offsets, const Optionals& spread,
                                       const Optionals& project, const Optionals& shift, c10::string_view about) {
  const Items* items = nullptr;
  {
    std::shared_lock lock(formats().mutex);
    const auto found = formats().known.find(std::string(about));
    if (found != formats().known.end() && found->second.size() == latents.size()) items = &found->second;  // never erased
  }
  for (size_t i = 0; items && i < latents.size(); i++)
    if (!takes(*(*items)[i], latents[i], offsets.get(i), project.get(i), shift.get(i))) items = nullptr;
  if (items) return packed(*items, latents, offsets, spread, project, shift);
  static const auto general =
      c10::Dispatcher::singleton().findSchemaOrThrow("lorc::_pack_by_python", "").typed<decltype(pack_op)>();
  return general.call(latents, offsets, spread, project, shift, about);
}

static std::vector<at::Tensor> pack_by_layout(at::TensorList latents, const Optionals& offsets, const Optionals& spread,
                                              const Optionals& project, const Optionals& shift, at::IntArrayRef layouts) {
  Items items;
  for (int64_t layout : layouts) items.push_back((const Item*)layout);
  return packed(items, latents, offsets, spread, project, shift);
}

// The layouts that ``about`` spells, which stay where they are.
extern "C" void lorc_know_formats(const char* about, const Item* const* items, int64_t n) {
  std::unique_lock lock(formats().mutex);
  formats().known.try_emplace(about, items, items + n);
}

TORCH_LIBRARY_IMPL(lorc, CPU, m) {
  m.impl("attend", attend_op);
  m.impl("_attend_by_plan", attend_by_plan);
  m.impl("pack", pack_op);
  m.impl("_pack_by_layout", pack_by_layout);
}
