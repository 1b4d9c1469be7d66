"""A depthwise causal convolution over packed sequences, and its step."""

from tokenloop.models.kernels import by_device
from tokenloop.models.kernels.causal_conv1d import reference

causal_conv1d = by_device(reference.causal_conv1d)
causal_conv1d_update = by_device(reference.causal_conv1d_update)
