#!/usr/bin/env python3
"""calibrate a network and fine-tune it with fake quantization."""

from effnet_quant.cli.quant_main import main

if __name__ == "__main__":
    main()
