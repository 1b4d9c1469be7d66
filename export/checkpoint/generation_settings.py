"""What a checkpoint asks of whoever generates with it, and an artifact does not do by itself."""

from typing import Any

from tokenloop.export.checkpoint.contents import Checkpoint
from tokenloop.export.checkpoint.safetensors_directory import read_json
from tokenloop.models.config_fields import shown

# Keys of generation_config.json with which transformers' `generate` gives another text even where
# it takes the most likely token, and the values besides null that ask for nothing.
DIRECTORY_KEYS: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "num_beams": (1,), "min_length": (0,),
    "min_new_tokens": (0,), "bad_words_ids": ([],), "sequence_bias": ([], {}),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "exponential_decay_length_penalty": (), "guidance_scale": (1,),
    "watermarking_config": (), "stop_strings": ([],), "penalty_alpha": (0,), "dola_layers": (),
    "constraints": ([],), "force_words_ids": ([],), "token_healing": (False,),
}  # fmt: skip
# What a request says, as it says temperature, but which changes what is most likely.
OF_REQUESTS = {"repetition_penalty": 1}
# Those of a GGUF header that llama.cpp's programs begin with. Their penalty is for the last 64
# tokens, and that of a request for all.
GGUF_KEYS: dict[str, tuple[Any, ...]] = {
    "general.sampling.penalty_repeat": (1,), "general.sampling.mirostat": (0,),
    "general.sampling.xtc_probability": (0,),
}  # fmt: skip


def unread_settings(checkpoint: Checkpoint) -> str | None:
    """A line where the checkpoint asks for what no artifact does, or for a repetition penalty,
    which a request must say.

    A request also says temperature, top-k and top-p, of which this is silent.
    """
    if checkpoint.kind == "gguf":
        where, settings, keys = checkpoint.path, checkpoint.metadata, GGUF_KEYS
    else:
        where = checkpoint.path / "generation_config.json"
        settings, keys = read_json(where) if where.is_file() else {}, DIRECTORY_KEYS
    asked = [
        f"{key} = {shown(settings[key])}"
        for key, idle in keys.items()
        if settings.get(key) is not None and settings[key] not in idle
    ]
    found = [f"{', '.join(asked)}, which is not built: texts are without it"] if asked else []
    for key, idle in OF_REQUESTS.items() if checkpoint.kind != "gguf" else ():
        if settings.get(key) not in (None, idle):
            flag = "--" + key.replace("_", "-")
            found.append(
                f"{key} = {shown(settings[key])}, which no artifact does by itself: give {flag} "
                f"{shown(settings[key])}"
            )
    return f"{where} asks for {'; and for '.join(found)}" if found else None
