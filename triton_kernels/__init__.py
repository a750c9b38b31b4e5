"""Triton kernels of contrastive losses over all pairs. They know torch and triton, nothing of flashcl."""
