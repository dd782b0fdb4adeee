"""Sums of inner products, the moments of the tasks taken from them, and the estimates that are published."""
