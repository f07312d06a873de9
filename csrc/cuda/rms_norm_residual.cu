// s = residual + dropout(x),  n = s·rstd,  rstd = 1/√(mean(s²) + eps),  y = T(n)·w as Llama rounds it (T is x's dtype),
// or n·(1 + w) as Gemma does
//
// Memory-bound. Forward reads x and residual and writes s and y: 8 bytes per element in 16 bits. Backward reads dy, s
// and ds and writes dresidual, and dx if dropout or its dtype makes it a tensor of its own: 8 or 10 bytes. About 8 and
// 12 FLOPs per element. s is normalized as it is stored, rounded to the dtype of residual. The layout is that of
// rms_norm_residual.cu: rows in registers, partial sums of dw per block. Rows of inputs may have three strides, so
// that queries and keys are normalized where they are; each thread computes where its row begins.
#include "rms_norm_residual.h"
#include "residual_norm.cuh"

namespace fastlm::cuda {

struct rms_norm_weight {
  const void* data;
  bool is_float;     // otherwise x's type
  bool unit_offset;  // 1 + w is the factor

  // The factor of a column, or of a vector of them.
  template <class T> FASTLM_DEVICE float at(int column) const {
    return parameter<T>(data, is_float, column) + (unit_offset ? 1.0f : 0.0f);
  }
  template <class T> FASTLM_DEVICE void load(float (&out)[VECTOR], int column) const {
    load_parameters<T>(out, data, is_float, column);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out[i] += unit_offset ? 1.0f : 0.0f;
  }
  // What is multiplied by the factor: Llama rounds it first.
  template <class T> FASTLM_DEVICE float rounded(float normalized) const {
    return unit_offset ? normalized : to_float(from_float<T>(normalized));
  }
};

template <class T, class R> struct rms_norm_forward_args {
  const T* x;
  row_layout x_layout;
  const R* residual;
  row_layout residual_layout;
  rms_norm_weight weight;
  T* y;
  R* summed;
  float* rstd;
  int64_t rows;
  int width, team;
  float eps;
  dropout drop;
};

template <class T, class R> struct rms_norm_backward_args {
  const T* dy;
  row_layout dy_layout;
  const R* dsummed;
  row_layout dsummed_layout;
  const R* summed;
  row_layout summed_layout;
  rms_norm_weight weight;
  const float* rstd;
  T* dx;
  R* dresidual;
  float* dweight;  // partial sums, one row of padded_width columns per block
  int64_t rows;
  int width, padded_width, team, rows_per_team;
  dropout drop;
};

// 1/√(mean(s²) + eps), and NaN where the sum of squares overflows: a factor of 0 would give 0 as the result.
FASTLM_DEVICE float rms_norm_rstd(float squares, float width, float eps) {
  return squares < INFINITY ? 1.0f / sqrtf(squares / width + eps) : NAN;
}

// Where a row begins. Numbers of rows have 31 bits, so the divisions have 32.
FASTLM_DEVICE int64_t rms_norm_row_offset(const row_layout& layout, int64_t row) {
  if (row < layout.inner) return row * layout.inner_stride;
  const uint32_t inner = uint32_t(layout.inner), middle = uint32_t(layout.middle), rest = uint32_t(row) / inner;
  return int64_t(uint32_t(row) % inner) * layout.inner_stride + int64_t(rest % middle) * layout.middle_stride +
         int64_t(rest / middle) * layout.outer_stride;
}

template <class T, class R> __global__ void __launch_bounds__(MAX_TEAM, 2)
    rms_norm_residual_forward_kernel(const rms_norm_forward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(args.team, args.drop.active());
  const int64_t row = int64_t(blockIdx.x) * team.teams + team.index;
  const int width = args.width, end = row < args.rows ? width : 0;

  const int64_t x_row = rms_norm_row_offset(args.x_layout, row),
                residual_row = rms_norm_row_offset(args.residual_layout, row);
  vec<T, VECTOR> x[VECTORS];
  vec<R, VECTOR> residual[VECTORS];
#pragma unroll
  for (int c = 0; c < VECTORS; ++c) {
    const int column = team.column(c);
    x[c] = {}, residual[c] = {};
    if (column < end) x[c] = vec<T, VECTOR>::load(args.x + x_row + column);
    if (column < end && args.residual) residual[c] = vec<R, VECTOR>::load(args.residual + residual_row + column);
  }
  float s[VECTORS][VECTOR];
#pragma unroll
  for (int c = 0; c < VECTORS; ++c)
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) s[c][i] = to_float(x[c][i]);
  if (args.drop.active()) apply_dropout(s, args.drop, row, team.column(0));
#pragma unroll
  for (int c = 0; c < VECTORS; ++c) {
    vec<R, VECTOR> stored;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      stored[i] = from_float<R>(s[c][i] + to_float(residual[c][i]));
      s[c][i] = to_float(stored[i]);
    }
    if (args.summed && team.column(c) < end) stored.store(args.summed + row * width + team.column(c));
  }

  float squares[1] = {};
