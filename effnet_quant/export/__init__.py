"""Leaving PyTorch: a model is traced, passes change the graph, and a writer writes it.

    tracing.py       from a model to a TracedGraph: ATen operations, and each quantized value as one ``quantize`` node
    passes/          what changes the graph, in the order of ``passes_for``
    onnx_writer.py   from a graph to ONNX nodes; decides nothing

A further format is a row in quantization/targets, a writer of the graph behind ``run_passes``, and a backend in engines/.
"""
