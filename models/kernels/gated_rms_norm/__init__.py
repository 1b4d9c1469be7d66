"""The norm and gate after the gated delta rule's step."""
