"""The ends of a packed chunk of prompts: its tokens' embeddings, and each sequence's last row."""
