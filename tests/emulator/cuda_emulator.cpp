// The engine of the emulator: fibers, the scheduler of one block, barriers and warp rendezvous.
//
// One host thread does everything. A fiber runs until it has to wait; it then notes what it waits
// for and switches back to the scheduler, which resumes a fiber drawn at random from those that are
// ready. A rendezvous is completed by whichever thread arrives last: it computes the results of all
// the others, so that nobody has to read a buffer that a faster lane may already have reused. When
// no thread is ready and some have not exited, they wait for each other: a deadlock.
#include "cuda_emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// The static shared variables of this module: see cuda_emulator.ld. Weak: without the linker script
// there is none to fill.
extern "C" {
extern char dashpot_static_shared_begin[] __attribute__((weak, visibility("hidden")));
extern char dashpot_static_shared_end[] __attribute__((weak, visibility("hidden")));
}

namespace dashpot::emulator {
namespace {

// ---- Fibers ----------------------------------------------------------------------------------

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 128 * 1024;  // reserved; only touched pages take memory

struct Stack {
  char* low = nullptr;
  Stack() {
    void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPage, PROT_NONE);  // an overflow stops here
    low = static_cast<char*>(memory) + kPage;
  }
};

// A place to switch from and to. swapcontext would do on every machine, but it makes a system call
// each time; the switch by hand is ten times as fast, and a test has millions of them.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* stack_low = nullptr;  // what AddressSanitizer wants to know
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

#if defined(__x86_64__)
// Saves what a called function must preserve, and returns on the other stack.
__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret)");
}
#endif

void prepare(Context& to, const Stack& stack, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  // The last thread on this stack may have been abandoned, its guard zones still in place.
  __asan_unpoison_memory_region(stack.low, kStackBytes);
#endif
  to.stack_low = stack.low;
  to.stack_bytes = kStackBytes;
  to.fake_stack = nullptr;
#if defined(__x86_64__)
  // Six registers, the address that switch_stack returns to, and a zero where entry's own return
  // address would be, which leaves the stack aligned as after a call and ends a backtrace.
  void** top = reinterpret_cast<void**>(stack.low + kStackBytes) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  to.stack_pointer = top;
#else
  getcontext(&to.context);
  to.context.uc_stack.ss_sp = stack.low;
  to.context.uc_stack.ss_size = kStackBytes;
  to.context.uc_link = nullptr;
  makecontext(&to.context, entry, 0);
#endif
}

// To be called first thing on a stack, and after each return to it.
void arrive(Context& here, Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(here.fake_stack, &from.stack_low, &from.stack_bytes);
#else
  (void)here, (void)from;
#endif
}

void switch_context(Context& from, Context& to, bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack_low,
                                 to.stack_bytes);
#else
  (void)for_good;
#endif
#if defined(__x86_64__)
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrive(from, to);
}

// ---- One launch ------------------------------------------------------------------------------

enum class Wait { kNothing, kBarrier, kWarp, kExited };

struct Thread {
  Context context;
  uint3 index;
  Wait wait;
  Site site;
  WarpOp op;
  unsigned mask;
  int source;      // the lane to read from
  uint64_t value;  // brought to a rendezvous, and the result after it
};

struct Warp {
  unsigned exited;   // lanes that the block does not have count as exited
  unsigned waiting;  // at a rendezvous
};

const char* name_of(WarpOp op) {
  static const char* const kNames[] = {"__syncwarp",       "__shfl_sync",     "__shfl_up_sync",
                                       "__shfl_down_sync", "__shfl_xor_sync", "a warp vote"};
  return kNames[static_cast<int>(op)];
}

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string text(const Site& site) {
  const char* slash = strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string text(unsigned mask) {
  char hex[16];
  snprintf(hex, sizeof(hex), "0x%08x", mask);
  return hex;
}

uint64_t initial_seed() {
  const char* seed = getenv("DASHPOT_EMULATOR_SEED");
  return seed ? strtoull(seed, nullptr, 0) : 0;
}

class Engine {
 public:
  void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);
  Count barrier(bool predicate, Site site);
  uint64_t exchange(unsigned mask, WarpOp op, uint64_t value, int source, Site site);
  void yield();
  [[noreturn]] void fail(const std::string& message) const;
  int lane() const { return current_ % warpSize; }

  std::mutex mutex;  // one launch at a time: the state below and static shared memory are global
  uint64_t random_state = initial_seed();
  std::unique_ptr<char, void (*)(char*)> shared{nullptr, [](char*) {}};

 private:
  static void thread_main();
  void run_block();
  void wake(int thread);
  void exit_thread();
  void complete_barrier();
  void complete_exchange(int warp, unsigned mask);
  [[noreturn]] void fail_block(const std::string& message) const;
  std::string deadlock() const;
  unsigned random(unsigned bound);

  void (*body_)(void*);
  void* argument_;
  uint64_t launch_seed_;
  std::vector<Stack> stacks_;  // pooled: never given back
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;
  Context scheduler_;
  int current_ = 0;
  int alive_, at_barrier_, barrier_nonzero_;
  Count barrier_result_;
  std::exception_ptr error_;
};

