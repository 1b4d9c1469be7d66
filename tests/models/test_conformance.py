"""What every architecture promises, one sentence for each promise: eager networks against
transformers, on random checkpoints of a few thousand weights.

The rows of architectures.py say what is tested. What only one architecture promises is tested in
a file of its own, and what torch.export takes in test_exported_methods.py.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.models.architectures import ARCHITECTURES, Architecture
from tests.models.eager import (
    Batch,
    assert_near,
    even_ends,
    feed,
    generate,
    prefill,
    prompt,
)
from tests.models.tiny_models import (
    CASES,
    ROW_OF,
    TYPICAL,
    keys,
    logits_of_one_pass,
    make_reference,
    model_type_of,
    network_of,
    ours,
    randomize,
    reference,
    states,
)
from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.export.errors import ExportError
from tokenloop.models.dense import UNROTATED

pytestmark = pytest.mark.usefixtures("one_thread")

# Without the rows whose network is another row's.
OWN = [case for case in CASES if not ROW_OF[case].kin]
TYPICAL_OWN = [case for case in TYPICAL if case in OWN]

every_case = pytest.mark.parametrize("case", CASES)
own_cases = pytest.mark.parametrize("case", OWN)
typical_cases = pytest.mark.parametrize("case", TYPICAL)
typical_own_cases = pytest.mark.parametrize("case", TYPICAL_OWN)
every_row = pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)


def every_row_and(names: str, values: Callable[[Architecture], Iterable[tuple]]):
    """Parametrize by every row and what `values` gives of it, each of them one for each name."""
    parameters = [(row, *each) for row in ARCHITECTURES for each in values(row)]
    ids = ["-".join([row.name, *map(str, each)]) for row, *each in parameters]
    return pytest.mark.parametrize(f"row, {names}", parameters, ids=ids)


# Logits


@every_case
def test_a_random_checkpoint_can_tell_models_apart(case):
    """The other tests would pass on logits that do not vary; these do, also with the position."""
    tokens, logits = logits_of_one_pass(case)
    assert (logits.amax(-1) - logits.amin(-1)).min() > 3.0
    assert logits.argmax(-1).unique().numel() > 8
    moved = reference(case)(torch.cat([tokens[:, :20].flip(1), tokens[:, 20:26]], 1)).logits[0]
    assert (moved[25] - logits[25]).abs().max() > 0.5


@pytest.mark.parametrize(
    ("case", "length"), [(case, length) for case in CASES for length in ROW_OF[case].prompts]
)
def test_greedy_ids_and_logits_are_those_of_transformers(case, length):
    tokens = prompt(length)
    ids, logits = generate(ours(case), tokens, 20)
    # One causal pass over what was chosen: each id must be the best after those before it.
    whole = torch.cat([tokens, torch.tensor([ids])], 1)
    expected = reference(case)(whole).logits[0, length - 1 : -1]
    assert ids == expected.argmax(-1).tolist()
    assert_near(logits, expected)


@typical_own_cases
def test_the_pooled_output_is_the_last_hidden_state_with_length_1(case):
    tokens, model = prompt(11), ours(case)
    first = min(6, model.max_chunk)
    prefill(model, tokens, even_ends(11 - first, model.max_chunk))
    with torch.no_grad():
        pooled = model.pool(tokens[:, -first:], torch.arange(11 - first, 11))
        last = reference(case).model(tokens).last_hidden_state[:, -1]
    assert_near(pooled, torch.nn.functional.normalize(last, dim=-1))


@typical_own_cases
def test_greedy_ids_are_those_of_transformers_own_generation(case):
    tokens, model = prompt(11), reference(case)
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(tokens)
    expected = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=40)
    assert generate(ours(case), tokens, 40)[0] == expected[0, 11:].tolist()


@own_cases
def test_chunks_and_steps_that_fill_the_cache_give_the_logits_of_one_pass(case):
    model, (tokens, expected) = ours(case), logits_of_one_pass(case)
    prefilled = model.max_seq_len - 50
    logits = prefill(model, tokens, even_ends(prefilled, model.max_chunk))[-1:]
    assert_near(torch.cat(logits + feed(model, tokens, prefilled)), expected[prefilled - 1 :])


@own_cases
def test_chunks_that_fill_the_cache_give_the_logits_of_one_pass(case):
    model, (tokens, expected) = ours(case), logits_of_one_pass(case)
    ends = even_ends(model.max_seq_len, model.max_chunk)
    assert_near(torch.cat(prefill(model, tokens, ends)), expected[[end - 1 for end in ends]])


@every_case
def test_chunks_of_odd_lengths_give_the_logits_of_one_pass(case):
    model, (tokens, expected) = ours(case), logits_of_one_pass(case)
    ends = odd_ends(case, model)
    assert_near(torch.cat(prefill(model, tokens, ends)), expected[[end - 1 for end in ends]])


def odd_ends(case: str, model: torch.nn.Module) -> list[int]:
    """Where the row's chunks end, which are as long as the model takes."""
    return list(accumulate(min(length, model.max_chunk) for length in ROW_OF[case].chunks))


