"""Training of SeemoRe: `python -m seemore_fast.training --help`."""
