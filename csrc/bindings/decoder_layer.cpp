// decoder_layer: the arguments of csrc/cpu/decoder_layer.h.
#include "arguments.h"
#include "dispatch.h"
#include "weights.h"
#include "../cpu/decoder_layer.h"

namespace fastlm::bindings {

struct decoder_layer_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  // Of one call. keys and values are the buffers of the cache, (batch, head, slot, dim).
  tensor x = keyword("x"), residual = keyword_or_none("residual"), y = keyword("y"), summed = keyword("summed"),
         keys = keyword("keys"), values = keyword("values");
  int64_t slot = keyword("slot");
  tensor cos = keyword_or_none("cos"), sin = keyword_or_none("sin"), key_padding = keyword_or_none("key_padding");
  int threads = keyword("threads");
  // Of the layer. Without key and value, query projects all three; without gate, the MLP is a GELU-MLP.
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

  decoder_layer_size size() const {
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

  template <class T> heads_view<T> slots(const tensor& x) const {
    T* const data = x.as<T>(4);
    if (!std::equal(x.sizes, x.sizes + 4, keys.sizes)) throw_argument_error(x.name, "the shape of keys", x.layout());
    if (x.strides[3] != 1 && x.width != 1) throw_argument_error(x.name, "a contiguous last dimension", x.layout());
    return {data, {x.strides[0], x.strides[1], x.strides[2]}};
  }

  template <class T>
  layer_projection<T> projection(const tensor& weight, const tensor& bias, int64_t inputs, int64_t outputs) const {
    return {weight_layout(conv1d).matrix<const T>(weight, inputs, outputs), bias.contiguous_as<const T>(outputs),
            outputs};
  }

  const float* table(const tensor& given, const decoder_layer_size& s) const {
    const float* const data = given.as<const float>(3);
    if (!given.given() || (given.sizes[0] != 1 && given.sizes[0] != s.batch) || given.sizes[1] != 1 ||
        given.width != cos.width || given.width % 2 || given.width > s.head_dim || !given.contiguous)
      throw_argument_error(given.name, "a contiguous table of one position for each sequence",
                           given.given() ? given.layout() : "None");
    return data;
  }

  rotary_table rotation(const decoder_layer_size& s) const {
    return {table(cos, s), table(sin, s), cos.broadcast_stride(0), 0, sin.broadcast_stride(0), 0, cos.width, false};
  }

  // A query at the last of slot + 1 keys, to which the last entries of key_padding belong.
  template <class T> masking<T> masks(const decoder_layer_size& s) const {
    constexpr int64_t Unlimited = int64_t(1) << 62;
    const bool* padding = key_padding.as<const bool>(2);
    std::array<int64_t, 2> strides{};
    if (padding) {
      if (key_padding.sizes[0] != s.batch || key_padding.sizes[1] <= slot)
        throw_argument_error("key_padding", "at least " + std::to_string(slot + 1) + " keys of each sequence",
                             key_padding.layout());
      strides = {key_padding.broadcast_stride(0), key_padding.strides[1]};
      padding += (key_padding.sizes[1] - slot - 1) * strides[1];
    }
    const int64_t lower = window >= Unlimited ? -Unlimited : slot - window;
    return {nullptr, mask_type::none, {}, padding, strides, lower, slot, scale, softcap, {0, 0}};
  }
};

static void decoder_layer(const decoder_layer_arguments& a) {
  dispatch(a.x, [&]<class T>() {
    const decoder_layer_size s = a.size();
    const int64_t width = s.width, query_width = s.num_heads * s.head_dim, key_width = s.num_kv_heads * s.head_dim,
                  first_width = a.key.given() ? query_width : query_width + 2 * key_width;
    a.up.check_rank(2);
    const int64_t hidden = weight_layout(a.conv1d).outputs(a.up);
    if (a.key.given() != a.value.given())
      throw_argument_error("value", "a tensor if key is one, else None", "the other");
    const fp32_parameters attention_norm(a.attention_norm, width), attention_norm_bias(a.attention_norm_bias, width),
        mlp_norm(a.mlp_norm, width), mlp_norm_bias(a.mlp_norm_bias, width),
        attention_output_norm(a.attention_output_norm, width), mlp_output_norm(a.mlp_output_norm, width),
        query_norm(a.query_norm, s.head_dim), key_norm(a.key_norm, s.head_dim);
    const fastlm::decoder_layer<T> layer{{a.layer_norm, a.unit_offset, a.eps},
                                         {attention_norm, attention_norm_bias},
                                         {query_norm, nullptr},
                                         {key_norm, nullptr},
                                         {attention_output_norm, nullptr},
                                         {mlp_norm, mlp_norm_bias},
                                         {mlp_output_norm, nullptr},
                                         a.projection<T>(a.query, a.query_bias, width, first_width),
                                         a.projection<T>(a.key, a.key_bias, width, key_width),
                                         a.projection<T>(a.value, a.value_bias, width, key_width),
                                         a.projection<T>(a.output, a.output_bias, query_width, width),
                                         a.projection<T>(a.gate, a.gate_bias, width, hidden),
                                         a.projection<T>(a.up, a.up_bias, width, hidden),
                                         a.projection<T>(a.down, a.down_bias, hidden, width),
                                         a.activation};
    const int64_t elements = s.batch * width;
    const rotary_table rotation = a.rotates ? a.rotation(s) : rotary_table{};
    decode<T>(layer, a.x.contiguous_as<const T>(elements), a.residual.contiguous_as<const T>(elements),
              a.y.contiguous_as<T>(elements), a.summed.contiguous_as<T>(elements),
              {a.slots<T>(a.keys), a.slots<T>(a.values), a.slot}, a.rotates ? &rotation : nullptr, a.masks<T>(s), s,
              a.threads);
  });
}
FASTLM_BINDING(decoder_layer)

}  // namespace fastlm::bindings
