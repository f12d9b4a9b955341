"""Checks of engines: agreement with the simulation (verify, layer_comparison), lint, latency, tuning."""
