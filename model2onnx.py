#!/usr/bin/env python3
"""from weights to an ONNX file for one runtime."""

from effnet_quant.cli.model2onnx import main

if __name__ == "__main__":
    main()
