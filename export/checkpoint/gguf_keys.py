"""The keys `<architecture>.<key>` of a GGUF header: each is read, or refused where it may change
what the model computes. Defaults are llama.cpp's.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenloop.export.checkpoint.gguf_metadata import ARCHITECTURE_KINDS, check_value
from tokenloop.export.checkpoint.gguf_reader import GgufTensor
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown

# Keys that change no logits: sizes that tensors tell, who trained what, how embeddings are pooled.
HARMLESS = {
    "altup.lr_multiplier", "pooling_type", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "tensor_data_layout", "vocab_size",
}  # fmt: skip
# The values with which other keys ask for nothing.
IDLE = {
    "altup.correct_scale": (True,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_length_per_layer_input": (0,),
    "expert_count": (0,),
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
YARN = "rope.scaling.yarn_"


class Keys(NamedTuple):
    """The values of one architecture's keys, `<architecture>.<key>`. `asked` are those that were
    read.

    Errors: ExportError for a key that is required and missing, for one that has other values for
    some layers than for others, and for a value that is not of the key's kind (gguf_metadata.py).
    """

    path: Path
    metadata: dict[str, Any]
    architecture: str
    asked: set[str]

    def required(self, key: str) -> Any:
        name = f"{self.architecture}.{key}"
        if name not in self.metadata:
            raise ExportError(f"{self.path} has no key {name}, which the model needs")
        return self.optional(key, None)

    def optional(self, key: str, default: Any) -> Any:
        name = f"{self.architecture}.{key}"
        self.asked.add(key)
        if name not in self.metadata:
            return default
        value = self.metadata[name]
        if isinstance(value, (list, np.ndarray)):
            value = self._of_all_layers(name, value)
        check_value(self.path, name, value, ARCHITECTURE_KINDS[key])
        return value

    def _of_all_layers(self, name: str, values: list | np.ndarray) -> Any:
        """The one value of a list with an entry for each layer."""
        count = self.metadata.get(f"{self.architecture}.block_count")
        values = np.asarray(values).tolist()
        if len(set(values)) != 1 or len(values) != count:
            raise ExportError(
                f"{self.path}: {name} has {len(values)} values, {shown(values)}; one for all "
                f"of {count} layers is supported"
            )
        return values[0]

    def flags(self, key: str) -> list[bool] | None:
        """A flag for each layer, or None where the key has something else or is not there."""
        values = self.metadata.get(f"{self.architecture}.{key}")
        count = self.metadata.get(f"{self.architecture}.block_count")
        is_array = isinstance(values, np.ndarray) and values.dtype == bool
        if not is_array or len(values) != count:
            return None
        self.asked.add(key)
        return values.tolist()

    def by_layer(self, key: str) -> list[Any]:
        """The value of a required key for each layer. Errors: those of `required`, and ExportError
        for a list that has not one value for each layer."""
        name, count = f"{self.architecture}.{key}", self.required("block_count")
        values = self.metadata.get(name)
        if not isinstance(values, (list, np.ndarray)):
            return [self.required(key)] * count
        values = np.asarray(values).tolist()
        if len(values) != count:
            raise ExportError(
                f"{self.path}: {name} has {len(values)} values; one for each of {count} layers is "
                "right"
            )
        self.asked.add(key)
        for value in values:
            check_value(self.path, name, value, ARCHITECTURE_KINDS[key])
        return values

    def check_asked(self) -> None:
        """Errors: ExportError for a key that nobody has asked for, unless it does nothing."""
        for name, value in self.metadata.items():
            key = name.removeprefix(f"{self.architecture}.")
            if key == name or key in self.asked or key in HARMLESS:
                continue
            if isinstance(value, (list, np.ndarray)) or value not in IDLE.get(key, ()):
                raise ExportError(f"{self.path} has the key {name}, which is not supported")

    def head_dim(self, default: int) -> int:
        """The size of a head's queries, keys and values, all of which the rotary embedding rotates.

        Errors: ExportError for a key that asks for another size.
        """
        head_dim = self.optional("attention.key_length", default)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (size := self.optional(key, head_dim)) != head_dim:
                raise ExportError(
                    f"{self.path}: {self.architecture}.{key} is {size}; {head_dim}, the size of a "
                    "key's head, is supported"
                )
        return head_dim

    def rope_scaling(self, factors: GgufTensor | None, head_dim: int) -> dict[str, Any] | None:
        """As in config.json: None, linear, YaRN, or a divisor of each pair's frequency as
        "factors".

        llama.cpp scales linearly where a factor has no type, and 0 is no factor. The tensor
        `factors` (Llama 3.1's) divides frequencies besides. Errors: ExportError for another type,
        and for factors that are not those of a head's pairs.
        """
        name = f"{self.architecture}.rope.scaling.type"
        kind = self.optional("rope.scaling.type", None)
        if kind not in (None, "none", "linear", "yarn"):
            raise ExportError(
                f"{self.path}: {name} is {shown(kind)}; none, linear and yarn are supported"
            )
        # The second name is the older one.
        old = self.optional("rope.scale_linear", None)
        factor = self.optional("rope.scaling.factor", old)
        if kind in ("linear", "yarn") and factor is None:
            self.required("rope.scaling.factor")
        factor = None if kind == "none" else factor
        if kind == "yarn" and factor:
            if factors is not None:
                raise ExportError(
                    f"{self.path}: {name} is 'yarn' beside the tensor {factors.name}; one of them "
                    "is supported"
                )
            return self._yarn(factor)
        if factors is None:
            return {"rope_type": "linear", "factor": factor} if factor else None
        divisors = factors.dequantize() * (factor or 1.0)
        if divisors.shape != (head_dim // 2,) or not (divisors.isfinite() & (divisors > 0)).all():
            raise ExportError(
                f"{self.path}: {factors.name} of the shape {factors.shape} is no list of "
                f"{head_dim // 2} positive numbers, one for each pair of a head"
            )
        return {"rope_type": "factors", "factors": divisors.tolist()}

    def _yarn(self, factor: float) -> dict[str, Any]:
        """YaRN's fields as llama.cpp makes them of the keys: what multiplies cosines is
        0.1 ln(factor) + 1, times attn_factor."""
        for key in ("ext_factor", "attn_factor"):
            if (value := self.optional(YARN + key, 1.0)) != 1:
                raise ExportError(
                    f"{self.path}: {self.architecture}.{YARN}{key} is {value}; 1 is supported"
                )
        own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self.optional(
                "rope.scaling.original_context_length", self.required("context_length")
            ),
            "attention_factor": own * self.optional("rope.scaling.attn_factor", 1.0),
            "beta_fast": self.optional(YARN + "beta_fast", 32.0),
            "beta_slow": self.optional(YARN + "beta_slow", 1.0),
        }
