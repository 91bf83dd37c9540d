"""Names, published counts, and the discipline of units."""

import collections

import pytest

from jaxsd import costmodel

# Parameters of published checkpoints, from their cards and papers and not from our table.
PUBLISHED = {
    "gpt2": 124439808,
    "gpt2-xl": 1557611200,
    "opt-125m": 125239296,
    "opt-350m": 331196416,
    "opt-1.3b": 1315758080,
    "opt-2.7b": 2651596800,
    "opt-13b": 12853473280,
    "pythia-70m": 70426624,
    "pythia-1.4b": 1414647808,
    "pythia-2.8b": 2775208960,
    "pythia-6.9b": 6857302016,
    "pythia-12b": 11846072320,
    "llama-2-7b": 6738415616,
    "llama-2-13b": 13015864320,
    "llama-2-70b": 68976648192,
    "llama-3-8b": 8030261248,
    "llama-3.1-70b": 70553706496,
    "llama-3.1-405b": 405853388800,
    "llama-3.2-1b": 1235814400,
    "llama-3.2-3b": 3212749824,
    "qwen1.5-0.5b": 463987712,
    "qwen1.5-1.8b": 1836828672,
    "qwen1.5-14b": 14167290880,
    "qwen2.5-0.5b": 494032768,
    "qwen2.5-1.5b": 1543714304,
    "qwen2.5-3b": 3085938688,
    "qwen2.5-72b": 72706203648,
    "qwen3-0.6b": 596049920,
    "qwen3-8b": 8190735360,
    "qwen3-30b-a3b": 30532122624,
    "gemma-2-2b": 2614341888,
    "gemma-2-9b": 9241705984,
    "gemma-2-27b": 27227128320,
    "gemma-3-270m": 268098176,
    "gemma-3-1b": 999885952,
    "mistral-7b": 7241732096,
    "mixtral-8x7b": 46702792704,
    "seed-oss-36b": 36151104512,
    "sheared-llama-1.3b": 1345423360,
    "llama-160m": 162417408,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_ones(name):
    assert costmodel.parameters_total(costmodel.named_shape(name)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("size", "total"),
    [
        ("small", 60506624),
        ("base", 222903552),
        ("large", 737668096),
        ("3b", 2851598336),
        ("11b", 11307321344),
    ],
)
def test_t5_decoders_and_their_encoders_make_the_published_whole(size, total):
    shape = costmodel.named_shape(f"t5-{size}-decoder")
    # An encoder layer lacks the cross attention and its norm; the token table is shared.
    encoder = shape._replace(cross_attention=False, norm_vectors_per_layer=2)
    both = costmodel.parameters_total(shape) + costmodel.parameters_non_embedding(encoder)
    assert both == total


@pytest.mark.parametrize("name", costmodel.model_names())
def test_every_model_is_whole_and_has_a_source(name):
    shape = costmodel.named_shape(name)
    assert all(isinstance(value, int) for value in shape if value is not None)
    assert shape.n_heads % shape.n_kv_heads == 0
    assert 0 <= shape.n_local_layers <= shape.n_layers
    assert len(costmodel.sources(name)["shape"]) > 20
    tokens = costmodel.training_tokens(name)
    assert tokens is None or 1e10 < tokens < 1e14
    read, total = costmodel.parameters_read(shape), costmodel.parameters_total(shape)
    assert costmodel.parameters_active(shape) <= read <= total


def test_the_families_are_there():
    families = collections.Counter(name.split("-")[0] for name in costmodel.model_names())
    for family in ("gpt2", "opt", "pythia", "llama", "qwen1.5", "qwen2.5", "qwen3", "gemma", "t5"):
        assert families[family] >= 1, family
    assert len(costmodel.model_names()) == len(set(costmodel.model_names())) > 60


@pytest.mark.parametrize("name", costmodel.chip_names())
def test_chips_are_dense_one_way_and_in_si_units(name):
    """Sparse peaks, bytes for bits, or both directions of a link would leave these ranges."""
    chip = costmodel.named_chip(name)
    assert 100 <= chip.flops_per_second / chip.bytes_per_second <= 600
    assert 4 <= 1e3 * chip.memory_bytes / chip.bytes_per_second <= 100  # ms to read it all
    assert 0.005 <= chip.link_bytes_per_second / chip.bytes_per_second <= 0.2
    for peak in (chip.int8_flops_per_second, chip.fp8_flops_per_second):
        assert peak == 0 or 0.99 <= peak / chip.flops_per_second <= 2.1
    where = costmodel.sources(name)
    assert set(where) == set(costmodel.Chip._fields)
    assert all(len(text) > 10 for text in where.values())


@pytest.mark.parametrize("name", costmodel.stack_names())
def test_stacks_say_what_is_measured_and_what_is_assumed(name):
    stack = costmodel.named_stack(name)
    assert 0 < stack.memory_efficiency <= 1
    assert 0 < stack.compute_efficiency <= 1
    assert all(value >= 0 for value in stack)
    for field, text in costmodel.sources(name).items():
        kinds = ("assumed", "fitted", "derived", "definition", "Austin")
        assert text.startswith(kinds), (field, text)


def test_unknown_names_list_the_known_ones_the_nearest_first():
    with pytest.raises(ValueError, match=r"did you mean 'llama-3\.1-70b'\? Known are gpt2, "):
        costmodel.named_shape("llama3.1-70b")
    with pytest.raises(ValueError, match="'h100' is not a known chip: did you mean 'h100-sxm'"):
        costmodel.named_chip("h100")
    with pytest.raises(ValueError, match="Known are ideal, torch-compile"):
        costmodel.named_stack("???")
    with pytest.raises(ValueError, match="not a known data set"):
        costmodel.published("secrets")
    with pytest.raises(ValueError, match="not a known model, chip or stack"):
        costmodel.sources("nothing")


def test_published_rows_are_typed():
    pairs = costmodel.published("sdsl_alpha_pairs")
    assert len(pairs) == 130
    assert len({row["target"] for row in pairs}) == 13
    assert all(0.5 < row["alpha"] < 0.8 for row in pairs)
    losses = costmodel.published("morph_losses")
    assert len(losses) == 76
    assert all(isinstance(row["parameters_total"], int) for row in losses)
    rows = costmodel.published("leviathan_t5xxl")
    assert rows[0]["alpha"] == 0.75
    assert rows[0]["task"] == "EnDe"
