// decoder_layers: the arguments of csrc/cpu/decoder_layer.h.
#include "layer.h"
#include "../cpu/decoder_layer.h"

namespace fastlm::bindings {

// The fields of a Layer of fastlm/ops/decoder_layer/spec.py. Without key and value, query projects all three; without
// gate, the MLP is a GELU-MLP.
struct decoder_layer_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor attention_norm = keyword("attention_norm"), attention_norm_bias = keyword_or_none("attention_norm_bias"),
         mlp_norm = keyword("mlp_norm"), mlp_norm_bias = keyword_or_none("mlp_norm_bias"),
         attention_output_norm = keyword_or_none("attention_output_norm"),
         mlp_output_norm = keyword_or_none("mlp_output_norm"), query_norm = keyword_or_none("query_norm"),
         key_norm = keyword_or_none("key_norm"), query = keyword("query"), query_bias = keyword_or_none("query_bias"),
         key = keyword_or_none("key"), key_bias = keyword_or_none("key_bias"), value = keyword_or_none("value"),
         value_bias = keyword_or_none("value_bias"), output = keyword("output"),
         output_bias = keyword_or_none("output_bias"), gate = keyword_or_none("gate"),
         gate_bias = keyword_or_none("gate_bias"), up = keyword("up"), up_bias = keyword_or_none("up_bias"),
         down = keyword("down"), down_bias = keyword_or_none("down_bias");
  bool conv1d = keyword("conv1d"), layer_norm = keyword("layer_norm"), unit_offset = keyword("unit_offset");
  float eps = keyword("eps");
  activation_kind activation = keyword("activation");
  int64_t num_heads = keyword("num_heads");
  bool rotates = keyword("rotates");
  float scale = keyword("scale"), softcap = keyword("softcap");
  int64_t window = keyword("window");  // keys before its own that a query attends to
};

// What a layer reads and writes in one call: its entries of slots, (keys, values, slot), and of tables, (cos, sin).
// keys and values are the buffers of the cache, (batch, head, slot, dim).
struct layer_state {
  tensor keys, values;
  int64_t slot;
  tensor cos, sin;

  decoder_layer_size size(const tensor& x, int64_t num_heads) const {
    keys.check_rank(4);
    const decoder_layer_size found{x.width ? x.count / x.width : 0, x.width, num_heads, keys.sizes[1], keys.sizes[3]};
    if (keys.sizes[0] != found.batch || found.num_kv_heads < 1 || num_heads < 1 || num_heads % found.num_kv_heads)
      throw_argument_error(
          "keys",
          "a batch of " + std::to_string(found.batch) + " and heads that divide num_heads " + std::to_string(num_heads),
          keys.layout());
    if (slot < 0 || slot >= keys.sizes[2])
      throw_argument_error("slot", "0 to " + std::to_string(keys.sizes[2] - 1), std::to_string(slot));
    return found;
  }

  template <class T> kv_slots<T> cache() const { return {heads<T>(keys), heads<T>(values), slot}; }

  rotary_table rotation(const decoder_layer_size& s) const {
    return {table(cos, s), table(sin, s), cos.broadcast_stride(0), 0, sin.broadcast_stride(0), 0, cos.width, false};
  }

 private:
  template <class T> heads_view<T> heads(const tensor& x) const {
    T* const data = x.as<T>(4);
    if (!std::equal(x.sizes, x.sizes + 4, keys.sizes)) throw_argument_error(x.name, "the shape of keys", x.layout());
    if (x.strides[3] != 1 && x.width != 1) throw_argument_error(x.name, "a contiguous last dimension", x.layout());
    return {data, {x.strides[0], x.strides[1], x.strides[2]}};
  }

  const float* table(const tensor& given, const decoder_layer_size& s) const {
    const float* const data = given.as<const float>(3);
    if (!given.given() || (given.sizes[0] != 1 && given.sizes[0] != s.batch) || given.sizes[1] != 1 ||
        given.width != cos.width || given.width % 2 || given.width > s.head_dim || !given.contiguous)
      throw_argument_error(given.name, "a contiguous table of one position for each sequence",
                           given.given() ? given.layout() : "None");
    return data;
  }
};

static tensor tensor_or_none(argument given) {
  tensor none;
  none.name = given.name;
  return given.value == Py_None ? none : given;
}

struct decoder_layers_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), y = keyword("y"), summed = keyword("summed"), key_padding = keyword_or_none("key_padding");
  int threads = keyword("threads");
  std::vector<layer_state> states = states_of(keyword("slots").value, keyword("tables").value);
  std::vector<decoder_layer_arguments> layers = layers_of(keyword("names").value, keyword("layers").value);

 private:
  static std::vector<layer_state> states_of(PyObject* slots, PyObject* tables) {
    check_list(slots, "slots"), check_list(tables, "tables");
    if (PyList_GET_SIZE(slots) != PyList_GET_SIZE(tables))
      throw_argument_error("tables", std::to_string(PyList_GET_SIZE(slots)) + " entries, as slots",
                           std::to_string(PyList_GET_SIZE(tables)));
    std::vector<layer_state> found;
    found.reserve(size_t(PyList_GET_SIZE(slots)));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(slots); ++i) {
      PyObject *const cached = PyList_GET_ITEM(slots, i), *const table = PyList_GET_ITEM(tables, i);
      found.push_back({entry(cached, 0, 3, "slots", "keys"), entry(cached, 1, 3, "slots", "values"),
                       entry(cached, 2, 3, "slots", "slot"), tensor_or_none(entry(table, 0, 2, "tables", "cos")),
                       tensor_or_none(entry(table, 1, 2, "tables", "sin"))});
      check_storage_of({PyTuple_GET_ITEM(cached, 0), "keys"});
      check_storage_of({PyTuple_GET_ITEM(cached, 1), "values"});
    }
    return found;
  }

  std::vector<decoder_layer_arguments> layers_of(PyObject* names, PyObject* list) const {
    return layers_from<decoder_layer_arguments>(names, list, Py_ssize_t(states.size()),
                                                std::to_string(states.size()) + " entries, as slots, and at least one");
  }
};

