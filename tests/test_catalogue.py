"""Names, published counts, and the discipline of units."""

import collections
import csv
import pathlib

import numpy as np
import pytest
import scipy.optimize

from jaxsd import costmodel

DATA = pathlib.Path(costmodel.__file__).parent / "data"

# Parameters of published checkpoints, from their cards and papers and not from our table.
PUBLISHED = {
    "gpt2": 124439808,
    "gpt2-medium": 354823168,
    "gpt2-large": 774030080,
    "gpt2-xl": 1557611200,
    "opt-125m": 125239296,
    "opt-350m": 331196416,
    "opt-1.3b": 1315758080,
    "opt-2.7b": 2651596800,
    "opt-13b": 12853473280,
    "pythia-14m": 14067712,
    "pythia-31m": 30494720,
    "pythia-70m": 70426624,
    "pythia-160m": 162322944,
    "pythia-410m": 405334016,
    "pythia-1b": 1011781632,
    "pythia-1.4b": 1414647808,
    "pythia-2.8b": 2775208960,
    "pythia-6.9b": 6857302016,
    "pythia-12b": 11846072320,
    "llama-2-7b": 6738415616,
    "llama-2-13b": 13015864320,
    "llama-2-70b": 68976648192,
    "llama-3-8b": 8030261248,
    "llama-3-70b": 70553706496,
    "llama-3.1-8b": 8030261248,
    "llama-3.1-70b": 70553706496,
    "llama-3.1-405b": 405853388800,
    "llama-3.2-1b": 1235814400,
    "llama-3.2-3b": 3212749824,
    "qwen1.5-0.5b": 463987712,
    "qwen1.5-1.8b": 1836828672,
    "qwen1.5-14b": 14167290880,
    "qwen1.5-32b": 32512218112,
    "qwen2.5-0.5b": 494032768,
    "qwen2.5-1.5b": 1543714304,
    "qwen2.5-3b": 3085938688,
    "qwen2.5-7b": 7615616512,
    "qwen2.5-14b": 14770033664,
    "qwen2.5-32b": 32763876352,
    "qwen2.5-72b": 72706203648,
    "qwen3-0.6b": 596049920,
    "qwen3-1.7b": 1720574976,
    "qwen3-4b": 4022468096,
    "qwen3-8b": 8190735360,
    "qwen3-14b": 14768307200,
    "qwen3-32b": 32762123264,
    "qwen3-30b-a3b": 30532122624,
    "qwen3-235b-a22b": 235093634560,
    "gemma-2-2b": 2614341888,
    "gemma-2-9b": 9241705984,
    "gemma-2-27b": 27227128320,
    "gemma-3-270m": 268098176,
    "gemma-3-1b": 999885952,
    "gemma-3-27b": 27009346304,
    "mistral-7b": 7241732096,
    "mixtral-8x7b": 46702792704,
    "seed-oss-36b": 36151104512,
    "sheared-llama-1.3b": 1345423360,
    "llama-160m": 162417408,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_ones(name):
    assert costmodel.parameters_total(costmodel.named_shape(name)) == PUBLISHED[name]


def test_every_count_equals_that_beside_its_row():
    """Each was compared with the architecture built, without weights, from its configuration."""
    rows = list(csv.DictReader((DATA / "shapes.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["name"] for row in rows] == list(costmodel.model_names())
    for row in rows:
        shape = costmodel.named_shape(row["name"])
        assert costmodel.parameters_total(shape) == int(row["parameters_total"]), row["name"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama-2-7b", 524288),
        ("llama-3.1-8b", 131072),
        ("llama-3.1-70b", 327680),
        ("qwen2.5-0.5b", 12288),
        ("gemma-2-9b", 344064),
        ("qwen3-30b-a3b", 98304),
    ],
)
def test_cache_bytes_of_a_token_in_16_bits(name, size):
    assert costmodel.kv_bytes_per_token(costmodel.named_shape(name)) == size


@pytest.mark.parametrize(
    ("name", "billions", "last_digit"),
    [("mixtral-8x7b", 12.9, 0.1), ("qwen3-30b-a3b", 3.3, 0.1), ("qwen3-235b-a22b", 22, 1)],
)
def test_active_parameters_are_the_published_ones(name, billions, last_digit):
    """As their makers count them: both token tables included, rounded or cut."""
    shape = costmodel.named_shape(name)
    both_tables = costmodel.parameters_active(shape) + shape.vocab_size * shape.d_model
    assert both_tables / 1e9 == pytest.approx(billions, abs=last_digit)


@pytest.mark.parametrize(
    ("size", "total"),
    [
        ("small", 60506624),
        ("base", 222903552),
        ("large", 737668096),
        ("3b", 2851598336),
        ("11b", 11307321344),
        ("v1.1-small", 76961152),
        ("v1.1-base", 247577856),
        ("v1.1-large", 783150080),
        ("v1.1-xl", 2849757184),
        ("v1.1-xxl", 11135332352),
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
        # A sparse peak beside dense ones shows here: GPUs do 8 bits twice as fast as 16.
        ratios = (0, 1, 2) if name.startswith("tpu") else (0, 2)
        ratio = peak / chip.flops_per_second
        assert any(ratio == pytest.approx(whole, rel=0.03) for whole in ratios)
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


def seconds_per_token(rows, memory_efficiency, layer_seconds, collective_seconds):
    """Weights through an A100's memory, and a part per layer: the model written out once more."""
    out = []
    for row in rows:
        shape, p = costmodel.named_shape(row["model"].lower()), row["tensor_parallel"]
        streaming = 2 * costmodel.parameters_read(shape) / (p * memory_efficiency * 2.039e12)
        out.append(streaming + shape.n_layers * (layer_seconds + collective_seconds * (p > 1)))
    return np.array(out)


def test_the_compiled_stack_is_the_fit_of_the_published_rows():
    rows = [r for r in costmodel.published("gpt_fast_decode_a100") if r["weight_format"] == "bf16"]
    measured = np.array([1 / row["tokens_per_second"] for row in rows])

    def errors(unknowns):
        efficiency, layer, collective = unknowns
        return seconds_per_token(rows, efficiency, 1e-6 * layer, 1e-6 * collective) / measured - 1

    fit = scipy.optimize.least_squares(errors, [0.5, 10.0, 10.0], x_scale=[1, 50, 20]).x
    stack = costmodel.named_stack("torch-compile")
    assert stack.memory_efficiency == pytest.approx(fit[0], abs=1e-3)
    assert 1e6 * stack.layer_seconds == pytest.approx(fit[1], abs=0.1)
    assert 1e6 * stack.collective_seconds == pytest.approx(fit[2], abs=0.1)
    assert np.abs(errors(fit)).mean() < 0.03


@pytest.mark.parametrize(("name", "ms"), [("sheared-llama-1.3b", 13.13), ("yan-wide-1.3b", 6.69)])
def test_the_eager_stack_gives_the_step_times_it_was_fitted_to(name, ms):
    stack, chip = costmodel.named_stack("torch-eager"), costmodel.named_chip("a100-80gb")
    seconds = costmodel.pass_seconds(costmodel.named_shape(name), chip, 1, 1, 100, stack=stack)
    assert 1e3 * float(seconds) == pytest.approx(ms, rel=0.06)


def test_the_tpu_stack_gives_the_times_it_was_derived_from():
    """14.1 ms per token of 70e9 parameters on 16 chips; cost ratios to two decimals on one."""
    stack, chip = costmodel.named_stack("xla-tpu"), costmodel.named_chip("tpu-v4")
    streaming = 2 * 70e9 / (16 * chip.bytes_per_second * stack.memory_efficiency)
    layers = 80 * (stack.layer_seconds + 2 * 2 * 15 * stack.hop_seconds)
    assert 1e3 * (streaming + layers) == pytest.approx(14.1, rel=0.01)

    def step(size):
        shape = costmodel.named_shape(f"t5-v1.1-{size}-decoder")
        return float(costmodel.pass_seconds(shape, chip, 1, 1, 64, stack=stack))

    for row in costmodel.published("leviathan_t5xxl"):
        cost_ratio = step(row["draft"].removeprefix("T5-")) / step("xxl")
        assert cost_ratio == pytest.approx(row["c"], abs=0.01)


def test_numbers_have_the_type_their_use_needs():
    """Counts stay exact, flags stay flags, and what is divided is a float."""
    shape = costmodel.named_shape("qwen1.5-14b")
    flags = ("tied_embeddings", "qkv_bias", "output_bias", "mlp_bias", "cross_attention")
    for field, value in shape._asdict().items():
        expected = bool if field in flags else int
        assert type(value) is expected or (field == "embedding_dim" and value is None), field
    for record in (costmodel.named_chip("l4"), costmodel.named_stack("ideal")):
        assert all(type(value) is float for value in record)


@pytest.mark.parametrize("file", ["chips", "stacks"])
def test_units_are_those_of_the_field(file):
    units = {"flops": {"FLOP/s", "OP/s"}, "bytes": {"B", "B/s"}, "seconds": {"s"}}
    for row in csv.DictReader((DATA / f"{file}.csv").read_text(encoding="utf-8").splitlines()):
        kind = next((kind for kind in units if kind in row["field"]), None)
        assert row["unit"] in units.get(kind, {"1"}), row
        assert (row["unit"] != "B") or row["field"] == "memory_bytes", row


def test_every_data_file_is_named_where_the_sources_are():
    text = (DATA / "SOURCES.md").read_text(encoding="utf-8")
    files = sorted(path.name for path in DATA.glob("*.csv"))
    assert len(files) == 7
    for name in files:
        assert f"`{name}`" in text


def test_the_wide_draft_is_smaller_in_name_than_in_print():
    """The widths that its paper prints do not make the 796M of its name; its row says which do."""
    shape = costmodel.named_shape("yan-wide-796m")
    assert costmodel.parameters_total(shape) == pytest.approx(1.27e9, rel=5e-3)
    narrower = shape._replace(d_model=2560, d_ff=13056, n_heads=20, n_kv_heads=20)
    assert costmodel.parameters_total(narrower) == pytest.approx(796e6, abs=0.5e6)


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


def test_cells_are_whole_numbers_numbers_words_or_nothing():
    from jaxsd.costmodel import catalogue

    cells = {
        "7": 7,
        "-3": -3,
        ".75": 0.75,
        "1.6106e+09": 1.6106e9,
        "T5-small": "T5-small",
        "": None,
    }
    for cell, value in cells.items():
        found = catalogue._value(cell)
        assert found == value
        assert type(found) is type(value)


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
    assert rows[0]["c"] == 0.02
    assert [type(rows[0][key]) for key in ("gamma", "temperature")] == [int, int]
    rates = costmodel.published("gpt_fast_decode_a100")
    assert len(rates) == 23
    rates[0]["tokens_per_second"] = 0.0  # a caller's copy
    assert costmodel.published("gpt_fast_decode_a100")[0]["tokens_per_second"] == 104.9
