"""Per-layer embeddings: the layers' inputs of a token, and a gate's product with one of them."""