#pragma unroll
  for (int c = 0; c < VECTORS; ++c)
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) squares[0] += s[c][i] * s[c][i];
  team.sum(squares, sums);
  const float rstd = rms_norm_rstd(squares[0], float(width), args.eps);
  if (row < args.rows && team.thread == 0) args.rstd[row] = rstd;
#pragma unroll
  for (int c = 0; c < VECTORS; ++c) {
    const int column = team.column(c);
    if (column >= end) continue;
    float weight[VECTOR];
    args.weight.template load<T>(weight, column);
    vec<T, VECTOR> y;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) y[i] = from_float<T>(args.weight.template rounded<T>(s[c][i] * rstd) * weight[i]);
    y.store(args.y + row * width + column);
  }
}

// ds = rstd·(g − n·mean(g·n)) + dsummed,  n = s·rstd,  g = dy·w;  dresidual = ds,  dx = dropout(ds);  dw = Σ_rows dy·n
template <class T, class R> __global__ void __launch_bounds__(MAX_TEAM, 1)
    rms_norm_residual_backward_kernel(const rms_norm_backward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(args.team, args.drop.active());
  const int width = args.width;
  float dweight[VECTORS][VECTOR] = {};
  const row_slots<T> dy_slots{shared + sums_bytes(1)};
  const row_slots<R> s_slots{dy_slots.base + blockDim.x * row_slots<T>::bytes_per_thread},
      dsummed_slots{s_slots.base + blockDim.x * row_slots<R>::bytes_per_thread};
  const auto row_of = [&](int step) {
    return (int64_t(blockIdx.x) * args.rows_per_team + step) * team.teams + team.index;
  };
  const auto exists = [&](int step) { return step < args.rows_per_team && row_of(step) < args.rows; };
  const auto prefetch = [&](int step) {
    if (!args.dy || !exists(step)) return;
    const int64_t row = row_of(step);
    dy_slots.prefetch(args.dy + rms_norm_row_offset(args.dy_layout, row), team, width);
    s_slots.prefetch(args.summed + rms_norm_row_offset(args.summed_layout, row), team, width);
    cp_async_commit();
  };
  const auto prefetch_dsummed = [&](int step) {
    if (!args.dsummed || !exists(step)) return;
    const int64_t row = row_of(step);
    dsummed_slots.prefetch(args.dsummed + rms_norm_row_offset(args.dsummed_layout, row), team, width);
    cp_async_commit();
  };
  prefetch(0), prefetch_dsummed(0);
#pragma unroll 1
  for (int step = 0; step < args.rows_per_team; ++step) {
    const int64_t row = row_of(step);
    const int end = row < args.rows ? width : 0;
    vec<T, VECTOR> dy[VECTORS] = {};
    vec<R, VECTOR> s[VECTORS] = {};
    cp_async_wait<0>();
    if (end > 0 && args.dy) dy_slots.take(dy), s_slots.take(s);
    __syncwarp();  // orders the reads before the copies that overwrite what they read
    prefetch(step + 1);
    float ds[VECTORS][VECTOR] = {};
    if (args.dy) {
      const float rstd = row < args.rows ? args.rstd[row] : 0.0f;
      float n[VECTORS][VECTOR], correlation[1] = {};
#pragma unroll
      for (int c = 0; c < VECTORS; ++c) {
        const int column = team.column(c);
        float weight[VECTOR] = {};
        if (column < end) args.weight.template load<T>(weight, column);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          n[c][i] = column < end ? to_float(s[c][i]) * rstd : 0.0f;
          ds[c][i] = to_float(dy[c][i]) * weight[i];
          correlation[0] += ds[c][i] * n[c][i];
          dweight[c][i] += to_float(dy[c][i]) * n[c][i];
        }
      }
      team.sum(correlation, sums);
      const float mean_gn = correlation[0] / float(width);
#pragma unroll
      for (int c = 0; c < VECTORS; ++c)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) ds[c][i] = rstd * (ds[c][i] - n[c][i] * mean_gn);
    }
    vec<R, VECTOR> dsummed[VECTORS] = {};  // read here, where fewer registers are in use
    if (end > 0 && args.dsummed) dsummed_slots.take(dsummed);
    __syncwarp();
    prefetch_dsummed(step + 1);
