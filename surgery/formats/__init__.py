"""Adapters as other tools write them, and as one neutral form that all of them can be read into and written from.

recipes     tensors that are to be: stored bytes, seen through views, without reading them
exchange    the neutral form: modules with A, B and a scale
experts     stacks of experts, put together and taken apart
peft, kohya, diffusers, mlx   one format each: `read_...` gives the neutral form, `write_...` the files to write
reading     which format a path holds
"""
