"""A product with the sigmoid of gates."""
