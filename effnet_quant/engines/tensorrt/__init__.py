"""TensorRT plans: how they are built, kept and described. Running one is the backend's."""
