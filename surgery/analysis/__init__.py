"""Looking at weights and updates: spectra, shared subspaces, amplification, and pictures of them."""
