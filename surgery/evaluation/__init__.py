"""Evaluation of checkpoints and adapters: figures, answers, and comparisons of answers.

Not called `evaluate`, because `surgery.evaluate` is the function. It builds on `surgery.training`, whose data, tasks
and models these are, and trains nothing.
"""
