"""Xet's formats: files as runs of chunks that lie in xorbs, as stock Hugging Face clients upload and download them."""
