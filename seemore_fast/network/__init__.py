"""The drop-in network: its model, blocks, presets, checkpoints, engines and export."""
