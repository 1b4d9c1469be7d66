"""GPTQ and AWQ weights: integers of few bits in int32 words, with a scale and a zero point for each
group of inputs. Both are transposed, [K, N] for K inputs and N outputs.

GPTQ (AutoGPTQ, GPTQModel): `qweight` [K * bits / 32, N], `qzeros` [G, N * bits / 32], `scales`
[G, N], and `g_idx` [K], the group of each input. The first format stores zero points less one.
AutoGPTQ writes a `bias` [N] beside every weight, which is zero where the model has none.
AWQ (AutoAWQ's GEMM): `qweight` [K, N / 8], `qzeros` [G, N / 8], `scales` [G, N]. The outputs of a
word are interleaved.
"""

import torch
from torch import Tensor

from tokenloop.export.checkpoint.contents import Grid, StoredTensor
from tokenloop.export.checkpoint.quantized.settings import (
    Parts,
    Settings,
    fields,
    gather,
)

SCALES = "F16", "BF16", "F32"
GPTQ_SUFFIXES = {".qweight": "codes", ".qzeros": "zeros", ".scales": "scales", ".g_idx": "g_idx"}
AWQ_SUFFIXES = {".qweight": "codes", ".qzeros": "zeros", ".scales": "scales"}
# The first output of a word lies in its lowest bits, the second 16 bits up, and so on.
AWQ_ORDER = 0, 4, 1, 5, 2, 6, 3, 7
# How the weights were found, who found them and what runs them. The tensors say the rest.
GPTQ_KEYS = {
    *("bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "pack_dtype"),
    *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "mse"),
    *("act_group_aware", "dataset", "tokenizer", "batch_size", "pad_token_id", "model_seqlen"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "max_input_length"),
    *("modules_in_block_to_quantize", "modules_to_not_convert", "cache_block_outputs", "lm_head"),
    *("model_name_or_path", "model_file_base_name", "quantizer", "meta", "backend", "version"),
    *("use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config"),
}
AWQ_KEYS = {
    *("bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "backend"),
    *("modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
    *("exllama_config", "desc_act", "sym", "meta", "quantizer"),
}


def read_gptq(settings: Settings, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Errors: those of quantized.as_floats."""
    settings.check_keys(GPTQ_KEYS)
    bits = settings.only("bits", 2, 4, 8)
    group_size = settings.whole("group_size", -1, 1 << 24)
    settings.only("pack_dtype", "int32", default="int32")
    # transformers prefers the older name.
    name = "checkpoint_format" if settings.entry.get("checkpoint_format") else "format"
    version = settings.only(name, "gptq", "gptq_v2", default="gptq")
    plain, weights = gather(settings, stored, GPTQ_SUFFIXES, ".weight")
    for parts in weights:
        codes = _matrix(parts, "codes")
        words, outputs = codes.shape
        inputs = words * (32 // bits)
        layout = _Gptq(parts, bits, outputs, inputs, group_size, 1 if version == "gptq" else 0)
        if "g_idx" in parts.tensors:
            parts.expect("g_idx", ("I32", "I64"), (inputs,))
        elif settings.entry.get("desc_act"):
            settings.misfit(parts.name, "has no g_idx, and quantization_config.desc_act is true")
        plain[parts.name] = layout.stored()
        name = parts.name.removesuffix("weight") + "bias"
        if name in plain and plain[name].shape == (outputs,) and not plain[name].read().any():
            plain[name] = plain[name]._replace(is_nothing=True)
    return plain


def read_awq(settings: Settings, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Errors: those of quantized.as_floats."""
    settings.check_keys(AWQ_KEYS)
    older = {"bits": "w_bit", "group_size": "q_group_size"}
    bits_key, group_key = (
        name if name in settings.entry else other for name, other in older.items()
    )
    bits = settings.only(bits_key, 4)
    group_size = settings.whole(group_key, -1, 1 << 24)
    name = "version" if settings.entry.get("version") else "format"
    settings.only(name, "gemm", "GEMM", default="gemm")
    plain, weights = gather(settings, stored, AWQ_SUFFIXES, ".weight")
    for parts in weights:
        inputs, words = _matrix(parts, "codes").shape
        outputs = words * (32 // bits)
        plain[parts.name] = _Awq(parts, bits, outputs, inputs, group_size, 0).stored()
    return plain


def _matrix(parts: Parts, part: str) -> StoredTensor:
    tensor = parts.expect(part, ("I32",))
    if len(tensor.shape) != 2:
        parts.settings.misfit(
            f"{part} of {parts.name}", f"has the shape {tensor.shape}; a matrix is right"
        )
    return tensor


class _Gptq:
    """The weight of so many outputs and inputs that `parts` stand for, with `group_size` inputs in
    a group, or all where that is not positive. Zero points are stored less `less`. Errors:
    ExportError for parts of other shapes."""

    def __init__(
        self, parts: Parts, bits: int, outputs: int, inputs: int, group_size: int, less: int
    ):
        self.parts, self.bits, self.shape, self.less = parts, bits, (outputs, inputs), less
        self.group_size = inputs if group_size <= 0 else group_size
        self.groups = -(-inputs // self.group_size)
        parts.expect("scales", SCALES, (self.groups, outputs))
        if outputs % (32 // bits):
            parts.settings.misfit(parts.name, f"has {outputs} outputs, which are not whole words")
        parts.expect("zeros", ("I32",), (self.groups, outputs * bits // 32))

    def stored(self) -> StoredTensor:
        return StoredTensor(self.shape, "F32", self.read, self.grid)

    def codes(self) -> Tensor:
        """int32 [K, N]."""
        return fields(self.parts.read("codes").T, self.bits).T

    def zeros(self) -> Tensor:
        """int32 [G, N]. Errors: ExportError for one that the format has no number for."""
        zeros = self.stored_zeros() + self.less
        if zeros.max() >= 2**self.bits:
            # One runtime takes it for 0, another for 16, and a third changes its neighbour as well.
            self.parts.settings.misfit(
                f"qzeros of {self.parts.name}",
                "has a zero point of 0, which the first format of gptq has no number for; write "
                "the checkpoint with checkpoint_format gptq_v2",
            )
        return zeros

    def stored_zeros(self) -> Tensor:
        return fields(self.parts.read("zeros"), self.bits)

    def scales(self) -> Tensor:
        return self.parts.read("scales").T.contiguous()

    def groups_in_order(self) -> Tensor:
        return torch.arange(self.shape[1]) // self.group_size

    def group_of_input(self) -> Tensor:
        """int64 [K]. Errors: ExportError for a group that is not there."""
        if "g_idx" not in self.parts.tensors:
            return self.groups_in_order()
        groups = self.parts.read("g_idx").long()
        if groups.min() < 0 or groups.max() >= self.groups:
            self.parts.settings.misfit(
                f"g_idx of {self.parts.name}",
                f"has the groups {groups.min()} to {groups.max()}; 0 to {self.groups - 1} are "
                "right",
            )
        return groups

    def read(self) -> Tensor:
        group = self.group_of_input()
        values = self.codes() - self.zeros()[group]
        return values.float().mul_(self.parts.read("scales").float()[group]).T.contiguous()

    def grid(self) -> Grid | None:
        """None where the groups' inputs are not neighbours (act order) or are not equally many."""
        if self.shape[1] % self.group_size:
            return None
        if not torch.equal(self.group_of_input(), self.groups_in_order()):
            return None
        zeros, most = self.zeros(), 2**self.bits - 1
        return Grid(-int(zeros.max()), most - int(zeros.min()), self.group_size, self.scales)


class _Awq(_Gptq):
    def codes(self) -> Tensor:
        return fields(self.parts.read("codes"), self.bits, AWQ_ORDER)

    def stored_zeros(self) -> Tensor:
        return fields(self.parts.read("zeros"), self.bits, AWQ_ORDER)
