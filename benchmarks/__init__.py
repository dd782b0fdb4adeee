"""Benchmarks: the cost of the operators relative to the weight-gradient GEMM and to other ways to the same norms."""
