// rotary: the arguments of csrc/cpu/rotary.h.
#include "arguments.h"
#include "dispatch.h"
#include "../cpu/rotary.h"

namespace fastlm {
FASTLM_ROTARY()
}  // namespace fastlm

namespace fastlm::bindings {

struct rotary_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor query = keyword_or_none("query"), key = keyword_or_none("key"), cos = keyword("cos"), sin = keyword("sin"),
         out_query = keyword_or_none("out_query"), out_key = keyword_or_none("out_key");
  bool inverse = keyword("inverse");
  int threads = keyword("threads");
};

static void check_unit_stride(const tensor& x) {
  if (x.width != 1 && x.strides[x.rank - 1] != 1)
    throw_argument_error(x.name, "a contiguous last dimension", x.layout());
}

// Queries or keys, checked to have the sizes of the other.
template <class T> rotary_heads<T> heads_of(const tensor& x, const tensor& out, rotary_size size) {
  if (!x.given()) return {};
  const T* const in = x.as<const T>(4);
  check_unit_stride(x);
  if (x.sizes[0] != size.batch || x.sizes[2] != size.tokens || x.width != size.head_dim)
    throw_argument_error(x.name,
                         "batch " + std::to_string(size.batch) + ", tokens " + std::to_string(size.tokens) +
                             " and head_dim " + std::to_string(size.head_dim),
                         x.layout());
  return {in, x.strides[0], x.strides[1], x.strides[2], out.contiguous_as<T>(x.count), x.sizes[1]};
}

static const float* table_of(const tensor& table, rotary_size size, int64_t rotary_dim) {
  const float* const data = table.as<const float>(3);
  check_unit_stride(table);
  if ((table.sizes[0] != 1 && table.sizes[0] != size.batch) || table.sizes[1] != size.tokens ||
      table.width != rotary_dim || rotary_dim % 2 || rotary_dim > size.head_dim)
    throw_argument_error(table.name, "a table of the batch and tokens of query", table.layout());
  return data;
}

static void rotary(const rotary_arguments& a) {
  const tensor& x = a.query.given() ? a.query : a.key;
  x.check_rank(4);
  if (!x.given()) throw_argument_error("query", "a tensor", "None");
  const rotary_size size{x.sizes[0], x.sizes[2], x.sizes[3]};
  const rotary_table table{table_of(a.cos, size, a.cos.width),
                           table_of(a.sin, size, a.cos.width),
                           a.cos.broadcast_stride(0),
                           a.cos.strides[1],
                           a.sin.broadcast_stride(0),
                           a.sin.strides[1],
                           a.cos.width,
                           a.inverse};
  dispatch(x, [&]<class T>() {
    fastlm::rotate(heads_of<T>(a.query, a.out_query, size), heads_of<T>(a.key, a.out_key, size), table, size,
                   a.threads);
  });
}
FASTLM_BINDING(rotary)

}  // namespace fastlm::bindings
