"""TensorRT: plans.py builds and caches plans, backend.py runs them, library.py calls TensorRT."""
