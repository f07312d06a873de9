// Python ↔ launchers of the CUDA kernels, of the real module and of the emulated one. Arguments are addresses and sizes
// that fastlm/ops has checked; nothing here knows torch or CUDA's headers: the host's compiler alone sees this file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <array>
#include <cstdint>
#include <utility>
#include "cuda/attention.h"
#include "cuda/device.h"
#include "cuda/dtype.h"
#include "cuda/gelu_mlp.h"
#include "cuda/linear_cross_entropy.h"
#include "cuda/layernorm_residual.h"

namespace py = pybind11;
using namespace py::literals;
using namespace fastlm::cuda;

using address = uintptr_t;
template <class T = void> static T* at(address a) { return reinterpret_cast<T*>(a); }

using queue = std::pair<int, address>;  // (device, stream)
using strides3 = std::array<int64_t, 3>;
using strides4 = std::array<int64_t, 4>;

// Calls launcher(stream) without the GIL, on the queue's device.
template <class Launcher> static void launch(queue where, Launcher launcher) {
  py::gil_scoped_release nogil;
  use_device(where.first);
  launcher(reinterpret_cast<stream_t>(where.second));
}

// layernorm_residual

static void bind_layernorm_residual(py::module_& m) {
  m.def(
      "layernorm_residual_forward",
      [](queue where, DType x_dtype, DType residual_dtype, DType weight_dtype, address x, int64_t x_stride,
         address residual, int64_t residual_stride, address weight, address bias, address y, address summed,
         address mean, address rstd, address seed, int64_t rows, int64_t width, float eps, double dropout_p) {
        const layernorm_residual_forward_args args{.x_dtype = x_dtype,
                                                   .residual_dtype = residual_dtype,
                                                   .weight_dtype = weight_dtype,
                                                   .x = at<>(x),
                                                   .x_stride = x_stride,
                                                   .residual = at<>(residual),
                                                   .residual_stride = residual_stride,
                                                   .weight = at<>(weight),
                                                   .bias = at<>(bias),
                                                   .y = at<>(y),
                                                   .summed = at<>(summed),
                                                   .mean = at<float>(mean),
                                                   .rstd = at<float>(rstd),
                                                   .seed = at<int64_t>(seed),
                                                   .rows = rows,
                                                   .width = width,
                                                   .eps = eps,
                                                   .dropout_p = dropout_p};
        launch(where, [&](stream_t stream) { layernorm_residual_forward(args, stream); });
      },
      "queue"_a, "x_dtype"_a, "residual_dtype"_a, "weight_dtype"_a, "x"_a, "x_stride"_a, "residual"_a,
      "residual_stride"_a, "weight"_a, "bias"_a, "y"_a, "summed"_a, "mean"_a, "rstd"_a, "seed"_a, "rows"_a, "width"_a,
      "eps"_a, "dropout_p"_a);

  m.def(
      "layernorm_residual_backward",
      [](queue where, DType x_dtype, DType residual_dtype, DType weight_dtype, address dy, int64_t dy_stride,
         address dsummed, int64_t dsummed_stride, address summed, int64_t summed_stride, address weight, address mean,
         address rstd, address dx, address dresidual, address dweight, address dbias, address shares, address seed,
         int64_t rows, int64_t width, double dropout_p) {
        const layernorm_residual_backward_args args{.x_dtype = x_dtype,
                                                    .residual_dtype = residual_dtype,
                                                    .weight_dtype = weight_dtype,
                                                    .dy = at<>(dy),
                                                    .dy_stride = dy_stride,
                                                    .dsummed = at<>(dsummed),
                                                    .dsummed_stride = dsummed_stride,
                                                    .summed = at<>(summed),
                                                    .summed_stride = summed_stride,
                                                    .weight = at<>(weight),
                                                    .mean = at<float>(mean),
                                                    .rstd = at<float>(rstd),
                                                    .dx = at<>(dx),
                                                    .dresidual = at<>(dresidual),
                                                    .dweight = at<>(dweight),
                                                    .dbias = at<>(dbias),
                                                    .shares = at<float>(shares),
                                                    .seed = at<int64_t>(seed),
                                                    .rows = rows,
                                                    .width = width,
                                                    .dropout_p = dropout_p};
        launch(where, [&](stream_t stream) { layernorm_residual_backward(args, stream); });
      },
      "queue"_a, "x_dtype"_a, "residual_dtype"_a, "weight_dtype"_a, "dy"_a, "dy_stride"_a, "dsummed"_a,
      "dsummed_stride"_a, "summed"_a, "summed_stride"_a, "weight"_a, "mean"_a, "rstd"_a, "dx"_a, "dresidual"_a,
      "dweight"_a, "dbias"_a, "shares"_a, "seed"_a, "rows"_a, "width"_a, "dropout_p"_a);

  m.def("layernorm_residual_most_shares", &layernorm_residual_most_shares);
}

