// What is done to a bin of spectral_loss, a vector of them at a time.
#pragma once

#include "common/math.h"
#include "spectral/options.h"
#include "spectral/rows.h"

namespace dashpot::spectral {

// |z| or |z|^2.
template <class T, Isa isa, class V = Vec<T, isa>>
DASHPOT_INLINE V level_of(Complex<V> z, bool power) {
  return power ? z.re * z.re + z.im * z.im : hypot<T, isa>(z.re, z.im);
}

// 1 / |z|, 0 where it would not be finite.
template <class T, Isa isa, class V = Vec<T, isa>>
DASHPOT_INLINE V inverse_or_zero(V modulus) {
  constexpr T least = sizeof(T) == 8 ? T(2.3e-308) : T(1.2e-38);
  return modulus >= V{} + least ? T(1) / modulus : V{};
}

// Returns weight * rho(u - v) and leaves the slopes' spectra in x and y. "complex": x holds X - Y.
// weight, slope: numbers, or a vector of them.
template <class T, Isa isa, class W, class V = Vec<T, isa>>
DASHPOT_INLINE V compare_bins(const SpectralOptions& o, W weight, W slope, Complex<V>& x,
                              Complex<V>& y) {
  V level = level_of<T, isa>(x, o.power());
  if (o.kind == kComplex) {
    const V factor = o.l1 ? slope * inverse_or_zero<T, isa>(level) : V{} + T(2) * slope;
    x.re *= factor, x.im *= factor;
    return weight * (o.l1 ? level : level * level);
  }
  V other = level_of<T, isa>(y, o.power());
  V dx = o.power() ? V{} + T(2) : inverse_or_zero<T, isa>(level);
  V dy = o.power() ? V{} + T(2) : inverse_or_zero<T, isa>(other);
  V gap;
  if (o.log()) {
    level += T(o.eps), other += T(o.eps);
    gap = log<T, isa>(level) - log<T, isa>(other);
    dx /= level, dy /= other;
  } else {
    gap = level - other;
  }
  const V sign = gap > V{} ? V{} + T(1) : gap < V{} ? V{} - T(1) : V{};
  const V factor = slope * (o.l1 ? sign : T(2) * gap);
  dx *= factor, dy *= -factor;
  x.re *= dx, x.im *= dx, y.re *= dy, y.im *= dy;
  return weight * (o.l1 ? sign * gap : gap * gap);
}

// x becomes the slope's spectrum: factor X / |X|, or factor X.
template <class T, Isa isa, class W, class V = Vec<T, isa>>
DASHPOT_INLINE void scale_bins(Complex<V>& x, bool power, W factor) {
  const V by = power ? V{} + factor : factor * inverse_or_zero<T, isa>(level_of<T, isa>(x, false));
  x.re *= by, x.im *= by;
}

}  // namespace dashpot::spectral
