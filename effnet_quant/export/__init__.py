"""Leaving PyTorch: a model is traced, passes change the graph, and a writer writes it.

    tracing.py       turns a model into a TracedGraph: ATen operations, each quantized value one ``quantize`` node
    passes/          change the graph, in the order of ``passes_for``
    onnx_writer.py   writes the graph as ONNX nodes, without further decisions

A new file format needs three files: a target in quantization/targets, a writer that takes the graph of ``run_passes``, and a
backend in engines/.
"""