// gelu_mlp

static void bind_gelu_mlp(py::module_& m) {
  m.def(
      "gelu_mlp_forward",
      [](queue where, DType dtype, address x, int64_t x_stride, address w1, int64_t w1_k_stride, int64_t w1_n_stride,
         address b1, address hidden, address activated, int64_t rows, int64_t width, int64_t hidden_width, bool tanh,
         bool tf32) {
        const gelu_mlp_forward_args args{dtype,    at<>(x),      x_stride,        at<>(w1), w1_k_stride, w1_n_stride,
                                         at<>(b1), at<>(hidden), at<>(activated), rows,     width,       hidden_width,
                                         tanh,     tf32};
        launch(where, [&](stream_t stream) { gelu_mlp_forward(args, stream); });
      },
      "queue"_a, "dtype"_a, "x"_a, "x_stride"_a, "w1"_a, "w1_k_stride"_a, "w1_n_stride"_a, "b1"_a, "hidden"_a,
      "activated"_a, "rows"_a, "width"_a, "hidden_width"_a, "tanh"_a, "tf32"_a);

  m.def(
      "gelu_mlp_backward",
      [](queue where, DType dtype, address dy, int64_t dy_stride, address w2, int64_t w2_k_stride, int64_t w2_n_stride,
         address hidden, address dhidden, address activated, int64_t rows, int64_t out_width, int64_t hidden_width,
         bool tanh, bool tf32) {
        const gelu_mlp_backward_args args{
            dtype,         at<>(dy),        dy_stride, at<>(w2),  w2_k_stride,  w2_n_stride, at<>(hidden),
            at<>(dhidden), at<>(activated), rows,      out_width, hidden_width, tanh,        tf32};
        launch(where, [&](stream_t stream) { gelu_mlp_backward(args, stream); });
      },
      "queue"_a, "dtype"_a, "dy"_a, "dy_stride"_a, "w2"_a, "w2_k_stride"_a, "w2_n_stride"_a, "hidden"_a, "dhidden"_a,
      "activated"_a, "rows"_a, "out_width"_a, "hidden_width"_a, "tanh"_a, "tf32"_a);
}

// linear_cross_entropy

