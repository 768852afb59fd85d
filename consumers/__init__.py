"""`make consumers`: what inference engines do with the adapters and checkpoints that this project writes and lints.

models      tiny real checkpoints of several families, and fine-tunes of them
artefacts   every kind of adapter and merged checkpoint we write, and others that are wrong on purpose
reference   what transformers and PEFT compute from each
run_*       the same, computed by an engine, inside that engine's own virtual environment
verdicts    `surgery lint` on each, and whether engine and lint agree
table       docs/consumers.md

V: size of the vocabulary
"""
