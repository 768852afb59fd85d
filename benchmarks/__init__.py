"""Us and our peers on the same files in one run; docs/benchmarks.md says how, and what came out.

What is measured, what it is compared with, and what checks the results are separate processes.

run_all.py            the command; it and what it imports (models, measuring, table, machine, cases) is plain stdlib
launcher.py           starts one measured process and says what it used
make_models.py        the checkpoints and adapters to measure on
plain_extract.py      peers: a script around torch.svd_lowrank,
peft_merge.py         and one around transformers and PEFT
check_extraction.py   not measured: how far each adapter is from the best of its rank,
check_equal.py        whether two checkpoints have the same bits,
undo_sizes.py         and how large an undo record is
cases/                one benchmark each
"""
