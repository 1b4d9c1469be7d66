"""Linear layers of a few rows, whose weights may be integers, and the norm before them."""
