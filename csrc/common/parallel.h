// Loops over threads that follow torch.get_num_threads().
//
// libgomp is the runtime that torch's own wheels load, so a process has one pool of threads.
// Items go to threads as they become free (a shared machine's cores are not equally fast); a
// kernel whose result depended on which thread took an item would be wrong here: write partial
// results per item and add them in the order of the items.
#pragma once

#include <cstdint>
#include <utility>

namespace dashpot {

template <class Body>
void parallel_for(int64_t items, int threads, const Body& body) {
  if (threads <= 1 || items <= 1) {
    for (int64_t item = 0; item < items; ++item) body(item);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t item = 0; item < items; ++item) body(item);
}

}  // namespace dashpot
