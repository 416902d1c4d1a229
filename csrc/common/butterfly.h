// Complex transforms of a few points in registers, for vectors of the CPU and scalars of the GPU.
#pragma once

#ifdef __CUDACC__
#define DASHPOT_BUTTERFLY __host__ __device__ __forceinline__
#else
#define DASHPOT_BUTTERFLY inline __attribute__((always_inline))
#endif

namespace dashpot {

// re, im: (radix,) in natural order, in place; V holds numbers of type T.
template <int radix, class T, class V>
struct Butterfly;

template <class T, class V>
struct Butterfly<2, T, V> {
  static DASHPOT_BUTTERFLY void run(V* re, V* im) {
    const V a = re[0], b = im[0];
    re[0] = a + re[1], im[0] = b + im[1];
    re[1] = a - re[1], im[1] = b - im[1];
  }
};

template <class T, class V>
struct Butterfly<3, T, V> {
  static DASHPOT_BUTTERFLY void run(V* re, V* im) {
    constexpr T sine = T(0.86602540378443864676);
    const V sr = re[1] + re[2], si = im[1] + im[2];
    const V dr = sine * (re[1] - re[2]), di = sine * (im[1] - im[2]);
    const V mr = re[0] - T(0.5) * sr, mi = im[0] - T(0.5) * si;
    re[0] += sr, im[0] += si;
    re[1] = mr + di, im[1] = mi - dr;
    re[2] = mr - di, im[2] = mi + dr;
  }
};

template <class T, class V>
struct Butterfly<4, T, V> {
  static DASHPOT_BUTTERFLY void run(V* re, V* im) {
    const V ar = re[0] + re[2], ai = im[0] + im[2], br = re[0] - re[2], bi = im[0] - im[2];
    const V cr = re[1] + re[3], ci = im[1] + im[3], dr = re[1] - re[3], di = im[1] - im[3];
    re[0] = ar + cr, im[0] = ai + ci;
    re[1] = br + di, im[1] = bi - dr;
    re[2] = ar - cr, im[2] = ai - ci;
    re[3] = br - di, im[3] = bi + dr;
  }
};

template <class T, class V>
struct Butterfly<5, T, V> {
  static DASHPOT_BUTTERFLY void run(V* re, V* im) {
    constexpr T c1 = T(0.30901699437494742410), c2 = T(-0.80901699437494742410);
    constexpr T s1 = T(0.95105651629515357212), s2 = T(0.58778525229247312917);
    const V ar = re[1] + re[4], ai = im[1] + im[4], br = re[1] - re[4], bi = im[1] - im[4];
    const V cr = re[2] + re[3], ci = im[2] + im[3], dr = re[2] - re[3], di = im[2] - im[3];
    const V pr = re[0] + c1 * ar + c2 * cr, pi = im[0] + c1 * ai + c2 * ci;
    const V qr = re[0] + c2 * ar + c1 * cr, qi = im[0] + c2 * ai + c1 * ci;
    const V ur = s1 * br + s2 * dr, ui = s1 * bi + s2 * di;
    const V vr = s2 * br - s1 * dr, vi = s2 * bi - s1 * di;
    re[0] += ar + cr, im[0] += ai + ci;
    re[1] = pr + ui, im[1] = pi - ur;
    re[4] = pr - ui, im[4] = pi + ur;
    re[2] = qr + vi, im[2] = qi - vr;
    re[3] = qr - vi, im[3] = qi + vr;
  }
};

template <class T, class V>
struct Butterfly<8, T, V> {
  static DASHPOT_BUTTERFLY void run(V* re, V* im) {
    constexpr T half = T(0.70710678118654752440);
    V er[4] = {re[0], re[2], re[4], re[6]}, ei[4] = {im[0], im[2], im[4], im[6]};
    V fr[4] = {re[1], re[3], re[5], re[7]}, fi[4] = {im[1], im[3], im[5], im[7]};
    Butterfly<4, T, V>::run(er, ei);
    Butterfly<4, T, V>::run(fr, fi);
    const V ar = half * (fr[1] + fi[1]), ai = half * (fi[1] - fr[1]);
    const V br = half * (fi[3] - fr[3]), bi = -half * (fr[3] + fi[3]);
    re[0] = er[0] + fr[0], im[0] = ei[0] + fi[0];
    re[4] = er[0] - fr[0], im[4] = ei[0] - fi[0];
    re[1] = er[1] + ar, im[1] = ei[1] + ai;
    re[5] = er[1] - ar, im[5] = ei[1] - ai;
    re[2] = er[2] + fi[2], im[2] = ei[2] - fr[2];
    re[6] = er[2] - fi[2], im[6] = ei[2] + fr[2];
    re[3] = er[3] + br, im[3] = ei[3] + bi;
    re[7] = er[3] - br, im[7] = ei[3] - bi;
  }
};

}  // namespace dashpot