Engine& engine() {
  static Engine instance;
  return instance;
}

// SplitMix64, scaled to [0, bound).
unsigned Engine::random(unsigned bound) {
  uint64_t z = random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<unsigned>(((z ^ (z >> 31)) >> 32) * bound >> 32);
}

void Engine::fail_block(const std::string& message) const {
  throw std::runtime_error("CUDA emulator: block " + text(blockIdx) + ", " + message + " [seed " +
                           std::to_string(launch_seed_) + "]");
}

void Engine::fail(const std::string& message) const {
  fail_block("thread " + text(threadIdx) + ": " + message);
}

// ---- Threads ---------------------------------------------------------------------------------

void Engine::thread_main() {
  Engine& self = engine();
  Thread& thread = self.threads_[self.current_];
  arrive(thread.context, self.scheduler_);
  try {
    self.body_(self.argument_);
    self.exit_thread();
  } catch (...) {
    self.error_ = std::current_exception();
  }
  switch_context(thread.context, self.scheduler_, /*for_good=*/true);
}

void Engine::wake(int thread) {
  threads_[thread].wait = Wait::kNothing;
  ready_.push_back(thread);
}

void Engine::yield() {
  ready_.push_back(current_);
  switch_context(threads_[current_].context, scheduler_);
}

// Whoever waited only for this thread goes on.
void Engine::exit_thread() {
  threads_[current_].wait = Wait::kExited;
  --alive_;
  if (alive_ && at_barrier_ == alive_) complete_barrier();
  int warp = current_ / warpSize;
  warps_[warp].exited |= 1u << lane();
  for (int other = 0; other < warpSize; ++other) {
    if (warps_[warp].waiting >> other & 1) {
      complete_exchange(warp, threads_[warp * warpSize + other].mask);
    }
  }
}

// ---- Barriers --------------------------------------------------------------------------------

Count Engine::barrier(bool predicate, Site site) {
  Thread& thread = threads_[current_];
  barrier_nonzero_ += predicate;
  // Noted before the last thread compares the places, and it may be the last.
  thread.wait = Wait::kBarrier;
  thread.site = site;
  if (++at_barrier_ == alive_) complete_barrier();
  switch_context(thread.context, scheduler_);
  return barrier_result_;  // stays until all have passed, as all must arrive at the next one
}

void Engine::complete_barrier() {
  const Site* first = nullptr;
  for (const Thread& thread : threads_) {
    if (thread.wait != Wait::kBarrier) continue;
    if (!first) first = &thread.site;
    if (thread.site.line != first->line || strcmp(thread.site.file, first->file) != 0) {
      fail("threads of one block wait at different __syncthreads: " + text(*first) + " and " +
           text(thread.site));
    }
  }
  barrier_result_ = {std::exchange(barrier_nonzero_, 0), std::exchange(at_barrier_, 0)};
  for (int i = 0; i < static_cast<int>(threads_.size()); ++i) {
    if (threads_[i].wait == Wait::kBarrier) wake(i);
  }
}

// ---- Warps -----------------------------------------------------------------------------------

uint64_t Engine::exchange(unsigned mask, WarpOp op, uint64_t value, int source, Site site) {
  Thread& thread = threads_[current_];
  thread.site = site;
  if (!(mask >> lane() & 1)) {
    fail(std::string(name_of(op)) + " at " + text(site) + ": mask " + text(mask) +
         " leaves out the calling lane " + std::to_string(lane()));
  }
  thread.wait = Wait::kWarp;
  thread.op = op;
  thread.mask = mask;
  thread.source = source;
  thread.value = value;
  int warp = current_ / warpSize;
  warps_[warp].waiting |= 1u << lane();
  complete_exchange(warp, mask);
  switch_context(thread.context, scheduler_);
  return thread.value;
}

// Lets the lanes of the mask go on if all of them that have not exited wait with this mask.
void Engine::complete_exchange(int warp, unsigned mask) {
  Thread* lanes = &threads_[warp * warpSize];
  unsigned present = mask & ~warps_[warp].exited;
  if (!present || (warps_[warp].waiting & present) != present) return;
  unsigned votes = 0;
  uint64_t values[warpSize];
  const Thread& first = lanes[__builtin_ctz(present)];
  for (unsigned rest = present; rest; rest &= rest - 1) {
    int i = __builtin_ctz(rest);
    if (lanes[i].mask != mask) return;  // still busy elsewhere, with other lanes
    if (lanes[i].op != first.op) {
      fail("lanes of one mask wait at different intrinsics: " + std::string(name_of(first.op)) +
           " at " + text(first.site) + " and " + name_of(lanes[i].op) + " at " +
           text(lanes[i].site));
    }
    values[i] = lanes[i].value;
    votes |= (lanes[i].value != 0u) << i;
  }
  for (unsigned rest = present; rest; rest &= rest - 1) {
    int i = __builtin_ctz(rest), source = lanes[i].source;
    if (!(present >> source & 1)) {
      fail(std::string(name_of(first.op)) + " at " + text(lanes[i].site) + ": lane " +
           std::to_string(i) + " reads lane " + std::to_string(source) + ", which " +
           (mask >> source & 1 ? "has exited or is not in the block"
                               : "is not in the mask " + text(mask)));
    }
    lanes[i].value = first.op == WarpOp::kVote ? votes : values[source];
    wake(warp * warpSize + i);
  }
  warps_[warp].waiting &= ~present;
}

