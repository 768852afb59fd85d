"""Upcycling: a dense checkpoint becomes a mixture of experts, and back (Komatsuzaki et al. 2023, arXiv:2212.05055)."""
