"""Jobs: what joins data, a model and a trainer to one run. All that main.py and quant_main.py do, for Python users."""
