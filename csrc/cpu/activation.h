// The FFN's activation functions and their derivatives.
#pragma once

#include "cpu/simd.h"

namespace ticketops::TICKETOPS_ISA {

struct Value {
  Float output, derivative;
};

// x cdf(x), where cdf is the standard normal distribution function: cdf(-a) = e^(-a^2/2) t P(t) with t = 1 / (1 + 0.35
// a) for a >= 0. P is a polynomial fit; the relative error is 3e-8 on [0, 13.3], beyond which the exponential is 0.
// Unlike 1 + erf, this stays accurate for negative x, and the derivative reuses the exponential.
struct Gelu {
  TICKETOPS_INLINE static Value at(Float x) {
    const Float a = abs(x), t = 1.0f / (a * 0.35f + 1.0f), bell = exp(a * a * -0.5f);
    const Float square = t * t, fourth = square * square;
    const Float p01 = t * 0.1398575703787482f + 0.13962165987997072f;
    const Float p23 = t * 0.10539242785137692f + 0.11986302264546599f;
    const Float p45 = t * 0.15879764068045538f - 0.022844131651598456f;
    const Float p67 = t * 0.1438189080413243f - 0.25539199432944404f;
    const Float upper = (fourth * -0.02911511934155336f + p67 * square) + p45;
    const Float p = upper * fourth + (p23 * square + p01);
    const Float tail = p * t * bell;
    const Float cdf = x < 0.0f ? tail : 1.0f - tail;
    return {x * cdf, cdf + x * bell * 0.3989422804014327f};
  }
};

// x (1 + tanh u) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  TICKETOPS_INLINE static Value at(Float x) {
    constexpr float slope = 1.5957691216057308f;
    const Float square = x * x, power = x * (square * 0.044715f + 1.0f) * -slope, decay = exp(power);
    // `exp` saturates at 88. Beyond it the gate is set to 0, since the derivative multiplies it by x^3.
    const Float gate = power < 88.0f ? 1.0f / (decay + 1.0f) : power == power ? Float{} : power;
    return {x * gate, gate + x * gate * (gate * decay) * (square * (3 * 0.044715f) + 1.0f) * slope};
  }
};

struct Relu {
  TICKETOPS_INLINE static Value at(Float x) {
    const Float zero{}, one = splat(1.0f);
    return {x > 0.0f ? x : x == x ? zero : x, x > 0.0f ? one : zero};
  }
};

// x / (1 + e^-x), also called swish.
struct Silu {
  TICKETOPS_INLINE static Value at(Float x) {
    const Float decay = exp(-x);
    // As above: `exp` saturates, and x multiplies the gate.
    const Float gate = x > -88.0f ? 1.0f / (decay + 1.0f) : x == x ? Float{} : x;
    return {x * gate, gate + x * gate * (gate * decay)};
  }
};

// Calls body with the activation's type.
template <typename F>
TICKETOPS_INLINE void with_activation(Activation activation, F body) {
  if (activation == Activation::gelu) body(Gelu{});
  if (activation == Activation::gelu_tanh) body(GeluTanh{});
  if (activation == Activation::relu) body(Relu{});
  if (activation == Activation::silu) body(Silu{});
}

}  // namespace ticketops::TICKETOPS_ISA
