"""Attention of a packed chunk of prompts to KV caches."""
