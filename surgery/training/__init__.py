"""Training of what the tools make: one loop on accelerate, transformers, PEFT and datasets, imported when used.

Not called `train`, because `surgery.train` is the function.
"""