#pragma unroll
    for (int c = 0; c < VECTORS; ++c) {
      vec<R, VECTOR> out;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        ds[c][i] += to_float(dsummed[c][i]);
        out[i] = from_float<R>(ds[c][i]);
      }
      if (args.dresidual && team.column(c) < end) out.store(args.dresidual + row * width + team.column(c));
    }
    if (!args.dx) continue;
    if (args.drop.active()) apply_dropout(ds, args.drop, row, team.column(0));
#pragma unroll
    for (int c = 0; c < VECTORS; ++c) {
      vec<T, VECTOR> out;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) out[i] = from_float<T>(ds[c][i]);
      if (team.column(c) < end) out.store(args.dx + row * width + team.column(c));
    }
  }
  __syncthreads();  // other teams may still read what they have copied
  if (args.dweight)
    combine_partials(team, dweight, sums, args.dweight + int64_t(blockIdx.x) * args.padded_width, width);
}

// Any width and alignment, a column at a time: thread t has columns t, t + threads, … A block is one team.
template <class T, class R> __global__ void __launch_bounds__(MAX_TEAM)
    rms_norm_residual_forward_generic_kernel(const rms_norm_forward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(int(blockDim.x), false);
  const int64_t row = blockIdx.x;
  const int width = args.width, first = int(threadIdx.x);
  const T* x = args.x + rms_norm_row_offset(args.x_layout, row);
  const int64_t residual_row = rms_norm_row_offset(args.residual_layout, row);
  R* summed = args.summed + row * width;
  const auto s = [&](int column) { return args.summed ? to_float(summed[column]) : to_float(x[column]); };  // as stored
  float squares[1] = {};
#pragma unroll 1
  for (int column = first; column < width; column += team.size) {
    float sum = to_float(x[column]);
    if (args.drop.active())
      sum = kept(uint64_t(*args.drop.seed), args.drop.threshold, uint32_t(column), uint32_t(row), 0)
                ? sum * args.drop.scale
                : 0.0f;
    if (args.residual) sum += to_float(args.residual[residual_row + column]);
    if (args.summed) {
      summed[column] = from_float<R>(sum);
      sum = to_float(summed[column]);
    }
    squares[0] += sum * sum;
  }
  team.sum(squares, sums);
  const float rstd = rms_norm_rstd(squares[0], float(width), args.eps);
  if (first == 0) args.rstd[row] = rstd;
#pragma unroll 1
  for (int column = first; column < width; column += team.size)
    args.y[row * width + column] =
        from_float<T>(args.weight.template rounded<T>(s(column) * rstd) * args.weight.template at<T>(column));
}

// The partial sums are kept in memory: each thread adds to its own columns.
template <class T, class R> __global__ void __launch_bounds__(MAX_TEAM)
    rms_norm_residual_backward_generic_kernel(const rms_norm_backward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(int(blockDim.x), false);
  const int width = args.width, first = int(threadIdx.x);
  float* dweight = args.dweight + int64_t(blockIdx.x) * args.padded_width;
#pragma unroll 1
  for (int step = 0; step < args.rows_per_team; ++step) {
    const int64_t row = int64_t(blockIdx.x) * args.rows_per_team + step;
    if (row >= args.rows) return;  // in all threads; the first row of a block exists
    const int64_t dy_row = rms_norm_row_offset(args.dy_layout, row),
                  dsummed_row = rms_norm_row_offset(args.dsummed_layout, row);
    const R* s = args.summed + rms_norm_row_offset(args.summed_layout, row);
    const float rstd = args.rstd[row];
    float correlation[1] = {};
    if (args.dy) {
#pragma unroll 1
      for (int column = first; column < width; column += team.size) {
        const float dy = to_float(args.dy[dy_row + column]), n = to_float(s[column]) * rstd;
        correlation[0] += dy * args.weight.template at<T>(column) * n;
        if (args.dweight) dweight[column] = (step ? dweight[column] : 0.0f) + dy * n;
      }
      team.sum(correlation, sums);
    }
    const float mean_gn = correlation[0] / float(width);
#pragma unroll 1
    for (int column = first; column < width; column += team.size) {
      float ds = 0.0f;
      if (args.dy) {
        const float n = to_float(s[column]) * rstd;
        ds = rstd * (to_float(args.dy[dy_row + column]) * args.weight.template at<T>(column) - n * mean_gn);
      }
      if (args.dsummed) ds += to_float(args.dsummed[dsummed_row + column]);
      if (args.dresidual) args.dresidual[row * width + column] = from_float<R>(ds);
      if (!args.dx) continue;
      if (args.drop.active())
        ds = kept(uint64_t(*args.drop.seed), args.drop.threshold, uint32_t(column), uint32_t(row), 0)
                 ? ds * args.drop.scale
                 : 0.0f;
      args.dx[row * width + column] = from_float<T>(ds);
    }
  }
}