static void bind_linear_cross_entropy(py::module_& m) {
  m.def(
      "linear_cross_entropy_forward",
      [](queue where, DType dtype, address x, int64_t x_stride, address weight, int64_t weight_k_stride,
         int64_t weight_n_stride, address bias, address target, int64_t target_stride, address loss, address parts,
         address sums, address at_target, int64_t rows, int64_t width, int64_t vocab, int64_t ignore_index,
         float label_smoothing, bool tf32) {
        const cross_entropy_targets targets{at<const int64_t>(target), target_stride, ignore_index, label_smoothing,
                                            at<float>(loss)};
        const linear_cross_entropy_forward_args args{dtype,
                                                     at<>(x),
                                                     x_stride,
                                                     at<>(weight),
                                                     weight_k_stride,
                                                     weight_n_stride,
                                                     at<>(bias),
                                                     targets,
                                                     at<float>(parts),
                                                     at<float>(sums),
                                                     at<float>(at_target),
                                                     rows,
                                                     width,
                                                     vocab,
                                                     tf32};
        launch(where, [&](stream_t stream) { linear_cross_entropy_forward(args, stream); });
      },
      "queue"_a, "dtype"_a, "x"_a, "x_stride"_a, "weight"_a, "weight_k_stride"_a, "weight_n_stride"_a, "bias"_a,
      "target"_a, "target_stride"_a, "loss"_a, "parts"_a, "sums"_a, "at_target"_a, "rows"_a, "width"_a, "vocab"_a,
      "ignore_index"_a, "label_smoothing"_a, "tf32"_a);

  m.def(
      "linear_cross_entropy_gradient",
      [](queue where, DType dtype, address logits, int64_t logits_stride, address target, int64_t target_stride,
         address row_scale, address loss, address statistics, address shares, int64_t rows, int64_t vocab,
         int64_t ignore_index, float label_smoothing) {
        const cross_entropy_targets targets{at<const int64_t>(target), target_stride, ignore_index, label_smoothing,
                                            at<float>(loss)};
        const linear_cross_entropy_gradient_args args{dtype,
                                                      at<>(logits),
                                                      logits_stride,
                                                      targets,
                                                      at<const float>(row_scale),
                                                      at<float>(statistics),
                                                      at<float>(shares),
                                                      rows,
                                                      vocab};
        launch(where, [&](stream_t stream) { linear_cross_entropy_gradient(args, stream); });
      },
      "queue"_a, "dtype"_a, "logits"_a, "logits_stride"_a, "target"_a, "target_stride"_a, "row_scale"_a, "loss"_a,
      "statistics"_a, "shares"_a, "rows"_a, "vocab"_a, "ignore_index"_a, "label_smoothing"_a);

  m.def("linear_cross_entropy_parts", &linear_cross_entropy_parts, "dtype"_a, "vocab"_a);
  m.def("linear_cross_entropy_shares", &linear_cross_entropy_shares, "rows"_a);
}

// attention

template <class View> static View tokens(address data, strides3 strides) {
  View x;
  x.data = at<>(data), x.batch_stride = strides[0], x.head_stride = strides[1], x.token_stride = strides[2];
  return x;
}

// What the passes share. Of packed sequences the starts are (address, whether of 64 bits).
using starts = std::pair<address, bool>;
struct attention_inputs {
  DType type;
  address query, key, value, lse, mask, padding, seed;
  strides3 query_strides, key_strides, value_strides;
  std::array<int64_t, 2> lse_strides, padding_strides;
  strides4 mask_strides;
  int mask_type;
  starts query_starts, key_starts;
  std::array<int, 6> sizes;
  std::array<int, 2> band;
  float scale, keep_scale;
  uint32_t threshold;
  bool tf32;

  void fill(AttentionArgs& a) const {
    a.dtype = type;
    a.query = tokens<TokensView>(query, query_strides), a.key = tokens<TokensView>(key, key_strides),
    a.value = tokens<TokensView>(value, value_strides);
    a.lse = at<float>(lse), a.lse_batch_stride = lse_strides[0], a.lse_head_stride = lse_strides[1];
    a.mask_type = MaskType(mask_type), a.mask = at<>(mask);
    a.mask_batch_stride = mask_strides[0], a.mask_head_stride = mask_strides[1], a.mask_query_stride = mask_strides[2],
    a.mask_key_stride = mask_strides[3];
    a.padding = at<bool>(padding), a.padding_batch_stride = padding_strides[0],
    a.padding_key_stride = padding_strides[1];
    a.query_starts = at<>(query_starts.first), a.wide_query_starts = query_starts.second;
    a.key_starts = at<>(key_starts.first), a.wide_key_starts = key_starts.second;
    a.batch = sizes[0], a.heads = sizes[1], a.key_heads = sizes[2], a.query_len = sizes[3], a.key_len = sizes[4],
    a.head_dim = sizes[5];
    a.lower = band[0], a.upper = band[1], a.scale = scale;
    a.seed = at<int64_t>(seed), a.threshold = threshold, a.keep_scale = keep_scale, a.tf32 = tf32;
  }
};

