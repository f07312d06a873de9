// attention_forward and attention_backward: the arguments of csrc/cpu/attention.h and attention_backward.h.
#include "arguments.h"
#include "dispatch.h"
#include "../cpu/attention_backward.h"

namespace fastlm {
FASTLM_ATTENTION()
}  // namespace fastlm

namespace fastlm::bindings {

// query, key, value and their like are (batch, head, token, dim), or (token, head, dim) where packed sequences follow
// each other along the tokens; then query_starts and key_starts hold where they start.
struct attention_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;

  // (batch, head, token, dim) with a batch stride of 0 where packed.
  template <class T> heads_view<T> heads(const tensor& x, const std::vector<int64_t>& starts) const {
    T* const data = x.as<T>(starts.empty() ? 4 : 3);
    const int64_t* last = x.strides + x.rank - 1;
    if (*last != 1 && x.width != 1) throw_argument_error(x.name, "a contiguous last dimension", x.layout());
    if (starts.empty()) return {data, {x.strides[0], x.strides[1], x.strides[2]}};
    return {data, {0, x.strides[1], x.strides[0]}};
  }

  static attention_size size_of(const tensor& query, const tensor& key, const std::vector<int64_t>& query_starts,
                                const std::vector<int64_t>& key_starts) {
    if (query_starts.size() != key_starts.size())
      throw_argument_error("key_starts", std::to_string(query_starts.size()) + " offsets",
                           std::to_string(key_starts.size()));
    const int64_t *q = query.sizes, *k = key.sizes;
    const int head_dim = query.rank - 1;
    if (q[head_dim] != k[head_dim] || (query_starts.empty() && q[0] != k[0]) || q[1] % std::max<int64_t>(k[1], 1))
      throw_argument_error("key", "batch, heads and head_dim that fit query's " + query.layout(), key.layout());
    if (query_starts.empty()) return {q[0], q[1], k[1], q[2], k[2], q[3]};
    return {int64_t(query_starts.size()) - 1, q[1], k[1], q[0], k[0], q[2], query_starts.data(), key_starts.data()};
  }
};

// Two tensors of the same rank must have the same sizes.
static void check_sizes(const tensor& x, const tensor& like) {
  if (!std::equal(x.sizes, x.sizes + x.rank, like.sizes))
    throw_argument_error(x.name, std::string("the shape of ") + like.name + ", " + like.layout(), x.layout());
}

template <class T> static mask_type type_of(const tensor& mask) {
  if (!mask.given()) return mask_type::none;
  if (mask.type == dtype::boolean) return mask_type::boolean;
  if (mask.type == dtype_of<T>) return mask_type::additive;
  if (mask.type == dtype::float32) return mask_type::additive_fp32;
  throw_argument_error(mask.name, "torch.bool, torch.float32 or the dtype of query", name_of(mask.type));
}

static std::array<int64_t, 4> mask_strides(const tensor& mask) {
  mask.check_rank(4);
  if (!mask.given()) return {};
  return {mask.broadcast_stride(0), mask.broadcast_stride(1), mask.broadcast_stride(2), mask.broadcast_stride(3)};
}

template <class T> static masking<T> masking_of(const tensor& mask, const tensor& key_padding, int64_t lower,
                                                int64_t upper, float scale, float softcap, const dropout& drop) {
  const bool* padding = key_padding.as<const bool>(2);
  std::array<int64_t, 2> padding_strides{};
  if (key_padding.given()) padding_strides = {key_padding.broadcast_stride(0), key_padding.broadcast_stride(1)};
  return {mask.data, type_of<T>(mask), mask_strides(mask), padding, padding_strides, lower, upper, scale, softcap,
          drop};
}

struct attention_forward_arguments : attention_arguments {
  using attention_arguments::attention_arguments;
  tensor query = keyword("query"), key = keyword("key"), value = keyword("value"), out = keyword("out"),
         lse = keyword("lse"), mask = keyword_or_none("mask"), key_padding = keyword_or_none("key_padding");
  std::vector<int64_t> query_starts = keyword("query_starts"), key_starts = keyword("key_starts");
  float scale = keyword("scale"), softcap = keyword("softcap");
  int64_t lower = keyword("lower"), upper = keyword("upper");
  double dropout_p = keyword("dropout_p");
  int64_t seed = keyword("seed");
  int threads = keyword("threads");
};

static void attention_forward(const attention_forward_arguments& a) {
  dispatch(a.query, [&]<class T>() {
    const auto query = a.heads<const T>(a.query, a.query_starts), key = a.heads<const T>(a.key, a.key_starts),
               value = a.heads<const T>(a.value, a.key_starts);
    const auto out = a.heads<T>(a.out, a.query_starts);
    check_sizes(a.value, a.key), check_sizes(a.out, a.query);
    const attention_size size = a.size_of(a.query, a.key, a.query_starts, a.key_starts);
    fastlm::attention_forward<T>(
        query, key, value, out, a.lse.contiguous_as<float>(size.rows()), size,
        masking_of<T>(a.mask, a.key_padding, a.lower, a.upper, a.scale, a.softcap, {a.dropout_p, a.seed}), a.threads);
  });
}
FASTLM_BINDING(attention_forward)

struct attention_backward_arguments : attention_arguments {
  using attention_arguments::attention_arguments;
  tensor dout = keyword("dout"), dlse = keyword_or_none("dlse"), query = keyword("query"), key = keyword("key"),
         value = keyword("value"), out = keyword("out"), lse = keyword("lse"), mask = keyword_or_none("mask"),
         key_padding = keyword_or_none("key_padding"), dquery = keyword("dquery"), dkey = keyword("dkey"),
         dvalue = keyword("dvalue"), dmask = keyword_or_none("dmask");
  std::vector<int64_t> query_starts = keyword("query_starts"), key_starts = keyword("key_starts");
  float scale = keyword("scale"), softcap = keyword("softcap");
  int64_t lower = keyword("lower"), upper = keyword("upper");
  double dropout_p = keyword("dropout_p");
  int64_t seed = keyword("seed");
  int threads = keyword("threads");
};

static void attention_backward(const attention_backward_arguments& a) {
  dispatch(a.query, [&]<class T>() {
    const auto dout = a.heads<const T>(a.dout, a.query_starts), query = a.heads<const T>(a.query, a.query_starts),
               key = a.heads<const T>(a.key, a.key_starts), value = a.heads<const T>(a.value, a.key_starts),
               out = a.heads<const T>(a.out, a.query_starts);
    const attention_gradients<T> gradients{a.heads<T>(a.dquery, a.query_starts), a.heads<T>(a.dkey, a.key_starts),
                                           a.heads<T>(a.dvalue, a.key_starts), a.dmask.as<float>(),
                                           mask_strides(a.dmask)};
    for (const tensor* x : {&a.dout, &a.out, &a.dquery}) check_sizes(*x, a.query);
    for (const tensor* x : {&a.value, &a.dkey, &a.dvalue}) check_sizes(*x, a.key);
    const attention_size size = a.size_of(a.query, a.key, a.query_starts, a.key_starts);
    fastlm::attention_backward<T>(
        dout, query, key, value, out, a.lse.contiguous_as<const float>(size.rows()),
        a.dlse.contiguous_as<const float>(size.rows()), gradients, size,
        masking_of<T>(a.mask, a.key_padding, a.lower, a.upper, a.scale, a.softcap, {a.dropout_p, a.seed}), a.threads);
  });
}
FASTLM_BINDING(attention_backward)

}  // namespace fastlm::bindings
