"""The gated delta rule (Gated Delta Networks, arXiv:2412.06464): over a prompt, in plain torch on
any device, over a packed chunk of prompts, and its step."""

from tokenloop.models.kernels import by_device
from tokenloop.models.kernels.gated_delta_rule import reference

gated_delta_rule = reference.gated_delta_rule
gated_delta_rule_update = by_device(reference.gated_delta_rule_update)
gated_delta_rule_chunk = by_device(reference.gated_delta_rule_chunk)
