"""The benchmarks, installed as `seemore_fast.benchmarks`; the figures in `results` stay in the repository."""
