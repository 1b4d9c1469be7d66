"""Rounds of a sequence that drafts its own tokens: which are tried, and which of them hold."""