@own_cases
def test_chunks_of_one_token_give_the_logits_of_one_pass(case):
    tokens, expected = logits_of_one_pass(case)
    assert_near(torch.cat(prefill(ours(case), tokens, list(range(1, 31)))), expected[:30])


@pytest.mark.parametrize(
    "case",
    [*TYPICAL_OWN, "gemma3_text, linear rope", "gemma3_text, a window beyond the cache"],
)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_chunks_of_any_lengths_give_the_logits_of_one_pass(case, data):
    model, (tokens, expected) = ours(case), logits_of_one_pass(case)
    lengths = st.lists(st.integers(1, model.max_chunk), min_size=1, max_size=14)
    ends = list(accumulate(data.draw(lengths)))
    ends = [end for end in ends if end <= model.max_seq_len]
    assert_near(torch.cat(prefill(model, tokens, ends)), expected[[end - 1 for end in ends]])


@own_cases
def test_a_longer_cache_changes_no_logits(case):
    tokens = prompt(6)
    _, short = generate(ours(case, max_seq_len=20), tokens, 15)
    _, long = generate(ours(case, max_seq_len=300), tokens, 15)
    assert_near(short, long)


@own_cases
def test_a_token_may_come_as_its_embedding(case):
    whole, parts = ours(case, batch=3), ours(case, batch=3)
    for step in range(9):
        token, position = prompt(3, seed=step).T, torch.tensor([step, 3 + step, 20 - step])
        hidden = parts.embed(token)
        assert hidden.shape == (3, 1, parts.model.embedded_size)
        assert torch.equal(parts.decode_embedded(hidden, position), whole.decode(token, position))


@typical_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_those_of_transformers(case, dtype):
    tokens = prompt(20)
    embed, scale = reference(case, dtype).get_input_embeddings(), ROW_OF[case].embed_scale
    expected = embed(tokens) if scale == 1.0 else embed(tokens) * scale
    # Behind them lie the layers' own, where there are any.
    assert torch.equal(ours(case, dtype=dtype).embed(tokens)[..., : expected.shape[-1]], expected)


@typical_cases
def test_bfloat16_is_as_near_to_float32_as_transformers_is(case):
    tokens, exact = logits_of_one_pass(case)
    tokens, exact = tokens[:, :60], exact[:60]
    theirs = reference(case, torch.bfloat16)(tokens).logits[0].float()
    model = ours(case, dtype=torch.bfloat16)
    ends = even_ends(30, 5)
    logits = torch.cat(prefill(model, tokens, ends) + feed(model, tokens, 30))
    assert logits.dtype == torch.float32
    compared = [end - 1 for end in ends] + list(range(30, 60))
    error = (logits - exact[compared]).square().mean()
    assert error < 1.3 * (theirs - exact)[compared].square().mean()


# Positions


