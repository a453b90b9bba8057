"""Shipped weights: NAME.safetensors and its model card NAME.md; licensed CC BY-SA 4.0."""
