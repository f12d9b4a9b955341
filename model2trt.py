#!/usr/bin/env python3
"""from an ONNX file to a TensorRT plan for this machine's card."""

from effnet_quant.cli.model2trt import main

if __name__ == "__main__":
    main()