@every_case
def test_angles_are_those_of_transformers_far_past_any_prompt(case):
    positions, hf = torch.arange(0, 40_000, 7), reference(case)
    rotary = hf.model.rotary_emb
    if rotary is None:
        assert not any(sin.any() for _, sin in ours(case).model.rotations(positions).values())
        return
    several = "layer_type" in inspect.signature(rotary.forward).parameters
    for layer_type, angles in ours(case).model.rotations(positions).items():
        if layer_type == UNROTATED:
            assert (angles[0] == 1).all() and (angles[1] == 0).all()
            continue
        if several and layer_type not in hf.config.layer_types:
            continue
        expected = rotary(torch.empty(0), positions[None], *[layer_type] * several)
        for actual, theirs in zip(angles, expected, strict=True):
            if 2 * theirs.shape[-1] == actual.shape[-1]:
                # gpt-oss's are those of the pairs.
                theirs = torch.cat([theirs, theirs], -1)
            torch.testing.assert_close(actual[:, 0], theirs[0], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("case", [row.scaled[0] for row in ARCHITECTURES if row.scaled])
def test_a_scaled_rotary_embedding_holds_past_8192_positions(case):
    row, length = ROW_OF[case], 8300
    tokens = prompt(length)
    changes = row.shallow | {"max_position_embeddings": 16_384}
    hf, unscaled = (
        make_reference(case, attention="sdpa", **changes | more) for more in ({}, row.scaled[1])
    )
    # Most in chunks, the last in steps.
    ends = [*even_ends(8192, 512), 8193, 8290]
    compared = torch.tensor([end - 1 for end in ends] + list(range(8290, length)))
    expected, other = (model(tokens, logits_to_keep=compared).logits[0] for model in (hf, unscaled))
    model = network_of(row, hf, length)
    assert_near(torch.cat(prefill(model, tokens, ends) + feed(model, tokens, 8290)), expected)
    assert (other - expected)[-12:].abs().amax(1).min() > 0.01 * expected.abs().max()


# State


@typical_own_cases
def test_a_step_at_position_0_begins_anew_as_a_prefill_does(case):
    model = ours(case)
    (expected,) = prefill(model, prompt(1), [1])
    prefill(model, prompt(20), even_ends(20, model.max_chunk))
    assert_near(model.decode(prompt(1), torch.tensor([0])), expected)


@own_cases
def test_another_prompt_gives_exactly_what_a_fresh_model_gives(case):
    used = ours(case)
    generate(used, prompt(45, seed=1), 10)
    for length in (33, 1, 5):
        tokens = prompt(length, seed=2)
        ids, logits = generate(used, tokens, 7)
        fresh_ids, fresh_logits = generate(ours(case), tokens, 7)
        assert ids == fresh_ids
        assert torch.equal(logits, fresh_logits)


@every_case
def test_rows_of_ragged_prompts_are_transformers_texts_and_those_of_models_of_one_row(case):
    batch, lengths = Batch(ours(case, batch=3), reference(case)), ROW_OF[case].rows
    for row, length in enumerate(lengths):
        batch.begin(row, prompt(length))
    batch.step(8)
    for row, length in enumerate(lengths):
        batch.check(row)
        ids, logits = generate(ours(case), prompt(length), 9)
        assert batch.texts[row][length:] == ids
        assert_near(torch.cat(batch.logits[row]), logits)


@own_cases
def test_rows_that_join_and_are_used_again_are_transformers_texts(case):
    batch = Batch(ours(case, batch=3), reference(case))
    batch.begin(1, prompt(12))
    batch.step(5)
    batch.begin(2, prompt(max(ROW_OF[case].rows)))
    batch.step(7)
    batch.check(1)
    # Shorter than what was there, and longer.
    batch.begin(1, prompt(2))
    batch.begin(0, prompt(17))
    batch.step(11)
    batch.check(0)
    batch.begin(0, prompt(33))
    batch.step(10)
    for row in range(3):
        batch.check(row)


@own_cases
def test_a_prefill_of_a_row_leaves_the_states_of_the_others_as_they_were(case):
    batch = Batch(ours(case, batch=3), reference(case))
    for row, length in enumerate((20, 5, 11)):
        batch.begin(row, prompt(length))
    batch.step(3)
    before = copy.deepcopy(states(batch.model))
    batch.begin(1, prompt(31))
    for name, state in states(batch.model).items():
        assert torch.equal(state[[0, 2]], before[name][[0, 2]]), name
        assert not torch.equal(state[1], before[name][1]), name


@typical_own_cases
def test_states_are_updated_in_place(case):
    model = ours(case)
    before = [buffer.data_ptr() for buffer in model.buffers()]
    generate(model, prompt(5), 3)
    assert [buffer.data_ptr() for buffer in model.buffers()] == before


@every_row
def test_states_have_the_shapes_and_dtypes_that_the_row_says(row):
    model = ours(next(iter(row.cases)), 50, 2, torch.bfloat16)
    assert {state.shape: state.dtype for state in states(model).values()} == row.states
    assert model.max_chunk == model.longest_chunk == row.max_chunk
    assert not states(model).keys() & model.state_dict().keys()


@typical_own_cases
def test_angles_are_computed_in_float32_whatever_the_dtype(case):
    model = ours(case, dtype=torch.bfloat16)
    others = [b for name, b in model.named_buffers() if name not in states(model)]
    assert {buffer.dtype for buffer in others} == {torch.float32}


# Checkpoints


@typical_cases
def test_a_model_on_meta_has_its_buffers_and_none_of_its_weights(case):
    row, config = ROW_OF[case], reference(case).config.to_dict()
    with torch.device("meta"):
        model = row.networks.Network(row.networks.Config.from_dict(config), 32)
    assert all(parameter.is_meta for parameter in model.parameters())
    real = ours(case, 32)
    for (name, buffer), (_, expected) in zip(
        model.named_buffers(), real.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, expected), name


@every_case
def test_a_saved_checkpoint_loads_into_a_model_on_meta(tmp_path, case):
    reference(case).save_pretrained(tmp_path)
    model = load(tmp_path, ROW_OF[case])
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == reference(case).config.tie_word_embeddings
    tokens, expected = logits_of_one_pass(case)
    ends = even_ends(12, min(model.max_chunk, 5))
    assert_near(torch.cat(prefill(model, tokens, ends)), expected[[end - 1 for end in ends]])


def tied_cases() -> list[str]:
    """A case of each model_type that has one with a tied head."""
    tied = [
        case for case in CASES
        if reference(case).config.tie_word_embeddings
    ]  # fmt: skip
    return list({model_type_of(case): case for case in tied}.values())


def test_a_head_that_differs_from_the_embedding_that_it_is_tied_to_is_refused(tmp_path):
    cases = tied_cases()
    assert {ROW_OF[case].name for case in cases} == {row.name for row in ARCHITECTURES}
    for i, case in enumerate(cases):
        directory = tmp_path / str(i)
        hf = reference(case)
        hf.save_pretrained(directory)
        weights = load_file(directory / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, directory / "model.safetensors")
        load(directory, ROW_OF[case])
        weights["lm_head.weight"][3, 5] += 0.25
        save_file(weights, directory / "model.safetensors")
        with pytest.raises(ExportError, match="lm_head.weight.* differ, and the model's config"):
            load(directory, ROW_OF[case])


@pytest.mark.parametrize(
    "row", [row for row in ARCHITECTURES if row.multimodal], ids=lambda row: row.name
)
def test_the_text_part_of_a_multimodal_checkpoint_loads(tmp_path, row):
    config_class, model_class, config = row.multimodal
    hf = model_class(config_class(**config)).eval().requires_grad_(False)
    randomize(hf, row)
    hf.save_pretrained(tmp_path)
    stored = " ".join(open_checkpoint(tmp_path).stored)
    assert "vision_tower" in stored
    assert "embed_vision" in stored or "multi_modal_projector" in stored
    model = load(tmp_path, row)
    tokens = prompt(12)
    expected = hf(input_ids=tokens).logits[0]
    assert (expected.amax(-1) - expected.amin(-1)).min() > 3.0
    assert_near(torch.cat(prefill(model, tokens, [5, 12])), expected[[4, 11]])


def load(directory, row: Architecture) -> torch.nn.Module:
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config["model_type"] in row.networks.MODEL_TYPES
    with torch.device("meta"):
        config = row.networks.Config.from_dict(checkpoint.config)
        model = row.networks.Network(config, row.max_seq_len)
    load_weights(model, checkpoint, row.networks.checkpoint_name)
    return model.requires_grad_(False)


@every_row_and("name, parameter", lambda row: row.names.items())
def test_a_tensor_is_found_by_its_name_in_a_checkpoint(row, name, parameter):
    assert row.networks.checkpoint_name(name) == parameter


# Configs


@every_row
def test_every_model_type_of_a_module_has_a_case(row):
    assert set(row.networks.MODEL_TYPES) == set(row.classes)
    assert {case.split(",")[0] for case in row.cases} == set(row.classes)


@every_case
def test_a_config_means_what_transformers_reads_in_it(case):
    read_by_transformers = reference(case).config.to_dict()
    from_dict = ROW_OF[case].networks.Config.from_dict
    assert from_dict(keys(case)) == from_dict(read_by_transformers)


@every_row_and("config", lambda row: [(config,) for config in row.published])
def test_a_published_config_means_what_transformers_reads_in_it(row, config):
    ((config_class, _),) = row.classes.values()
    from_dict = row.networks.Config.from_dict
    assert from_dict(config) == from_dict(config_class(**config).to_dict())


@every_row_and("model_type", lambda row: [(name,) for name in row.classes])
def test_what_a_config_does_not_say_is_transformers_default(row, model_type):
    said = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8} | row.says
    from_dict = row.networks.Config.from_dict
    read_by_transformers = row.classes[model_type][0](**said).to_dict()
    assert from_dict(said | {"model_type": model_type}) == from_dict(read_by_transformers)


@every_row_and("change, message", lambda row: row.refused[1])
def test_a_config_that_cannot_be_run_is_refused_by_the_name_of_its_field(row, change, message):
    with pytest.raises(ValueError, match=message):
        row.networks.Config.from_dict(keys(row.refused[0]) | change)


@every_row_and("name", lambda row: [(name,) for name in row.required])
def test_a_config_that_lacks_a_size_is_refused_by_its_name(row, name):
    config = keys(row.refused[0])
    for lacking in (config | {name: None}, {k: v for k, v in config.items() if k != name}):
        with pytest.raises(ValueError, match=f"lacks {name}$"):
            row.networks.Config.from_dict(lacking)
