// attention_forward, attention_decode and attention_backward: the arguments of csrc/cuda/attention.h.
//
// All tensors of tokens are (batch, head, token, head_dim) with a contiguous last dimension. Packed sequences follow
// each other along the tokens of a batch of one; query_starts and key_starts then hold where each starts.
#include <cmath>
#include "operands.h"
#include "cuda/attention.h"

namespace fastlm::bindings {

template <class View> static View tokens(const tensor& x, dtype type, int64_t batch, int64_t heads, int64_t length,
                                         int64_t head_dim) {
  View view;
  view.data = of_type(x, type, [&]<class T>() -> void* { return x.as<T>(4); });
  if (!x.given()) return view;
  if (x.sizes[0] != batch || x.sizes[1] != heads || x.sizes[2] != length || x.sizes[3] != head_dim)
    throw_argument_error(x.name,
                         "shape (" + std::to_string(batch) + ", " + std::to_string(heads) + ", " +
                             std::to_string(length) + ", " + std::to_string(head_dim) + ")",
                         x.layout());
  if (x.strides[3] != 1 && head_dim != 1) throw_argument_error(x.name, "a contiguous last dimension", x.layout());
  view.batch_stride = x.broadcast_stride(0);
  view.head_stride = x.broadcast_stride(1);
  view.token_stride = x.broadcast_stride(2);
  return view;
}

struct attention_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor query = keyword("query"), key = keyword("key"), value = keyword("value"), out = keyword("out"),
         lse = keyword("lse"), mask = keyword_or_none("mask"), key_padding = keyword_or_none("key_padding"),
         query_starts = keyword_or_none("query_starts"), key_starts = keyword_or_none("key_starts"),
         seed = keyword_or_none("seed");
  float scale = keyword("scale"), softcap = keyword("softcap");
  int lower = keyword("lower"), upper = keyword("upper");
  double dropout_p = keyword("dropout_p");
  bool tf32 = keyword("tf32");

  int64_t rows() const { return query.sizes[0] * query.sizes[1] * query.sizes[2]; }

  template <class View> View like_query(const tensor& x) const {
    return tokens<View>(x, query.type, query.sizes[0], query.sizes[1], query.sizes[2], query.sizes[3]);
  }
  template <class View> View like_key(const tensor& x) const {
    return tokens<View>(x, query.type, query.sizes[0], key.sizes[1], key.sizes[2], query.sizes[3]);
  }

  void fill(cuda::AttentionArgs& a) const {
    query.check_rank(4), key.check_rank(4);
    a.dtype = launch_dtype(query);
    a.query = like_query<cuda::TokensView>(query);
    a.key = like_key<cuda::TokensView>(key), a.value = like_key<cuda::TokensView>(value);
    a.lse = lse.contiguous_as<float>(rows());
    a.lse_batch_stride = query.sizes[1] * query.sizes[2], a.lse_head_stride = query.sizes[2];
    fill_mask(a);
    a.batch = int(query.sizes[0]);
    fill_starts(a);
    a.num_heads = int(query.sizes[1]), a.num_kv_heads = int(key.sizes[1]);
    a.query_len = int(query.sizes[2]), a.key_len = int(key.sizes[2]), a.head_dim = int(query.sizes[3]);
    a.lower = lower, a.upper = upper, a.scale = scale, a.softcap = softcap;
    a.seed = seed.contiguous_as<const int64_t>(1);
    a.threshold = uint32_t(std::floor(dropout_p * 4294967296.0)), a.keep_scale = float(1 / (1 - dropout_p));
    a.tf32 = tf32;
  }

 private:
  void fill_mask(cuda::AttentionArgs& a) const {
    mask.check_rank(4);
    a.mask_type = type_of_mask(), a.mask = mask.data;
    a.mask_batch_stride = a.mask_head_stride = a.mask_query_stride = a.mask_key_stride = 0;
    if (mask.given()) {
      a.mask_batch_stride = mask.broadcast_stride(0), a.mask_head_stride = mask.broadcast_stride(1);
      a.mask_query_stride = mask.broadcast_stride(2), a.mask_key_stride = mask.broadcast_stride(3);
    }
    a.key_padding = key_padding.as<const bool>(2);
    a.key_padding_batch_stride = a.key_padding_key_stride = 0;
    if (key_padding.given()) {
      a.key_padding_batch_stride = key_padding.broadcast_stride(0);
      a.key_padding_key_stride = key_padding.broadcast_stride(1);
    }
  }

