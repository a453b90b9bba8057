"""Triton kernels, one file per operator; installed as `seemore_fast.kernels`."""
