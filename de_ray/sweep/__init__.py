"""Whole compressions as trials of Ray Tune, compared at equal sparsity."""