// One layer, checked; it owns the parameters that are converted.
template <class T> struct checked_decoder_layer {
  const decoder_layer_arguments& a;
  decoder_layer_size size;
  int64_t query_width = size.num_heads * size.head_dim, key_width = size.num_kv_heads * size.head_dim;
  fp32_parameters attention_norm{a.attention_norm, size.width}, attention_norm_bias{a.attention_norm_bias, size.width},
      mlp_norm{a.mlp_norm, size.width}, mlp_norm_bias{a.mlp_norm_bias, size.width},
      attention_output_norm{a.attention_output_norm, size.width}, mlp_output_norm{a.mlp_output_norm, size.width},
      query_norm{a.query_norm, size.head_dim}, key_norm{a.key_norm, size.head_dim};

  layer_projection<T> projection(const tensor& weight, const tensor& bias, int64_t inputs, int64_t outputs) const {
    return projection_from<T>(weight, bias, a.conv1d, inputs, outputs);
  }

  decoder_layer<T> get() const {
    const int64_t width = size.width, first_width = a.key.given() ? query_width : query_width + 2 * key_width;
    const int64_t hidden = outputs_of(a.up, a.conv1d);
    check_key_and_value(a.key, a.value);
    check_norm<T>(a.attention_norm, a.attention_norm_bias), check_norm<T>(a.mlp_norm, a.mlp_norm_bias);
    check_norm<T>(a.attention_output_norm), check_norm<T>(a.mlp_output_norm);
    check_norm<T>(a.query_norm), check_norm<T>(a.key_norm);
    return {{a.layer_norm, a.unit_offset, a.eps},
            {attention_norm, attention_norm_bias},
            {query_norm, nullptr},
            {key_norm, nullptr},
            {attention_output_norm, nullptr},
            {mlp_norm, mlp_norm_bias},
            {mlp_output_norm, nullptr},
            projection(a.query, a.query_bias, width, first_width),
            projection(a.key, a.key_bias, width, key_width),
            projection(a.value, a.value_bias, width, key_width),
            projection(a.output, a.output_bias, query_width, width),
            projection(a.gate, a.gate_bias, width, hidden),
            projection(a.up, a.up_bias, width, hidden),
            projection(a.down, a.down_bias, hidden, width),
            a.activation};
  }

  // A query at the last of slot + 1 keys, to which the last entries of key_padding belong.
  masking<T> masks(const tensor& key_padding, int64_t slot) const {
    constexpr int64_t Unlimited = int64_t(1) << 62;
    const bool* padding = key_padding.as<const bool>(2);
    std::array<int64_t, 2> strides{};
    if (padding) {
      if (key_padding.sizes[0] != size.batch || key_padding.sizes[1] <= slot)
        throw_argument_error("key_padding", "at least " + std::to_string(slot + 1) + " keys of each sequence",
                             key_padding.layout());
      strides = {key_padding.broadcast_stride(0), key_padding.strides[1]};
      padding += (key_padding.sizes[1] - slot - 1) * strides[1];
    }
    const int64_t lower = a.window >= Unlimited ? -Unlimited : slot - a.window;
    return {nullptr, mask_type::none, {}, padding, strides, lower, slot, a.scale, a.softcap, {0, 0}};
  }
};

// All layers are checked before the first of them runs.
static void decoder_layers(const decoder_layers_arguments& a) {
  dispatch(a.x, [&]<class T>() {
    struct call {
      decoder_layer<T> layer;
      decoder_layer_size size;
      kv_slots<T> cache;
      rotary_table rotation;
      masking<T> masks;
    };
    std::vector<checked_decoder_layer<T>> checked;
    std::vector<call> calls;
    checked.reserve(a.layers.size()), calls.reserve(a.layers.size());
    for (size_t i = 0; i < a.layers.size(); ++i) {
      const layer_state& state = a.states[i];
      checked.push_back({a.layers[i], state.size(a.x, a.layers[i].num_heads)});
      const checked_decoder_layer<T>& layer = checked.back();
      calls.push_back({layer.get(), layer.size, state.cache<T>(),
                       a.layers[i].rotates ? state.rotation(layer.size) : rotary_table{},
                       layer.masks(a.key_padding, state.slot)});
    }
    const T *x = a.x.contiguous_as<const T>(a.x.count), *residual = nullptr;
    T *const y = a.y.contiguous_as<T>(a.x.count), *const summed = a.summed.contiguous_as<T>(a.x.count);
    for (const call& each : calls) {
      decode<T>(each.layer, x, residual, y, summed, each.cache, each.rotation.cos ? &each.rotation : nullptr,
                each.masks, each.size, a.threads);
      x = y, residual = summed;
    }
  });
}
FASTLM_BINDING(decoder_layers)

}  // namespace fastlm::bindings
