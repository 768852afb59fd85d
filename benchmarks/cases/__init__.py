"""One benchmark each: takes a workshop, returns a result. Plain stdlib, see `run_all.py`."""
