"""Benchmarks: what the ops cost beside the weight-gradient GEMM and beside other ways to the same norms."""