static void bind_attention(py::module_& m) {
  py::class_<attention_inputs>(m, "attention_inputs")
      .def(py::init([](DType type, address query, strides3 query_strides, address key, strides3 key_strides,
                       address value, strides3 value_strides, address lse, std::array<int64_t, 2> lse_strides,
                       address mask, int mask_type, strides4 mask_strides, address padding,
                       std::array<int64_t, 2> padding_strides, starts query_starts, starts key_starts,
                       std::array<int, 6> sizes, std::array<int, 2> band, float scale, address seed, uint32_t threshold,
                       float keep_scale, bool tf32) {
             return attention_inputs{type,
                                     query,
                                     key,
                                     value,
                                     lse,
                                     mask,
                                     padding,
                                     seed,
                                     query_strides,
                                     key_strides,
                                     value_strides,
                                     lse_strides,
                                     padding_strides,
                                     mask_strides,
                                     mask_type,
                                     query_starts,
                                     key_starts,
                                     sizes,
                                     band,
                                     scale,
                                     keep_scale,
                                     threshold,
                                     tf32};
           }),
           "dtype"_a, "query"_a, "query_strides"_a, "key"_a, "key_strides"_a, "value"_a, "value_strides"_a, "lse"_a,
           "lse_strides"_a, "mask"_a, "mask_type"_a, "mask_strides"_a, "padding"_a, "padding_strides"_a,
           "query_starts"_a, "key_starts"_a, "sizes"_a, "band"_a, "scale"_a, "seed"_a, "threshold"_a, "keep_scale"_a,
           "tf32"_a);

  m.def(
      "attention_forward",
      [](queue where, const attention_inputs& inputs, address out, strides3 out_strides) {
        AttentionForwardArgs a{};
        inputs.fill(a);
        a.out = tokens<TokensResult>(out, out_strides);
        launch(where, [&](stream_t stream) { attention_forward(a, stream); });
      },
      "queue"_a, "inputs"_a, "out"_a, "out_strides"_a);

  m.def(
      "attention_decode",
      [](queue where, const attention_inputs& inputs, address out, strides3 out_strides, address part, address top,
         address norm, int stretch, int stretches) {
        AttentionForwardArgs a{};
        inputs.fill(a);
        a.out = tokens<TokensResult>(out, out_strides);
        a.part = at<float>(part), a.top = at<float>(top), a.norm = at<float>(norm), a.stretch = stretch,
        a.stretches = stretches;
        launch(where, [&](stream_t stream) { attention_decode(a, stream); });
      },
      "queue"_a, "inputs"_a, "out"_a, "out_strides"_a, "part"_a, "top"_a, "norm"_a, "stretch"_a, "stretches"_a);

  m.def(
      "attention_backward",
      [](queue where, const attention_inputs& inputs, address out, strides3 out_strides, address dout,
         strides3 dout_strides, address dlse, address delta, address dquery, strides3 dquery_strides, address dkey,
         strides3 dkey_strides, address dvalue, strides3 dvalue_strides, address dmask, std::array<int, 2> mask_sizes,
         bool mask_row, bool exact) {
        AttentionBackwardArgs a{};
        inputs.fill(a);
        a.out = tokens<TokensView>(out, out_strides), a.dout = tokens<TokensView>(dout, dout_strides);
        a.dlse = at<float>(dlse), a.delta = at<float>(delta), a.dmask = at<float>(dmask);
        a.dquery = tokens<TokensResult>(dquery, dquery_strides), a.dkey = tokens<TokensResult>(dkey, dkey_strides);
        a.dvalue = tokens<TokensResult>(dvalue, dvalue_strides);
        a.mask_batch = mask_sizes[0], a.mask_heads = mask_sizes[1], a.mask_row = mask_row, a.exact = exact;
        launch(where, [&](stream_t stream) { attention_backward(a, stream); });
      },
      "queue"_a, "inputs"_a, "out"_a, "out_strides"_a, "dout"_a, "dout_strides"_a, "dlse"_a, "delta"_a, "dquery"_a,
      "dquery_strides"_a, "dkey"_a, "dkey_strides"_a, "dvalue"_a, "dvalue_strides"_a, "dmask"_a, "mask_sizes"_a,
      "mask_row"_a, "exact"_a);
}

PYBIND11_MODULE(FASTLM_MODULE, m) {
  py::enum_<DType>(m, "dtype")
      .value("float32", DType::float32)
      .value("bfloat16", DType::bfloat16)
      .value("float16", DType::float16);
  bind_layernorm_residual(m);
  bind_attention(m);
  bind_gelu_mlp(m);
  bind_linear_cross_entropy(m);
  m.attr("archs") = FASTLM_CUDA_ARCHS;  // "80,90,100,120": of the code inside; and PTX of the first
  m.def("runtime_version", &runtime_version);
  m.def("driver_version", &driver_version);
}
