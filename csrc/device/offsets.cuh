// Index tensors on the device: numbers of either width, and rows of segments as cu_seqlens gives them, with their check.
#pragma once

#include "ptx_sm80.cuh"

namespace gradnorm {

// `numbers` are int64 if `wide`, else int32.
__device__ __forceinline__ int64_t number_at(const void* numbers, bool wide, int64_t index) {
  if (wide) return load_global(static_cast<const int64_t*>(numbers) + index);
  return load_global(static_cast<const int32_t*>(numbers) + index);
}

struct Rows {
  int64_t row, end;
};

// Rows of a segment by cu_seqlens, or `length` rows for each where `offsets` is null.
__device__ __forceinline__ Rows given_rows(const void* offsets, bool wide, int64_t length, int64_t segment) {
  if (offsets == nullptr) return {segment * length, (segment + 1) * length};
  return {number_at(offsets, wide, segment), number_at(offsets, wide, segment + 1)};
}

// Whether cu_seqlens does not ascend from 0 to `tokens` at this segment.
__device__ __forceinline__ bool are_wrong(const Rows& rows, int segment, int segments, int64_t tokens) {
  return rows.row < 0 || rows.end < rows.row || rows.end > tokens || (segment == 0 && rows.row != 0) ||
         (segment == segments - 1 && rows.end != tokens);
}

}  // namespace gradnorm
