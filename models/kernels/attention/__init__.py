"""Attention of one token a row to a KV cache."""
