// encoder_layers: the arguments of csrc/cpu/encoder_layer.h.
#include "layer.h"
#include "../cpu/encoder_layer.h"

namespace fastlm::bindings {

// The fields of a Layer of fastlm/ops/encoder_layer/spec.py. Without key and value, query projects all three.
struct encoder_layer_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor attention_norm = keyword("attention_norm"), attention_norm_bias = keyword_or_none("attention_norm_bias"),
         mlp_norm = keyword("mlp_norm"), mlp_norm_bias = keyword_or_none("mlp_norm_bias"), query = keyword("query"),
         query_bias = keyword_or_none("query_bias"), key = keyword_or_none("key"),
         key_bias = keyword_or_none("key_bias"), value = keyword_or_none("value"),
         value_bias = keyword_or_none("value_bias"), output = keyword("output"),
         output_bias = keyword_or_none("output_bias"), up = keyword("up"), up_bias = keyword_or_none("up_bias"),
         down = keyword("down"), down_bias = keyword_or_none("down_bias");
  float eps = keyword("eps");
  activation_kind activation = keyword("activation");
  int64_t num_heads = keyword("num_heads"), head_dim = keyword("head_dim");
  float scale = keyword("scale");
};

// x and y are rows. scratch and statistics have the elements per row that the layer with the most of them needs.
struct encoder_layers_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), y = keyword("y"), scratch = keyword("scratch"), statistics = keyword("statistics");
  std::vector<int64_t> starts = keyword("starts");
  int threads = keyword("threads");
  std::vector<encoder_layer_arguments> layers = layers_of(keyword("names").value, keyword("layers").value);

  int64_t rows() const { return x.width ? x.count / x.width : 0; }

  void check_starts() const {
    const std::string expected = "ascending offsets from 0 to " + std::to_string(rows());
    if (starts.empty() || starts.front() != 0 || starts.back() != rows())
      throw_argument_error(
          "starts", expected,
          starts.empty() ? "none" : std::to_string(starts.front()) + " to " + std::to_string(starts.back()));
    for (size_t i = 1; i < starts.size(); ++i)
      if (starts[i] < starts[i - 1])
        throw_argument_error("starts", expected, std::to_string(starts[i]) + " after " + std::to_string(starts[i - 1]));
  }

 private:
  static std::vector<encoder_layer_arguments> layers_of(PyObject* names, PyObject* list) {
    return layers_from<encoder_layer_arguments>(names, list, -1, "at least one entry");
  }
};

// One layer, checked; it owns the parameters that are converted.
template <class T> struct checked_encoder_layer {
  const encoder_layer_arguments& a;
  int64_t width;
  fp32_parameters attention_norm{a.attention_norm, width}, attention_norm_bias{a.attention_norm_bias, width},
      mlp_norm{a.mlp_norm, width}, mlp_norm_bias{a.mlp_norm_bias, width};

  layer_projection<T> projection(const tensor& weight, const tensor& bias, int64_t inputs, int64_t outputs) const {
    return projection_from<T>(weight, bias, false, inputs, outputs);
  }

  encoder_layer<T> get() const {
    const int64_t projections = a.key.given() ? 1 : 3, first_width = outputs_of(a.query, false),
                  hidden = outputs_of(a.up, false), query_width = first_width / projections;
    check_key_and_value(a.key, a.value);
    check_norm<T>(a.attention_norm, a.attention_norm_bias), check_norm<T>(a.mlp_norm, a.mlp_norm_bias);
    if (a.num_heads < 1 || first_width == 0 || first_width % projections || query_width % a.num_heads ||
        query_width / a.num_heads != a.head_dim)
      throw_argument_error("query",
                           std::to_string(projections) + " x " + std::to_string(a.num_heads) + " x " +
                               std::to_string(a.head_dim) + " outputs, of projections, heads and head dimension",
                           a.query.layout());
    if (a.activation != activation_kind::gelu && a.activation != activation_kind::gelu_tanh)
      throw_argument_error("activation", "the number of a GELU", std::to_string(int(a.activation)));
    return {{attention_norm, attention_norm_bias},
            {mlp_norm, mlp_norm_bias},
            a.eps,
            projection(a.query, a.query_bias, width, first_width),
            projection(a.key, a.key_bias, width, query_width),
            projection(a.value, a.value_bias, width, query_width),
            projection(a.output, a.output_bias, query_width, width),
            projection(a.up, a.up_bias, width, hidden),
            projection(a.down, a.down_bias, hidden, width),
            a.activation,
            width,
            a.num_heads,
            a.head_dim,
            a.scale};
  }
};

// All layers are checked before the first of them runs.
static void encoder_layers(const encoder_layers_arguments& a) {
  dispatch(a.x, [&]<class T>() {
    std::vector<checked_encoder_layer<T>> checked;
    std::vector<encoder_layer<T>> layers;
    checked.reserve(a.layers.size()), layers.reserve(a.layers.size());
    int64_t scratch_width = 0, statistics_width = 0;
    for (const encoder_layer_arguments& each : a.layers) {
      checked.push_back({each, a.x.width});
      layers.push_back(checked.back().get());
      scratch_width = std::max(scratch_width, layers.back().scratch_width());
      statistics_width = std::max(statistics_width, layers.back().statistics_width());
    }
    a.check_starts();
    const int64_t rows = a.rows();
    const T* x = a.x.contiguous_as<const T>(a.x.count);
    T* const y = a.y.contiguous_as<T>(a.x.count);
    const encoder_scratch<T> scratch{a.scratch.contiguous_as<T>(rows * scratch_width),
                                     a.statistics.contiguous_as<float>(rows * statistics_width)};
    if (rows == 0) return;
    for (const encoder_layer<T>& layer : layers) {
      encode<T>(layer, x, y, rows, a.starts, scratch, a.threads);
      x = y;
    }
  });
}
FASTLM_BINDING(encoder_layers)

}  // namespace fastlm::bindings
