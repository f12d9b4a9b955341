"""Post-training quantization (PTQ): one step a file. A step changes a quantized model with a few batches, without labels."""
