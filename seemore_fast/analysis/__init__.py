"""Analysis of a network: choice of experts, their features, receptive field, cost."""
