// Scratch memory of a call, a share for each of its threads, from torch's allocator: there it is
// counted, and given back when the call ends.
//
//   const Scratch scratch(input, threads, room<float>(n) + room<float>(m));   // with the GIL
//   Share mine = scratch.mine();                                             // in a thread
//   float *a = mine.take<float>(n), *b = mine.take<float>(m);
#pragma once

#include <omp.h>

#include <cstdint>
#include <stdexcept>

#include "common/tensor.h"

namespace dashpot {

// Bytes that `count` elements take, whole cache lines.
template <class T>
int64_t room(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
}

class Share {
 public:
  Share(char* begin, int64_t bytes) : at_(begin), left_(bytes) {}
  template <class T>
  T* take(int64_t count) {
    left_ -= room<T>(count);
    if (left_ < 0) throw std::logic_error("scratch: more taken than was asked for");
    T* const memory = reinterpret_cast<T*>(at_);
    at_ += room<T>(count);
    return memory;
  }

 private:
  char* at_;
  int64_t left_;
};

class Scratch {
 public:
  // bytes: of one thread; common: of all of them together.
  Scratch(const Tensor& like, int threads, int64_t bytes, int64_t common = 0)
      : each_(bytes + 64),  // so that no two threads share a line
        threads_(threads),
        common_(common),
        memory_(like.new_empty({(threads * each_ + common) / 4}, Dtype::kFloat32)) {}

  Share mine() const {
    return {static_cast<char*>(memory_.data) + omp_get_thread_num() * each_, each_};
  }
  Share common() const { return {static_cast<char*>(memory_.data) + threads_ * each_, common_}; }

 private:
  int64_t each_, threads_, common_;
  Tensor memory_;
};

}  // namespace dashpot
