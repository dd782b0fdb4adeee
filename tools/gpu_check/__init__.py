"""`make gpu-check`: build, tests, benchmarks and sanitizer on a machine with a GPU, in stages with time limits."""
