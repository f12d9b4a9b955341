"""Jobs: data, model and trainer joined to one run. Python users get all that main.py and quant_main.py do."""
