"""Compression and acceleration of PyTorch models on one captured graph."""