  cuda::MaskType type_of_mask() const {
    if (!mask.given()) return cuda::MaskType::none;
    if (mask.type == dtype::boolean) return cuda::MaskType::boolean;
    if (mask.type == query.type) return cuda::MaskType::additive;
    if (mask.type == dtype::float32) return cuda::MaskType::additive_fp32;
    throw_argument_error(mask.name, "torch.bool, torch.float32 or the dtype of query", name_of(mask.type));
  }

  void fill_starts(cuda::AttentionArgs& a) const {
    a.query_starts = starts(query_starts, a.query_starts_int64), a.key_starts = starts(key_starts, a.key_starts_int64);
    if (query_starts.given() != key_starts.given() || query_starts.count != key_starts.count)
      throw_argument_error("key_starts", std::to_string(query_starts.count) + " offsets",
                           std::to_string(key_starts.count));
    if (!query_starts.given()) return;
    check_size(query, "a batch size of", 1, query.sizes[0]);
    a.batch = int(query_starts.count) - 1;
  }

  static const void* starts(const tensor& x, bool& is_int64) {
    is_int64 = x.given() && x.type == dtype::int64;
    if (is_int64) return x.contiguous_as<const int64_t>(x.count);
    return x.contiguous_as<const int32_t>(x.count);
  }
};

struct attention_forward_arguments : attention_arguments {
  using attention_arguments::attention_arguments;
  launch_target target{keyword("device"), keyword("stream")};
};

static void attention_forward(const attention_forward_arguments& a) {
  cuda::AttentionForwardArgs args{};
  a.fill(args);
  args.out = a.like_query<cuda::TokensResult>(a.out);
  a.target.launch(cuda::attention_forward, args);
}
FASTLM_BINDING(attention_forward)

// partial_out is (batch, head, query, split, head_dim), partial_max and partial_sum are (batch, head, query, split).
struct attention_decode_arguments : attention_arguments {
  using attention_arguments::attention_arguments;
  tensor partial_out = keyword("partial_out"), partial_max = keyword("partial_max"),
         partial_sum = keyword("partial_sum");
  int split_size = keyword("split_size");
  launch_target target{keyword("device"), keyword("stream")};
};

static void attention_decode(const attention_decode_arguments& a) {
  cuda::AttentionForwardArgs args{};
  a.fill(args);
  args.out = a.like_query<cuda::TokensResult>(a.out);
  args.num_splits = (args.key_len + a.split_size - 1) / a.split_size, args.split_size = a.split_size;
  const int64_t partials = a.rows() * args.num_splits;
  args.partial_out = a.partial_out.contiguous_as<float>(partials * args.head_dim);
  args.partial_max = a.partial_max.contiguous_as<float>(partials);
  args.partial_sum = a.partial_sum.contiguous_as<float>(partials);
  a.target.launch(cuda::attention_decode, args);
}
FASTLM_BINDING(attention_decode)

struct attention_backward_arguments : attention_arguments {
  using attention_arguments::attention_arguments;
  tensor dout = keyword("dout"), dlse = keyword_or_none("dlse"), delta = keyword("delta"), dquery = keyword("dquery"),
         dkey = keyword_or_none("dkey"), dvalue = keyword_or_none("dvalue"), dmask = keyword_or_none("dmask");
  bool exact = keyword("exact");
  launch_target target{keyword("device"), keyword("stream")};
};

static void attention_backward(const attention_backward_arguments& a) {
  cuda::AttentionBackwardArgs args{};
  a.fill(args);
  args.out = a.like_query<cuda::TokensView>(a.out), args.dout = a.like_query<cuda::TokensView>(a.dout);
  args.dlse = a.dlse.contiguous_as<const float>(a.rows()), args.delta = a.delta.contiguous_as<float>(a.rows());
  args.dquery = a.like_query<cuda::TokensResult>(a.dquery);
  if (a.dkey.given() != a.dvalue.given()) throw_argument_error("dvalue", "both dkey and dvalue or none", "one of them");
  args.dkey = a.like_key<cuda::TokensResult>(a.dkey), args.dvalue = a.like_key<cuda::TokensResult>(a.dvalue);
  args.dmask = a.dmask.contiguous_as<float>(a.mask.given() ? a.mask.count : 0);
  args.mask_batch = a.mask.given() ? int(a.mask.sizes[0]) : 1;
  args.mask_heads = a.mask.given() ? int(a.mask.sizes[1]) : 1;
  args.mask_has_one_row = a.mask.given() && a.mask.sizes[2] == 1;
  args.exact = a.exact;
  a.target.launch(cuda::attention_backward, args);
}
FASTLM_BINDING(attention_backward)

}  // namespace fastlm::bindings
