// What the kernels' interface needs to know of the formulas: their number's limits.
#pragma once

namespace fastvae {

constexpr int max_inputs = 5;
constexpr int max_options = 2;

}  // namespace fastvae
