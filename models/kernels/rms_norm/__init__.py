"""RMSNorm of a residual, to which a branch may be added first."""
