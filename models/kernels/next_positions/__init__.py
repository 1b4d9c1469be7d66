"""The positions of a step, taken on the device, so that a captured graph can do it."""