static bool aligned_rows(const void* data, const row_layout& layout) {
  return aligned(data, layout.inner_stride) && layout.middle_stride % VECTOR == 0 && layout.outer_stride % VECTOR == 0;
}

void rms_norm_residual_forward(const rms_norm_residual_forward_args& args, stream_t stream) {
  if (args.rows == 0) return;
  const bool in_registers = fits_in_registers(args.width) && aligned_rows(args.x, args.x_layout) &&
                            aligned_rows(args.residual, args.residual_layout) && aligned(args.weight, 0) &&
                            aligned(args.y, 0) && aligned(args.summed, 0);
  const row_partition partition("rms_norm_residual", args.rows, args.width, in_registers);
  dispatch_types(args.x_dtype, args.residual_dtype, [&]<class T, class R>() {
    const rms_norm_forward_args<T, R> kernel_args{
        .x = static_cast<const T*>(args.x),
        .x_layout = args.x_layout,
        .residual = static_cast<const R*>(args.residual),
        .residual_layout = args.residual_layout,
        .weight = {args.weight, args.weight_dtype == DType::float32, args.unit_offset},
        .y = static_cast<T*>(args.y),
        .summed = static_cast<R*>(args.summed),
        .rstd = args.rstd,
        .rows = args.rows,
        .width = int(args.width),
        .team = partition.team,
        .eps = args.eps,
        .drop = make_dropout(args.seed ? args.dropout_p : 0.0, args.seed)};
    if (in_registers)
      FASTLM_LAUNCH((rms_norm_residual_forward_kernel<T, R>), unsigned(partition.blocks), partition.threads,
                    partition.shared_bytes(1), stream, kernel_args);
    else
      FASTLM_LAUNCH((rms_norm_residual_forward_generic_kernel<T, R>), unsigned(partition.blocks), partition.threads,
                    partition.shared_bytes(1), stream, kernel_args);
  });
}

int64_t rms_norm_residual_max_partials() { return max_partials(); }

void rms_norm_residual_backward(const rms_norm_residual_backward_args& args, stream_t stream) {
  if (args.rows == 0) return;
  const bool in_registers = fits_in_registers(args.width) && aligned_rows(args.dy, args.dy_layout) &&
                            aligned_rows(args.dsummed, args.dsummed_layout) &&
                            aligned_rows(args.summed, args.summed_layout) && aligned(args.weight, 0) &&
                            aligned(args.dx, 0) && aligned(args.dresidual, 0) && aligned(args.partials, 0);
  const row_partition partition("rms_norm_residual", args.rows, args.width, in_registers);
  dispatch_types(args.x_dtype, args.residual_dtype, [&]<class T, class R>() {
    const rms_norm_backward_args<T, R> kernel_args{
        .dy = static_cast<const T*>(args.dy),
        .dy_layout = args.dy_layout,
        .dsummed = static_cast<const R*>(args.dsummed),
        .dsummed_layout = args.dsummed_layout,
        .summed = static_cast<const R*>(args.summed),
        .summed_layout = args.summed_layout,
        .weight = {args.weight, args.weight_dtype == DType::float32, args.unit_offset},
        .rstd = args.rstd,
        .dx = static_cast<T*>(args.dx),
        .dresidual = static_cast<R*>(args.dresidual),
        .dweight = args.dweight ? args.partials : nullptr,
        .rows = args.rows,
        .width = int(args.width),
        .padded_width = partition.padded_width,
        .team = partition.team,
        .rows_per_team = partition.rows_per_team,
        .drop = make_dropout(args.seed ? args.dropout_p : 0.0, args.seed)};
    const size_t sums =
        partition.threads > partition.team ? size_t(partition.team) * COLUMNS_PER_THREAD * sizeof(float) : 0;
    if (in_registers)
      FASTLM_LAUNCH((rms_norm_residual_backward_kernel<T, R>), unsigned(partition.partials), partition.threads,
                    std::max(partition.shared_bytes(1) + slot_bytes<T, R>(partition.threads), sums), stream,
                    kernel_args);
    else
      FASTLM_LAUNCH((rms_norm_residual_backward_generic_kernel<T, R>), unsigned(partition.partials), partition.threads,
                    partition.shared_bytes(1), stream, kernel_args);
  });
  reduce_partials(args.partials, args.weight_dtype, args.dweight, nullptr, partition, args.width, stream);
}

}  // namespace fastlm::cuda
