// The floating-point mode in which kernels compute.
#pragma once

#include <cfenv>

namespace gemma4_moe {

// Rounding to nearest and no flushing of subnormals, whatever the thread was set to.
class StandardArithmetic {
 public:
  StandardArithmetic() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~StandardArithmetic() { std::fesetenv(&saved_); }
  StandardArithmetic(const StandardArithmetic&) = delete;
  StandardArithmetic& operator=(const StandardArithmetic&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace gemma4_moe
