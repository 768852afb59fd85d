"""Training of what the tools make: one loop on accelerate, transformers, PEFT and datasets, which are imported here only.

Not called `train`, because `surgery.train` is the function.
"""
