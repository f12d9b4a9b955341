"""Hyperparameters by model, mode, platform and precision."""
