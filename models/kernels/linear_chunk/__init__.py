"""Linear layers over a packed chunk of prompts."""