// ---- Blocks and grids --------------------------------------------------------------------------

// Who waits where: one clause for each run of neighbours that wait for the same thing.
std::string Engine::deadlock() const {
  std::string report;
  int count = static_cast<int>(threads_.size());
  auto clause = [&](const Thread& thread) -> std::string {
    if (thread.wait == Wait::kExited) return " exited";
    if (thread.wait == Wait::kBarrier) return " at __syncthreads, " + text(thread.site);
    return std::string(" at ") + name_of(thread.op) + " with mask " + text(thread.mask) + ", " +
           text(thread.site);
  };
  for (int begin = 0, end; begin < count; begin = end) {
    std::string common = clause(threads_[begin]);
    for (end = begin + 1; end < count && clause(threads_[end]) == common; ++end) {
    }
    report += (begin ? "; " : " ") + std::to_string(begin);
    if (end - begin > 1) report += "-" + std::to_string(end - 1);
    report += common;
  }
  return "deadlock: no thread of the block can go on. Threads" + report;
}

void Engine::run_block() {
  int count = static_cast<int>(threads_.size());
  ready_.clear();
  for (int i = 0; i < count; ++i) {
    prepare(threads_[i].context, stacks_[i], thread_main);
    wake(i);
  }
  for (size_t w = 0; w < warps_.size(); ++w) {
    int lanes = std::min(count - static_cast<int>(w) * warpSize, warpSize);
    warps_[w] = {lanes == warpSize ? 0 : ~0u << lanes, 0};
  }
  alive_ = count;
  at_barrier_ = barrier_nonzero_ = 0;
  while (!ready_.empty()) {
    std::swap(ready_[random(static_cast<unsigned>(ready_.size()))], ready_.back());
    current_ = ready_.back();
    ready_.pop_back();
    threadIdx = threads_[current_].index;
    switch_context(scheduler_, threads_[current_].context);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }
  if (alive_) fail_block(deadlock());
}

// memset is not used: AddressSanitizer would object to the guard zones between the variables.
__attribute__((no_sanitize_address)) void fill_static_shared() {
  if (!dashpot_static_shared_begin) return;
  auto* word = reinterpret_cast<volatile uint64_t*>(dashpot_static_shared_begin);
  auto* end = reinterpret_cast<volatile uint64_t*>(dashpot_static_shared_end);
  while (word != end) *word++ = ~uint64_t{0};
}

void Engine::run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                      void* argument) {
  std::lock_guard<std::mutex> lock(mutex);
  launch_seed_ = random_state;
  uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024 ||
      block.z > 64 || shared_bytes > 227 * 1024) {
    throw std::runtime_error("CUDA emulator: no device takes this launch: grid " +
                             text({grid.x, grid.y, grid.z}) + ", block " +
                             text({block.x, block.y, block.z}) + ", " +
                             std::to_string(shared_bytes) + " bytes of shared memory");
  }
  uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (blocks == 0) return;

  gridDim = grid;
  blockDim = block;
  body_ = body;
  argument_ = argument;
  while (stacks_.size() < threads) stacks_.emplace_back();
  threads_.resize(threads);
  warps_.resize((threads + warpSize - 1) / warpSize);
  for (unsigned i = 0; i < threads; ++i) {
    threads_[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  // Of exactly the size asked for, so that AddressSanitizer sees the first byte past the end.
  constexpr std::align_val_t kAlignment{16};
  shared = {static_cast<char*>(::operator new(shared_bytes, kAlignment)),
            [](char* memory) { ::operator delete(memory, kAlignment); }};

  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  for (uint64_t left = blocks; left > 0; --left) {
    std::swap(order[random(static_cast<unsigned>(left))], order[left - 1]);
    uint64_t b = order[left - 1];
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    fill_static_shared();
    memset(shared.get(), 0xFF, shared_bytes);
    run_block();
  }
  shared.reset();
}

}  // namespace

void set_seed(uint64_t seed) { engine().random_state = seed; }
void fail(const char* message) { engine().fail(message); }
void* dynamic_shared() { return engine().shared.get(); }
int lane() { return engine().lane(); }
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument) {
  engine().run_grid(grid, block, shared_bytes, body, argument);
}
Count barrier(bool predicate, Site site) { return engine().barrier(predicate, site); }
uint64_t exchange(unsigned mask, WarpOp op, uint64_t value, int source, Site site) {
  return engine().exchange(mask, op, value, source, site);
}
void yield() { engine().yield(); }

}  // namespace dashpot::emulator

// For ctypes: see set_seed() in build.py.
extern "C" __attribute__((visibility("default"))) void dashpot_emulator_set_seed(uint64_t seed) {
  dashpot::emulator::set_seed(seed);
}
