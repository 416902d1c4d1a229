// How test_emulator.py calls into C++: by name, with integers (pointers from Tensor.data_ptr()).
// Each `.cu` file adds its functions to one table; module.cpp makes the table a Python function.
// Not pybind11, as csrc/ is, because that would take longer to compile than all tests to run.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using Arguments = std::vector<int64_t>;
using Table = std::map<std::string, std::function<void(const Arguments&)>>;

inline Table& table() {
  static Table instance;
  return instance;
}

template <class T>
T from_integer(int64_t value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return static_cast<T>(value);
  }
}

template <class... P, size_t... I>
void call(void (*function)(P...), const Arguments& arguments, std::index_sequence<I...>) {
  if (arguments.size() != sizeof...(P)) throw std::invalid_argument("wrong number of arguments");
  function(from_integer<P>(arguments[I])...);
}

// Adds a function to the table, when the module is loaded.
struct Entry {
  template <class... P>
  Entry(const char* name, void (*function)(P...)) {
    table()[name] = [function](const Arguments& arguments) {
      call(function, arguments, std::index_sequence_for<P...>());
    };
  }
};
