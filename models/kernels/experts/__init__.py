"""Routed experts: which of them a token chooses, and what the chosen ones give."""
