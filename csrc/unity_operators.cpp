// The operators with an autograd Function, compiled as one file: torch's headers, parsed for each
// .cpp of their own, took longer than all the code behind them.
#include "elbo.cpp"
#include "kl_divergence.cpp"
#include "log_likelihood.cpp"
#include "rowwise.cpp"
#include "rsample.cpp"
