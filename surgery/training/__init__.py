"""Training: what is trained (`methods`), and what it takes (`estimate`). Needs the extra `train`."""
