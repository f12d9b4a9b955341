#!/usr/bin/env python3
"""run main.py or quant_main.py with a recipe."""

from effnet_quant.cli.launch import main

if __name__ == "__main__":
    main()
