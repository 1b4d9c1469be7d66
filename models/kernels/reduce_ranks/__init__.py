"""The sum of what ranks have parts of, fused with the residual and the norm after it."""
